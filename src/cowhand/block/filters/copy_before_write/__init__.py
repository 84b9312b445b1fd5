"""What is about to be overwritten is copied to a target first."""
