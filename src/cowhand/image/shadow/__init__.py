"""A change tried out over an image that stays as it is."""
