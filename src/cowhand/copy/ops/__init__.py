"""What is done with the engine: convert, dd, compare, measure, checksums."""
