"""Generic I/O over the mapping of a format: reading, allocating writes, batches."""
