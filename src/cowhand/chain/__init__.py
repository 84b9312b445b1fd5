"""Chains: the tree of images, and who depends on whom."""
