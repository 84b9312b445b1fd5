"""Protocol drivers: where the bytes of an image are."""
