"""The block layer: disks, nodes, the graph between them, and what every driver shares."""
