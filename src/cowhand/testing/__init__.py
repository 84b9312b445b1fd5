"""For those who write drivers: conformance classes, a model of a disk, and nodes that record, fail and wait."""
