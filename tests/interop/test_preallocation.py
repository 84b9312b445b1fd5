"""All preallocation modes, for new images and for growth: every byte lies where QEMU puts it, and what the disk held stays."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import cowhand
from cowhand.copy.ops.convert import convert
from cowhand.image.create import create
from tests.tools.qemu import assert_clean, qemu_img, qemu_io, qemu_map, require_qemu

pytestmark = [require_qemu, pytest.mark.interop]

MODES = ("off", "metadata", "falloc", "full")


@dataclass
class Life:
    """An image's options, its first size, and what is done to it: growth to a size in a mode, or a command of qemu-io."""

    options: dict[str, str]
    size: int
    steps: list[tuple[str, str]]
    backing: int | None = None  #: the backing file's length
    data: bool = False
    said: list[str] = field(default_factory=list)

    def run(self, folder: Path) -> None:
        """Live it with both programs, and compare the files after each step."""
        paths = folder / "disk-a", folder / "disk-b"
        base = folder / "base"
        if self.backing is not None:
            base.write_bytes(random.Random(1).randbytes(self.backing))
        below = ("-b", str(base), "-F", "raw") if self.backing is not None else ()
        for path in paths:
            given = {**self.options, **({"data_file": f"{path}.data"} if self.data else {})}
            if path is paths[1]:
                words = ",".join(f"{name}={value}" for name, value in given.items())
                qemu_img("create", "-q", "-f", "qcow2", "-o", words, *below, path, str(self.size))
            else:
                under = {"backing": str(base), "backing_format": "raw"} if below else {}
                create(path, "qcow2", self.size, given, **under)
        self.said = [f"create {self.options} {self.size}, data file {self.data}, backing {self.backing}"]
        self.compare(*paths)
        for verb, what in self.steps:
            self.said.append(f"{verb} {what}")
            if verb == "io":
                for path in paths:
                    qemu_io(path, what, format="qcow2")
            elif verb == "snapshot":
                for path in paths:
                    qemu_img("snapshot", "-c", what, path)
            else:
                qemu_img("resize", "-q", "-f", "qcow2", f"--preallocation={verb}", paths[1], what)
                with cowhand.open(paths[0], format="qcow2", writable=True) as disk:
                    disk.resize(int(what), preallocation=verb)
            self.compare(*paths)

    def compare(self, ours: Path, theirs: Path) -> None:
        story = "; ".join(self.said)
        reports = []
        for path in (ours, theirs):
            report = assert_clean(path)
            report.pop("filename")
            reports.append(report)
        assert reports[0] == reports[1], story
        assert qemu_map(ours) == qemu_map(theirs), story
        a, b = ours.read_bytes(), theirs.read_bytes()
        if len(a) != len(b):
            b = b.ljust(-(-len(b) // 512) * 512, b"\0")  # a new image of ours ends on a whole sector
        assert len(a) == len(b), story
        a, b = (data.replace(bytes(path), b"*" * len(bytes(path))) for data, path in ((a, ours), (b, theirs)))
        if any(verb == "snapshot" for verb, _ in self.steps):
            return  # its table tells when it was taken
        differing = [at // 512 for at in range(0, len(a), 512) if a[at : at + 512] != b[at : at + 512]]
        assert not differing, f"{story}: sectors {differing[:12]}"
        if self.data:
            lengths = [Path(f"{path}.data").stat().st_size for path in (ours, theirs)]
            assert lengths[0] == lengths[1], story


def any_life(seed: int) -> Life:
    """Return a random one; the kinds of images take turns."""
    rng = random.Random(seed)
    cluster = (512, 65536, 4096, 2 << 20, 1024)[seed % 5]
    old = seed % 6 == 5
    options = {"cluster_size": str(cluster), "compat": "0.10" if old else "1.1"}
    if not old:
        options |= {"refcount_bits": str(rng.choice((1, 2, 16, 64))), "lazy_refcounts": rng.choice(("on", "off"))}
    extended = not old and cluster >= 16384 and rng.random() < 0.5
    if extended:
        options["extended_l2"] = "on"
    data = not old and seed % 4 == 3
    raw = data and rng.random() < 0.5
    if raw:
        options["data_file_raw"] = "on"
    unit = min(cluster * rng.choice((3, 30, 300)), 16 << 20)
    size = rng.randrange(0, unit) // 512 * 512
    backed = not raw and not old and rng.random() < 0.4
    if not backed or extended:
        options["preallocation"] = rng.choice(MODES)
    steps: list[tuple[str, str]] = []
    now = size
    for number in range(2):
        if now >= 512 and rng.random() < 0.6:
            length = min(now, rng.randrange(512, cluster * 3 + 512) // 512 * 512)
            offset = rng.choice((now - length, rng.randrange(0, now - length + 1) // 512 * 512))
            steps.append(("io", f"{rng.choice(('write -P 7', 'write -z', 'discard'))} {offset} {length}"))
        if rng.random() < 0.2 and options.get("refcount_bits") != "1" and not old and not data:
            steps.append(("snapshot", f"s{number}"))
        now += rng.randrange(1, unit) // 512 * 512 + 512
        steps.append((rng.choice(MODES), str(now)))
    backing = rng.choice((0, size // 2, size, size * 2)) // 512 * 512 if backed else None
    return Life(options, size, steps, backing, data)


@pytest.mark.parametrize("seed", range(16))
def test_everything_lies_where_qemu_puts_it(seed: int, tmp_path: Path) -> None:
    any_life(seed).run(tmp_path)


@pytest.mark.parametrize(
    "life",
    [
        # More counts than the table's first cluster names: the table moves and grows.
        Life({"cluster_size": "512", "refcount_bits": "64", "preallocation": "falloc"}, 3 << 20, [("full", "5000192")]),
        # The L1 table grows, and L2 tables fill the gap that it leaves.
        Life({"cluster_size": "4k", "preallocation": "falloc"}, 1_186_816, [("falloc", "1701376"), ("metadata", "2134528")]),
        Life({"cluster_size": "64k", "preallocation": "full"}, 0, [("falloc", "512"), ("falloc", "66048")]),
    ],
    ids=["refcount-table", "l1-table", "empty"],
)  # fmt: skip
def test_tables_that_move(life: Life, tmp_path: Path) -> None:
    life.run(tmp_path)


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_space_is_taken(mode: str, tmp_path: Path) -> None:
    """Of a new image, of its growth, of one whose data lies elsewhere, and of the target of a conversion."""
    path, data, source, target = (tmp_path / name for name in ("disk", "data", "source", "target"))
    create(path, "qcow2", 1_500_160, {"preallocation": mode})
    assert path.stat().st_blocks * 512 >= 1_500_160
    with cowhand.open(path, writable=True) as disk:
        disk.resize(4_000_256, preallocation=mode)
    assert path.stat().st_blocks * 512 >= 4_000_256
    create(tmp_path / "other", "qcow2", 1 << 20, {"data_file": str(data), "preallocation": mode})
    assert data.stat().st_blocks * 512 >= 1 << 20
    source.write_bytes(b"x" * 100_352 + bytes(900_096))
    convert(source, target, "qcow2", options={"preallocation": mode})
    assert target.stat().st_blocks * 512 >= 1_000_448
    assert_clean(target)


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc"])
@pytest.mark.parametrize("kind", ["standard", "extended"])
@pytest.mark.parametrize("held", ["shared", "compressed", "partial"])
def test_the_last_cluster_keeps_what_it_holds(kind: str, mode: str, held: str, tmp_path: Path) -> None:
    """The disk ends inside a cluster that is shared with a snapshot, or compressed, or of which subclusters hold data."""
    path, old, new = tmp_path / "disk", 515_072, 1_400_320
    options = {"extended_l2": "on"} if kind == "extended" else {}
    create(path, "qcow2", old, options)
    with cowhand.open(path, writable=True) as disk:
        disk.write(448 << 10 if held == "shared" else 460 << 10, b"\7" * (43 << 10))
    if held == "shared":
        qemu_img("snapshot", "-c", "s", path)
    if held == "compressed":
        convert(path, tmp_path / "other", "qcow2", options=options, compressed=True)
        path = tmp_path / "other"
    with cowhand.open(path, writable=True) as disk:
        before = disk.read(0, old)
        assert before.count(7) == 43 << 10
        disk.resize(new, preallocation=mode)
        assert disk.read(0, new) == before.ljust(new, b"\0")
        disk.write(old - 1000, b"x" * 2000)
        assert disk.read(0, new) == (before[:-1000] + b"x" * 2000).ljust(new, b"\0")
    assert_clean(path)


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
def test_what_a_file_held_behind_its_last_cluster_does_not_show(mode: str, tmp_path: Path) -> None:
    """A crash may leave bytes there that nothing refers to."""
    path = tmp_path / "disk"
    create(path, "qcow2", 1 << 20, {})
    with path.open("ab") as file:
        file.write(b"\xee" * 3_000_000)
    with cowhand.open(path, writable=True) as disk:
        disk.resize(3 << 20, preallocation=mode)
        assert not any(disk.read(0, 3 << 20))
        disk.write(0, b"a")
        assert not any(disk.read(1, (3 << 20) - 1))
    assert_clean(path)
