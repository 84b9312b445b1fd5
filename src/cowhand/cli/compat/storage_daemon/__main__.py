"""``python -m cowhand.cli.compat.storage_daemon``."""

import sys

from cowhand.cli.compat.storage_daemon import main

sys.exit(main())
