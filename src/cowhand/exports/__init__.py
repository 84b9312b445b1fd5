"""Exports: a disk, given to other programs. Each kind is a package of its own."""
