"""How long tests wait for what has to happen."""

from __future__ import annotations

#: Seconds. A machine under load is ten times slower, and more; what is reached earlier costs nothing. pytest's own limit is longer.
PATIENCE = 600.0
