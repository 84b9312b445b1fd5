"""VMware's virtual disks."""
