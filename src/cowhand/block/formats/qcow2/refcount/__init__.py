"""Reference counts and the allocation of host clusters (QEMU: qcow2-refcount.c)."""
