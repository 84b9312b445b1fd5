"""L1 and L2 tables: mapping and allocation of guest clusters (QEMU: qcow2-cluster.c)."""
