"""Limits on requests and bytes per second, alone or in groups."""
