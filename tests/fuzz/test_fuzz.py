"""The fuzzer's parts: its seeds and findings pass, its mutations mean something, and what must not happen is noticed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cowhand.core.errors import ImageCorrupt
from tests.fuzz import budget, exercise, mutation_luks, seeds, targets, volumes, wide, words
from tests.fuzz.mutation import mutate, regions_of
from tests.hostile import layout

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*/*"))
MUTATIONS = 250
VOLUMES = 60
#: The first step of each target: an input of the corpus that stops before it is none.
_FIRST = {"qcow2": "read", "luks": "describe", "names": "name", "wide": "read"}


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_corpus_is_answered(path: Path) -> None:
    assert _FIRST[path.parent.name] in targets.TARGETS[path.parent.name].exercise(targets.load(path))


def test_seeds_that_cowhand_makes_are_accepted_in_every_step() -> None:
    made = seeds.images()
    assert {"everything", "empty", "wide-counts", "extended", "bitmaps", "data-apart-raw"} <= set(made)
    for name, data in made.items():
        assert set(exercise.exercise(data).values()) == {"ok"}, name


def test_volumes_that_cowhand_makes_are_accepted_in_every_step() -> None:
    for name, data in seeds.luks_volumes().items():
        assert set(volumes.exercise(data)) == {"describe", "read", "write", "amend"}
        assert set(volumes.exercise(data).values()) == {"ok"}, name


def test_mutated_volumes_are_answered() -> None:
    data = seeds.luks_volumes()["plain"]
    answers = [volumes.exercise(mutation_luks.mutate(data, seed, len(data))) for seed in range(VOLUMES)]
    opened = sum(answer["describe"] == "ok" for answer in answers)
    assert VOLUMES // 8 < opened < VOLUMES
    assert 0 < sum("amend" in answer for answer in answers) < opened


def test_texts_of_all_kinds_mean_something() -> None:
    answers = {name: words.exercise(data) for name, data in seeds.names().items()}
    assert answers["quotes"]["json"] == answers["options"]["options"] == answers["size"]["size"] == "ok"
    assert answers["rules"]["rules"] == "ok"
    assert words.exercise(b'{"driver":"file","filename":"/etc/passwd"}')["json"] == "invalid-argument"


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
        patch.setattr(exercise, "read_all", broken)
        with pytest.raises(IndexError):
            exercise.exercise(image)

    def dumb(*ignored: object) -> None:
        raise ImageCorrupt("")

    with monkeypatch.context() as patch:
        patch.setattr(exercise, "_check", dumb)
        with pytest.raises(exercise.Finding, match="says nothing"):
            exercise.exercise(image)


def test_time_and_memory_beyond_the_budget_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    def forever() -> None:
        while True:
            pass

    with pytest.raises(budget.Exceeded, match="processor time"), budget.budget("loop", 0.05):
        forever()
    with budget.budget("sleep", 0.05):
        time.sleep(0.2)
    peaks = iter((50 << 20, 350 << 20))
    monkeypatch.setattr(budget, "_peak", lambda: next(peaks))
    with pytest.raises(budget.Exceeded, match="300 MiB"), budget.budget("memory"):
        pass


def test_a_finding_is_kept_once_for_each_place(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    from tests.fuzz import target

    for data in (b"first", b"second"):
        try:
            exercise.Steps().attempt("step", lambda: "".index("a"))
        except ValueError as problem:
            target.keep(problem, data, tmp_path)
    kept = sorted(tmp_path.iterdir())
    assert [path.suffix for path in kept] == ["", ".txt"]
    assert kept[0].read_bytes() == b"first" and "ValueError" in kept[1].read_text()
    target.keep(budget.TooSlow("step: more than 6 s"), b"third", tmp_path)
    assert [path.name.partition("-")[0] for path in sorted(tmp_path.glob("slow-*"))] == ["slow", "slow"]


def test_wide_values_are_answered_and_mean_something() -> None:
    inputs = wide.seeds()
    answers = {name: wide.exercise(data) for name, data in inputs.items()}
    assert {answers[f"kind-{kind}"]["read"] for kind in wide.KINDS} == {"ok"}
    refused = [name for name in inputs if "ok" not in answers[name].values()]
    assert 0 < len(refused) < len(inputs)
