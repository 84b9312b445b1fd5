"""The commands: thin callers of the library, and everything that people see of it."""
