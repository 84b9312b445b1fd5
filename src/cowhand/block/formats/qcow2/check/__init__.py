"""Consistency checks, repairs, and what clusters are used for."""
