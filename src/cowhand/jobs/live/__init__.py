"""Jobs on disks that are in use: backup, mirror, stream, commit."""
