"""Apple's disk images (UDIF)."""
