"""The targets of fuzzing: for each, what is done with an input, how inputs change, and how long they may be."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.fuzz import exercise, mutation, mutation_luks, volumes, wide, words

#: Changes an input: (data, seed, largest size, what changes bytes blindly) → data.
Mutator = Callable[[bytes, int, int, Callable[[bytes], bytes]], bytes]


class Target(NamedTuple):
    """``exercise`` returns what each step answered, and raises for a finding; ``mutate`` is None where bytes are changed blindly."""

    exercise: Callable[[bytes], dict[str, str]]
    mutate: Mutator | None
    max_bytes: int


TARGETS = {
    "qcow2": Target(exercise.exercise, mutation.mutate, 1 << 20),
    "luks": Target(volumes.exercise, mutation_luks.mutate, 1 << 20),
    "wide": Target(wide.exercise, None, 1 << 6),
    "names": Target(words.exercise, None, 1 << 12),
}
#: Files of the corpus that end with it are compressed by zlib: volumes are mostly zeroes.
COMPRESSED = ".z"


def load(path: Path) -> bytes:
    """Return the input in a file of the corpus."""
    data = path.read_bytes()
    return zlib.decompress(data) if path.suffix == COMPRESSED else data
