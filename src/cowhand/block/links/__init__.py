"""Which other files an image names: backing files, data files, extents. Headers alone are read, and nothing that they name is opened."""
