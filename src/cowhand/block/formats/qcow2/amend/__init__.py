"""Changing the options of an existing image."""
