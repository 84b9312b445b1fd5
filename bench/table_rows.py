"""Rows for what reads and writes tables: check, map, snapshots, measure, info."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from inputs import Inputs
from measuring import Case, Row, Sample, program, spawn, spawn_for_memory

#: CPU seconds that `cowhand info` may use.
INFO_GOAL = 0.060
#: MiB that any work may take.
MEMORY_GOAL = 128
#: What is measured for its memory: verb and words of the command. Compaction in earnest needs what trying it out does, and has no peer.
MEMORY = {"compact": ("compact", "--dry-run"), "check": ("check", "--quiet")}


def cases(inputs: Inputs) -> Iterator[Case]:
    """Yield the rows, on one image whose every cluster is mapped."""
    cowhand, qemu_img = program("cowhand"), program("qemu-img")
    image = inputs.mapped()
    size = inputs.mapped_size
    yield _case(
        f"check, {size} mapped",
        "qemu-img check",
        0.35,
        (cowhand, "check", "--quiet", image),
        (qemu_img, "check", "-q", image),
    )
    ours, peer = (cowhand, "map", "--output", "json", image), (qemu_img, "map", "--output", "json", image)
    yield _case(f"map --output json, {size} mapped", "qemu-img map", 0.4, ours, peer)
    ours = (cowhand, "measure", "--output", "json", "-O", "qcow2", image)
    yield _case(f"measure, {size} mapped", "qemu-img measure", 0.5, ours, (qemu_img, "measure", "-O", "qcow2", image))
    yield _snapshot("create", cowhand, qemu_img, inputs)
    yield _snapshot("delete", cowhand, qemu_img, inputs)


def _case(name: str, peer_name: str, goal: float, ours: tuple[object, ...], peer: tuple[object, ...]) -> Case:
    return Case(name, peer_name, goal, lambda: spawn(*map(str, ours)), lambda: spawn(*map(str, peer)))


def _snapshot(verb: str, cowhand: str, qemu_img: str, inputs: Inputs) -> Case:
    image = str(inputs.mapped())
    letter = {"create": "-c", "delete": "-d"}[verb]

    def undo() -> None:
        """Bring the image where it was before *verb*, whoever did it."""
        spawn(qemu_img, "snapshot", {"create": "-d", "delete": "-c"}[verb], "bench", image)

    state = {"begun": verb == "create"}

    def prepare() -> None:
        if not state["begun"]:
            undo()
            state["begun"] = True

    def side(*argv: str) -> Callable[[], Sample]:
        def run() -> Sample:
            sample = spawn(*argv)
            undo()
            return sample

        return run

    return Case(
        f"snapshot {verb}, {inputs.mapped_size} mapped",
        "qemu-img snapshot",
        0.5,
        side(cowhand, "snapshot", verb, image, "bench"),
        side(qemu_img, "snapshot", letter, "bench", image),
        prepare,
    )


def rows_alone(inputs: Inputs, rounds: int, only: str, tell: Callable[[str], None]) -> Iterator[Row]:
    """Measure what has no peer, as far as *only* is in its name: CPU seconds of a small `info`, memory of what reads all tables."""
    cowhand = program("cowhand")
    name = "info of a small image, CPU seconds"
    if only in name:
        yield _alone(Row(name, "—", INFO_GOAL, unit="s"), (cowhand, "info", inputs.small()), rounds + 2, tell)
    for verb, words in MEMORY.items():
        name = f"{verb}, {inputs.mapped_size} mapped, peak memory"
        if only in name:
            row = Row(name, "—", MEMORY_GOAL, unit="MiB")
            yield _alone(row, (cowhand, *words, inputs.mapped()), min(rounds, 3) + 2, tell)


def _alone(row: Row, argv: tuple[str | Path, ...], rounds: int, tell: Callable[[str], None]) -> Row:
    """Run *argv* so many times; the first two do not count."""
    for number in range(rounds):
        sample = spawn_for_memory(*argv) if row.unit == "MiB" else spawn(*argv)
        if number > 1:
            row.ours.append(sample)
    tell(f"{row.name}: {row.ratio:.3f} {row.unit} (goal {row.goal:g})")
    return row
