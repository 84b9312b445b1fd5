"""Random lives of images: what cowhand writes QEMU reads, what QEMU writes cowhand reads, and both say the same of every image.

All images are made of every version, cluster size, refcount width and compression, over backing files of both formats and depth 0 to 4.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from cowhand.testing.machine import SCALE
from tests.interop.images import CLUSTERS, VERBS, Request, Shape, examples, requests, shapes
from tests.interop.life import Life, Session, live
from tests.tools.qemu import assert_clean, assert_identical, require_qemu

pytestmark = [require_qemu, pytest.mark.interop, pytest.mark.slow]


def lived(shape: Shape, maker: str, sessions: list[Session]) -> None:
    """Live in a folder of its own: hypothesis runs many examples in one test."""
    folder = Path(tempfile.mkdtemp(prefix="cowhand-interop-"))
    try:
        live(folder, shape, maker, sessions)
    finally:
        shutil.rmtree(folder)


by_cluster = pytest.mark.parametrize(
    "clusters", [CLUSTERS[:1], CLUSTERS[1:4], CLUSTERS[4:8], CLUSTERS[8:]], ids=lambda c: f"{c[0]}-{c[-1]}"
)


def one_of(who: str) -> st.SearchStrategy[list[Session]]:
    return st.lists(st.tuples(st.just(who), st.booleans(), requests(30)), min_size=1, max_size=2)


@by_cluster
@pytest.mark.timeout(3600)
def test_what_cowhand_writes(clusters: tuple[int, ...]) -> None:
    @examples(25)
    @given(shapes(clusters), one_of("cowhand"))
    def run(shape: Shape, sessions: list[Session]) -> None:
        lived(shape, "cowhand", sessions)

    run()


@by_cluster
@pytest.mark.timeout(3600)
def test_what_qemu_writes(clusters: tuple[int, ...]) -> None:
    @examples(20)
    @given(shapes(clusters), one_of("qemu"))
    def run(shape: Shape, sessions: list[Session]) -> None:
        lived(shape, "qemu", sessions)

    run()


@by_cluster
@pytest.mark.timeout(3600)
def test_what_both_write_in_turn(clusters: tuple[int, ...]) -> None:
    sessions = st.lists(
        st.tuples(st.sampled_from(("cowhand", "qemu")), st.booleans(), requests(15)), min_size=2, max_size=4
    )

    @examples(20)
    @given(shapes(clusters), st.sampled_from(("cowhand", "qemu")), sessions)
    def run(shape: Shape, maker: str, sessions: list[Session]) -> None:
        lived(shape, maker, sessions)

    run()


@pytest.mark.parametrize("cluster", [512, 4096, 65536])
@pytest.mark.parametrize("bits", [4, 16, 64])
def test_a_long_life(cluster: int, bits: int, tmp_path: Path, rng: random.Random) -> None:
    """Hundreds of requests, so that tables grow, space is used again, and snapshots come and go."""
    shape = Shape(cluster, 3, bits, "zstd", formats=("qcow2", "raw"), sizes=(3_000_320, 2_500_096, 4_000_256))
    life = Life(tmp_path, shape, "qemu")
    for number in range(4):
        story = [
            Request(rng.choice(VERBS), rng.randrange(1 << 24), rng.randrange(1 << 24), rng.randrange(1, 256))
            for _ in range(int(60 * SCALE))
        ]
        life.session(("qemu" if number == 2 else "cowhand", bool(number % 2), story))
    life.judge()


@pytest.mark.parametrize("writer", ["cowhand", "qemu"])
@pytest.mark.parametrize("depth", range(5))
def test_every_depth_of_backing(depth: int, writer: str, tmp_path: Path) -> None:
    sizes = tuple((6 - level % 3) * 300_000 // 512 * 512 for level in range(depth + 1))
    for lowest in ("raw", "qcow2"):
        folder = tmp_path / lowest
        folder.mkdir()
        formats = ("qcow2",) * (depth - 1) + (lowest,) if depth else ()
        life = Life(folder, Shape(4096, formats=formats, sizes=sizes), writer)
        story = [
            Request(verb, number * 7_368_787, number * 1_299_709, 3 * number + 1) for number, verb in enumerate(STORY)
        ]
        life.session((writer, True, story))
        life.judge()
        model = folder / "model"
        model.write_bytes(life.expected.content)
        assert_clean(life.path)
        assert_identical(model, "raw", life.path, "qcow2")


STORY = (
    "write",
    "write",
    "zero",
    "write",
    "snapshot",
    "discard",
    "write",
    "compress",
    "grow",
    "compress",
    "zero",
    "write",
    "apply",
    "write",
)
