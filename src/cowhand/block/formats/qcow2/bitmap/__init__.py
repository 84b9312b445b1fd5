"""Persistent dirty bitmaps (QEMU: qcow2-bitmap.c)."""
