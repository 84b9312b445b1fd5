"""Exports of NBD servers."""
