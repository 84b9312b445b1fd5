"""Growing, shrinking, preallocating, emptying."""
