"""Long operations on the layers of a disk: commit, and what follows it."""
