"""From a file name or a description to nodes: drivers, probing, policy."""
