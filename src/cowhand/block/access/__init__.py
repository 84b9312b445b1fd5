"""Between a user and a node: alignment, hooks, zero detection, locks of byte ranges."""
