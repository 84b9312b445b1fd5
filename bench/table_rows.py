"""Rows for what reads and writes tables: check, map, snapshots, measure, info."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from inputs import Inputs
from measuring import Case, Row, Sample, program, spawn

#: CPU seconds that `cowhand info` may use.
INFO_GOAL = 0.060


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


def info_row(inputs: Inputs, rounds: int, tell: Callable[[str], None]) -> Row:
    """Measure the CPU time of a whole `cowhand info` process."""
    cowhand, image = program("cowhand"), inputs.small()
    row = Row("info of a small image, CPU seconds", "—", INFO_GOAL, unit="s")
    for number in range(rounds + 2):
        sample = spawn(cowhand, "info", image)
        if number > 1:
            row.ours.append(sample)
    tell(f"{row.name}: {row.ratio:.3f} (goal {row.goal:g})")
    return row
