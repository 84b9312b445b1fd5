"""The storage daemon: QEMU's monitor protocol (QMP) over nodes, jobs and exports."""
