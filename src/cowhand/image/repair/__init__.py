"""Repairs: planned, logged, undone."""
