"""The one engine that moves bulk data, and what is made of it: convert, dd, compare, measure; commit and other jobs use it too."""
