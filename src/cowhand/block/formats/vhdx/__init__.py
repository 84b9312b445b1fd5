"""Hyper-V's virtual hard disks, version 2."""
