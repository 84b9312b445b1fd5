"""The interface of a node, its edges and options: no graph, no I/O."""
