"""Regular files and block devices of the host."""
