"""Where the installed commands start: Ctrl-C ends the process quietly from here on, while the rest is still being imported.

Until a command has begun there is nothing to tidy up, and after its end neither: the interpreter's own answer would be a traceback. In between
:mod:`cowhand.cli.running` answers signals, and the drop-in tools do it themselves.
"""

from __future__ import annotations

# "signal" imports enum, which takes as long as all else here; "_signal" is part of the interpreter.
import _signal
import os
import sys

_EXIT_INTERRUPTED = 128 + _signal.SIGINT


def _leave(number: int, frame: object) -> None:
    os._exit(_EXIT_INTERRUPTED)


if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:  # not where the caller ignores it (nohup, "&")
    _signal.signal(_signal.SIGINT, _leave)


def cowhand() -> int:
    """Run ``cowhand`` with the arguments of the process."""
    from cowhand.cli.main import main

    return main()


def img() -> int:
    """Run ``cowhand-img``."""
    from cowhand.cli.compat.img import main

    return main()


def io() -> int:
    """Run ``cowhand-io``."""
    from cowhand.cli.compat.io import main

    return main()


def nbd() -> int:
    """Run ``cowhand-nbd``."""
    from cowhand.cli.compat.nbd import main

    return main()


def storage_daemon() -> int:
    """Run ``cowhand-storage-daemon``."""
    from cowhand.cli.compat.storage_daemon import main

    return main()


if __name__ == "__main__":
    sys.exit(cowhand())
