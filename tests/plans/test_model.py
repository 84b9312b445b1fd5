"""Random trees of images over several folders, with links and internal snapshots: no verb changes what any other image or snapshot shows.

COWHAND_GUARD_RUNS=N makes N trees instead of a few.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import cowhand
from cowhand.block.links.reading import read_links
from cowhand.block.links.records import DATA_FILE
from cowhand.core.identity import Identity, identify
from cowhand.drivers import REGISTRY
from cowhand.image.create import create as make
from tests.plans.command import in_process

SIZE = 64 << 10
CLUSTER = 4096
FOLDERS = ("_base", "instances/a", "instances/b", "cache", "deep/er/folder", ".")
RUNS = int(os.environ.get("COWHAND_GUARD_RUNS", "6"))
STEPS = 14

#: What each image, and each snapshot of it, shows; None for what cannot be opened.
Shown = dict[tuple[str, str | None], bytes | None]


class World:
    """A tree of images."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        self.root, self.rng = root, rng
        self.images: list[Path] = []
        self.formats: dict[Path, str] = {}
        self.links: list[Path] = []
        self.done = self.refused = 0
        for folder in FOLDERS:
            (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(rng.randrange(7, 12)):
            self.add(number)
        for number in range(rng.randrange(4)):
            link = root / rng.choice(FOLDERS) / f"link{number}"
            target = rng.choice(self.images)
            if rng.randrange(2):
                link.symlink_to(target)
            else:
                os.link(target, link)
            self.links.append(link)

    def name(self, image: Path, backing: Path) -> str:
        """Return one of the names that *backing* has in *image*."""
        rng = self.rng
        names = [p for p in self.links if identify(p) == identify(backing)] + [backing]
        path = rng.choice(names)
        kind = rng.randrange(4) if self.format(path) == "qcow2" else rng.choice((0, 1, 3))
        if kind == 0:
            return str(path)
        if kind == 1:
            return f"file:{path}"
        if kind == 2:
            return f'json:{{"driver": "qcow2", "file": {{"driver": "file", "filename": "{path}"}}}}'
        return os.path.relpath(path, image.parent)

    def format(self, path: Path) -> str:
        """Return the format of an image, also by one of its links."""
        return next(format for image, format in self.formats.items() if identify(image) == identify(path))

    def add(self, number: int) -> None:
        rng = self.rng
        path = self.root / rng.choice(FOLDERS) / f"disk{number}"
        options: dict[str, object] = {"cluster_size": CLUSTER}
        self.formats[path] = "qcow2"
        kind = rng.randrange(8)
        if kind == 0:
            self.formats[path] = "raw"
            path.write_bytes(rng.randbytes(512) * (SIZE // 512))
        elif kind == 1:
            data = path.with_name(f"data{number}")
            make(path, "qcow2", SIZE, {**options, "data_file": str(data), "data_file_raw": True})
            self.images.append(data)
            self.formats[data] = "raw"
        elif self.images and rng.randrange(4):
            base = rng.choice(self.images)
            make(path, "qcow2", options=options, backing=self.name(path, base), backing_format=self.format(base))
        else:
            make(path, "qcow2", SIZE, options)
        self.images.append(path)
        with cowhand.open(path, writable=True, format=self.formats[path]) as disk:
            self.scribble(disk)
            for snapshot in range(rng.choice((0, 0, 0, 1, 2)) if kind > 1 else 0):
                cowhand.create_snapshot(disk, f"s{snapshot}")
                self.scribble(disk)

    def scribble(self, disk: cowhand.Disk) -> None:
        for _ in range(self.rng.randrange(3)):
            at = self.rng.randrange(disk.size // CLUSTER) * CLUSTER
            disk.write(at, self.rng.randbytes(16) * (CLUSTER // 16))

    def shown(self) -> Shown:
        found: Shown = {}
        for path in (*self.images, *self.links):
            try:
                with cowhand.open(path, format=self.format(path)) as disk:
                    found[str(path), None] = disk.read(0, disk.size)
                    if disk.format == "raw":
                        continue
                    for one in cowhand.list_snapshots(disk):
                        with cowhand.open_snapshot(disk, one.id) as view:
                            found[str(path), one.name] = view.read(0, view.size)
            except cowhand.CowhandError:
                found[str(path), None] = None
        return found

    def step(self, verb: Callable[[World, Path], bool]) -> None:
        """Do *verb* to some image; of that one the active content may change, and with a true answer its snapshots may, too."""
        path = self.rng.choice(self.images)
        before, files = self.shown(), own_files(path)
        whole = False
        try:
            whole = verb(self, path)
            self.done += 1
        except cowhand.CowhandError as error:
            self.refused += error.exit_code == 9 or isinstance(error, cowhand.errors.ChainLoop)
        after = self.shown()
        # Its data file is the image's own, and so is one that it was given.
        own_ones = (
            files | own_files(path) if self.changed is None else {identify(self.changed)} | own_files(self.changed)
        )
        for (name, snapshot), content in before.items():
            own = identify(name) in own_ones
            if content is None or (own and (snapshot is None or whole)):
                continue
            now = after.get((name, snapshot))
            assert now == content, f"{verb.__name__} of {path} changed what {name}, snapshot {snapshot}, shows"
        for image in self.images:
            assert not is_loop(image, self.format(image))
        self.changed = None

    changed: Path | None = None


def own_files(path: Path) -> set[Identity | None]:
    """Return the identities of *path* and of its data file."""
    if not path.exists():
        return set()
    links = read_links(str(path), REGISTRY).links
    return {identify(path), *(identify(link.name) for link in links if link.role == DATA_FILE)}


def is_loop(path: Path, format: str) -> bool:
    try:
        return "comes back" in cowhand.chain_info(path, format=format)[-1].problem
    except cowhand.CowhandError:
        return False  # of an image whose data file was another's


def commit(world: World, path: Path) -> bool:
    chain = cowhand.chain_info(path, format=world.format(path))
    if len(chain) < 2 or chain[-1].problem:
        return False
    depth = world.rng.randrange(1, len(chain)) if world.rng.randrange(3) == 0 else 1
    world.changed = Path(chain[depth].filename)
    base = chain[depth].filename if depth > 1 else None
    drop = bool(world.rng.randrange(3) == 0)
    if world.rng.randrange(2):
        words = [*(["-b", base] if base else []), *(["-d"] if drop else [])]
        in_process("commit", "-q", *words, str(path))
    else:
        cowhand.commit(path, base, drop=drop)
    return False


def rebase(world: World, path: Path) -> bool:
    rng = world.rng
    other = rng.choice(world.images)
    format = world.format(other)
    name = rng.choice(("", world.name(path, other)))
    unsafe = bool(rng.randrange(2))
    if not unsafe:
        world.changed = Path("/nothing changes")
    if rng.randrange(2):
        words = ["-u"] if unsafe else []
        in_process("rebase", "-q", "-U", *words, "-b", name, *(["-F", format] if name else []), str(path))
    else:
        cowhand.rebase(path, name, format if name else None, unsafe=unsafe, force_share=True)
    return False


def resize(world: World, path: Path) -> bool:
    size = world.rng.randrange(1, 2 * SIZE // 512) * 512
    format = world.format(path)
    if world.rng.randrange(2):
        in_process("resize", "-q", "-f", format, "--shrink", str(path), str(size))
    else:
        with cowhand.open(path, writable=True, format=format) as disk:
            disk.resize(size, shrink=True)
    return False


def snapshot(world: World, path: Path) -> bool:
    if world.format(path) == "raw":
        return False
    with cowhand.open(path, writable=True) as disk:
        known = [one.name for one in cowhand.list_snapshots(disk)]
        if not known:
            return False
        name = world.rng.choice(known)
        if world.rng.randrange(2):
            cowhand.apply_snapshot(disk, name)
            return False
    in_process("snapshot", "apply", "-q", str(path), name)
    return False


def write_in_place(world: World, path: Path) -> bool:
    source = world.rng.choice(world.images)
    formats = world.format(source), world.format(path)
    if world.rng.randrange(2):
        in_process("convert", "-q", "-n", "-f", formats[0], "-O", formats[1], str(source), str(path))
    else:
        cowhand.convert(source, path, formats[1], source_format=formats[0], skip_create=True)
    return False


def overwrite(world: World, path: Path) -> bool:
    rng = world.rng
    source = rng.choice(world.images)
    format = world.format(source)
    kind = rng.randrange(6)
    if kind < 2:
        made = world.format(path)
        if kind == 0:
            in_process("convert", "-q", "--overwrite", "-f", format, "-O", made, str(source), str(path))
        else:
            cowhand.dd(source, path, made, source_format=format, block_size=4096, count=3, overwrite=True)
        return True
    if world.format(path) == "raw":
        return False
    name = world.name(path, source)
    match kind:
        case 2:
            cowhand.create(path, "qcow2", backing=name, backing_format=format, overwrite=True)
        case 3:
            words = ["create", "-q", "--overwrite", "-f", "qcow2", "-u", "-F", format, "-b", name]
            in_process(*words, str(path), "64k")
        case 4:
            options = {"data_file": str(source), "data_file_raw": True}
            cowhand.create(path, "qcow2", SIZE, options, overwrite=True)
        case _:
            cowhand.convert(
                source, path, "qcow2", source_format=format, backing=name, backing_format=format, overwrite=True
            )
    return True


def others(world: World, path: Path) -> bool:
    """Do what changes nothing that is shown."""
    world.changed = Path("/nothing changes")
    if world.format(path) == "raw":
        return False
    match world.rng.randrange(3):
        case 0:
            cowhand.compact(path)
        case 1:
            cowhand.check(path, repair="all")
        case _:
            with cowhand.open(path, writable=True) as disk:
                cowhand.create_snapshot(disk, "more")
                cowhand.delete_snapshot(disk, "more")
    return False


VERBS = (commit, commit, commit, rebase, rebase, resize, snapshot, write_in_place, overwrite, others)


@pytest.mark.parametrize("run", range(RUNS))
def test_nothing_that_others_show_is_changed(
    tmp_path: Path, rng: random.Random, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COWHAND_POOLS", "")
    world = World(tmp_path / "world", rng)
    for _ in range(STEPS):
        world.step(rng.choice(VERBS))
    assert world.done + world.refused
