"""One image, by name: open, create, check, repair, describe."""
