"""Pictures of disks and chains: pure functions from extents and layers to SVG text. No file is opened here."""
