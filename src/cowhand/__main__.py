"""``python -m cowhand``: the same as the ``cowhand`` command."""

from __future__ import annotations

import sys

from cowhand.cli.start import cowhand

if __name__ == "__main__":
    sys.exit(cowhand())
