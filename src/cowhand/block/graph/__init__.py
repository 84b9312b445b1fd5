"""The shape of the graph: edges, permissions, drains, reopening."""
