"""``python -m cowhand.cli.compat.io``."""

import sys

from cowhand.cli.compat.io import main

sys.exit(main())
