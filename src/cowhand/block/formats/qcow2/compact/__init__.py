"""Moving clusters towards the start of the file."""
