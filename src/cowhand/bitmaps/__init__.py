"""Dirty bitmaps in memory: which parts of a disk were written."""
