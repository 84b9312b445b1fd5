"""Virtual-machine disk storage in pure Python: images, chains, copies and exports."""
