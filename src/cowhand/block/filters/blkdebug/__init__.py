"""Errors and suspended requests by rules, as QEMU's blkdebug."""
