"""Internal snapshots (QEMU: qcow2-snapshot.c)."""
