"""The fuzzer's parts: its seeds and findings pass, its mutations mean something, and what must not happen is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from cowhand.core.errors import ImageCorrupt
from tests.fuzz import exercise, seeds
from tests.fuzz.mutation import mutate, regions_of
from tests.hostile import layout

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*/*"))
MUTATIONS = 250


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_corpus_is_answered(path: Path) -> None:
    answers = exercise.exercise(path.read_bytes(), path.parent.name)
    assert set(answers) >= {"read", "check", "repair leaks", "repair all", "write"}


def test_seeds_that_cowhand_makes_are_accepted_in_every_step() -> None:
    made = seeds.images()
    for name in ("everything", "empty", "version-2", "one-bit-counts", "wide-counts", "zstd", "lazy"):
        assert set(exercise.exercise(made[name]).values()) == {"ok"}, name


def test_mutated_images_are_answered() -> None:
    image = bytes(layout.make().data)
    opened = 0
    for seed in range(MUTATIONS):
        answers = exercise.exercise(mutate(image, seed, 1 << 16))
        opened += answers["read"] == "ok"
    # An image that is refused at once tells nothing of the tables behind its header.
    assert MUTATIONS // 4 < opened < MUTATIONS


def test_mutations_are_repeatable_and_change_tables_too() -> None:
    image = bytes(layout.make().data)
    tables = [region for region in regions_of(image) if region.name != "header"]
    in_tables = 0
    for seed in range(100):
        changed = mutate(image, seed, 1 << 16)
        assert changed == mutate(image, seed, 1 << 16)
        assert len(mutate(image, seed, 600)) <= 600
        in_tables += any(changed[r.begin : r.end] != image[r.begin : r.end] for r in tables)
    assert in_tables > 30


@pytest.mark.parametrize("data", [b"", b"QFI\xfb", b"\0" * 111, bytes(layout.make().data[:100])])
def test_too_short_images_are_answered_and_mutated(data: bytes) -> None:
    assert "ok" not in exercise.exercise(data).values()
    for seed in range(20):
        mutate(data, seed, 4096)


def test_lost_write_and_foreign_exception_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    from cowhand.block.disk import Disk

    image = bytes(layout.make().data)
    with monkeypatch.context() as patch:
        patch.setattr(Disk, "write", lambda self, offset, *data, **more: None)
        with pytest.raises(exercise.Finding, match="is not there"):
            exercise.exercise(image)

    def broken(*ignored: object) -> None:
        raise IndexError("a mistake")

    with monkeypatch.context() as patch:
        patch.setattr(exercise, "_read", broken)
        with pytest.raises(IndexError):
            exercise.exercise(image)

    def dumb(*ignored: object) -> None:
        raise ImageCorrupt("")

    with monkeypatch.context() as patch:
        patch.setattr(exercise, "_check", dumb)
        with pytest.raises(exercise.Finding, match="says nothing"):
            exercise.exercise(image)
