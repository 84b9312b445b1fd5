"""Image locks, on the bytes that QEMU locks."""
