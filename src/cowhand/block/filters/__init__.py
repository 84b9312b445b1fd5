"""Filter drivers: nodes that change how requests pass, not what the data is."""
