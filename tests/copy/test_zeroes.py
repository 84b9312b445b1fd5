"""Finding zeroes: every block is told apart as looking at each byte would tell it."""

from __future__ import annotations

import random

import pytest

from cowhand.copy.engine.zeroes import data_parts, zero_ranges


@pytest.mark.parametrize("grain", [512, 4096, 1 << 17])
def test_blocks_are_zero_when_all_their_bytes_are(rng: random.Random, grain: int) -> None:
    for _ in range(200):
        length = rng.randrange(12 * grain)
        offset = rng.choice((0, grain, rng.randrange(1 << 20)))
        buffer = bytearray(length) + b"\xff" * rng.randrange(3)
        for _ in range(rng.randrange(5)):
            if length:
                buffer[rng.randrange(length)] = rng.choice((1, 255))
        wanted: list[tuple[int, int]] = []
        position = 0
        while position < length:
            end = min(length, position + grain - (offset + position) % grain)
            if not any(buffer[position:end]):
                if wanted and wanted[-1][1] == position:
                    position = wanted.pop()[0]
                wanted.append((position, end))
            position = end
        assert zero_ranges(buffer, length, offset, grain) == wanted
        covered = sum(end - begin for begin, end in wanted)
        assert sum(end - begin for begin, end in data_parts(buffer, length, offset, grain)) == length - covered


def test_short_zeroes_between_data_count_as_data() -> None:
    buffer = bytearray(b"\1" * 4096 + bytes(8192) + b"\1" * 4096 + bytes(4096))
    assert data_parts(buffer, len(buffer), 0, 4096, 8192) == [(0, 4096), (12288, 16384)]
    assert data_parts(buffer, len(buffer), 0, 4096, 16384) == [(0, 16384)]
