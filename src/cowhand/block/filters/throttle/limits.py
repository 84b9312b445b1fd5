"""Limits on requests and bytes a second, as leaky buckets, without I/O, clock or lock.

Source: QEMU's ``docs/throttle.txt`` ("The Leaky Bucket algorithm") and ``ThrottleLimits``. A bucket leaks at the average rate; a request fits when
the bucket is not over-full, and its whole size goes in, so a large request is paid for afterwards. Without a burst rate the bucket holds a tenth of
a second's worth; with one it holds the burst rate times the burst's length, and a burst longer than a second is itself held to the burst rate by
a second bucket, of a tenth of a second's worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cowhand.core.errors import InvalidArgument

#: QEMU's bound on every rate.
MAX_RATE = 10**15
MAX_LENGTH = (1 << 32) - 1
KINDS = ("iops-total", "iops-read", "iops-write", "bps-total", "bps-read", "bps-write")
#: Seconds' worth that pass at once where no burst was asked for.
_GRACE = 0.1
#: Shorter waits are none: clocks and floating-point levels do not tell them from nothing.
_RESOLUTION = 1e-6


class Rate(NamedTuple):
    """One limit: ``average`` a second (0: none), ``burst`` a second (0: none) for ``length`` seconds."""

    average: int = 0
    burst: int = 0
    length: int = 1


class Limits(NamedTuple):
    """All limits of a group. Bytes for "bps", requests for "iops"; a request larger than ``iops_size`` counts as several."""

    rates: tuple[tuple[str, Rate], ...] = ()
    iops_size: int = 0

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Limits:
        """Return the limits that *given* says, names as in QEMU's ThrottleLimits. Raises InvalidArgument."""
        values = dict(given)
        rates = []
        for kind in KINDS:
            average = _number(values.pop(kind, 0), kind)
            burst = _number(values.pop(f"{kind}-max", 0), f"{kind}-max")
            length = _number(values.pop(f"{kind}-max-length", 1), f"{kind}-max-length", MAX_LENGTH)
            rates.append((kind, Rate(average, burst, length)))
        size = _number(values.pop("iops-size", 0), "iops-size")
        if values:
            raise InvalidArgument(f"Parameter '{next(iter(values))}' is unexpected")
        limits = cls(tuple(rates), size)
        limits._check()
        return limits

    def _check(self) -> None:
        rates = dict(self.rates)
        for unit in ("iops", "bps"):
            total, single = rates[f"{unit}-total"], (rates[f"{unit}-read"], rates[f"{unit}-write"])
            if (total.average and any(r.average for r in single)) or (total.burst and any(r.burst for r in single)):
                raise InvalidArgument("bps/iops/max total values and read/write values cannot be used at the same time")
        if self.iops_size and not any(rate.average for kind, rate in self.rates if kind.startswith("iops")):
            raise InvalidArgument("iops size requires an iops value to be set")
        for _, rate in self.rates:
            for wrong, text in (
                (max(rate.average, rate.burst) > MAX_RATE, f"bps/iops/max values must be within [0, {MAX_RATE}]"),
                (not rate.length, "the burst length cannot be 0"),
                (rate.length > 1 and not rate.burst, "burst length set without burst rate"),
                (rate.burst * rate.length > MAX_RATE, "burst length too high for this burst rate"),
                (rate.burst and not rate.average, "bps_max/iops_max require corresponding bps/iops values"),
                (rate.burst and rate.burst < rate.average, "bps_max/iops_max cannot be lower than bps/iops"),
            ):
                if wrong:
                    raise InvalidArgument(text)


def _number(value: Any, name: str, most: int = (1 << 63) - 1) -> int:
    if isinstance(value, str):
        try:
            value = int(value.strip(), 0)
        except ValueError:
            value = None
    if not isinstance(value, int) or isinstance(value, bool) or value >> 63 > 0:
        raise InvalidArgument(f"Parameter '{name}' expects a number", qemu=f"Parameter 'x-{name}' expects integer")
    if value < 0:
        raise InvalidArgument(f"'{name}' cannot be negative", qemu="Property values cannot be negative")
    if value > most:
        raise InvalidArgument(
            f"'{name}' is at most {most}", qemu=f"x-{name} value must be in therange [0, {most}]"
        )  # fmt: skip
    return value


class _Bucket:
    """One limit's meter."""

    __slots__ = ("burst_level", "level", "rate")

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self.level = self.burst_level = 0.0

    def leak(self, seconds: float) -> None:
        self.level = max(0.0, self.level - self.rate.average * seconds)
        self.burst_level = max(0.0, self.burst_level - self.rate.burst * seconds)

    def add(self, amount: float) -> None:
        self.level += amount
        if self.rate.length > 1:
            self.burst_level += amount

    def wait(self) -> float:
        rate = self.rate
        holds = rate.burst * rate.length if rate.burst else rate.average * _GRACE
        if self.level > holds:
            return (self.level - holds) / rate.average
        if rate.length > 1 and self.burst_level > rate.burst * _GRACE:
            return (self.burst_level - rate.burst * _GRACE) / rate.burst
        return 0.0


class Meter:
    """The buckets of one group. Not thread-safe; times are seconds of any clock that never goes back."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.limits = limits
        self._buckets = {kind: _Bucket(rate) for kind, rate in limits.rates if rate.average}
        self._last = now

    def _of(self, write: bool) -> list[tuple[str, _Bucket]]:
        mine = "write" if write else "read"
        return [(kind, b) for kind, b in self._buckets.items() if kind.endswith(("total", mine))]

    @property
    def idle(self) -> bool:
        """Whether there is nothing to limit."""
        return not self._buckets

    def wait(self, write: bool, now: float) -> float:
        """Return how many seconds after *now* the next request in that direction may pass, 0 for at once."""
        passed = max(0.0, now - self._last)
        self._last = max(self._last, now)
        for bucket in self._buckets.values():
            bucket.leak(passed)
        seconds = max((bucket.wait() for _, bucket in self._of(write)), default=0.0)
        return seconds if seconds > _RESOLUTION else 0.0

    def add(self, write: bool, length: int) -> None:
        """Count a request of *length* bytes that passes."""
        size = self.limits.iops_size
        requests = length / size if size and length > size else 1.0
        for kind, bucket in self._of(write):
            bucket.add(length if kind.startswith("bps") else requests)
