"""You see before you do: what an operation would touch, which images depend on what it changes, and the guard that refuses harm."""
