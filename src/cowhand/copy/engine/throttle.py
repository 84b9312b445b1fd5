"""A limit on bytes a second, shared by the workers of one copy."""

from __future__ import annotations

import threading

from cowhand.core import clock
from cowhand.core.progress import CancelToken


class Throttle:
    """Lets *rate* bytes a second pass, after a burst of at most a tenth of a second's worth. Thread-safe."""

    BURST_SECONDS = 0.1

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._lock = threading.Lock()
        self._free_at = clock.monotonic()  #: when what was let pass so far is paid for

    def take(self, count: int, cancel: CancelToken) -> None:
        """Wait until *count* bytes may pass. Raises Cancelled when the operation is cancelled meanwhile."""
        with self._lock:
            moment = clock.monotonic()
            begin = max(self._free_at, moment - self.BURST_SECONDS)
            self._free_at = begin + count / self.rate
            wait = self._free_at - moment
        if wait > 0 and cancel.wait(wait):
            cancel.check()
