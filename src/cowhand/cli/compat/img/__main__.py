"""``python -m cowhand.cli.compat.img``."""

import sys

from cowhand.cli.compat.img import main

sys.exit(main())
