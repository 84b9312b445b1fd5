"""The qcow2 format as bytes: structures, entries, no I/O."""
