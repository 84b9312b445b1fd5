"""``python -m cowhand.cli.compat.nbd``."""

import sys

from cowhand.cli.compat.nbd import main

sys.exit(main())
