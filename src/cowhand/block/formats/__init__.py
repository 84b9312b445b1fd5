"""Format drivers: what the bytes of an image mean."""
