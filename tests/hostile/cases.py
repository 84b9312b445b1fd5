"""The hostile images by name: ``kind/...``. Each is made anew, the same each time, in a folder of its own."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.hostile.layout import COPIED, FIELDS, Image, make

BASE_NAME = "base.raw"


@dataclass
class Subject:
    """An image to treat. ``base`` is the content of the backing file that it is opened over for writing, None for none.

    ``refused``: steps that must end in an error; ``accepted``: those that must not. ``writes``: whether it is opened for writing at all.
    ``repairs``: it is repaired, where it is, after that. ``verbs``: all verbs of the tools are run on copies of it, which come first.
    ``also``: something to do while the image is watched, by which the tests try the watch itself.
    ``large``: it is changed where it is, not over a recording medium in memory, which would itself take the memory that is measured.
    """

    path: Path
    base: bytes | None = None
    refused: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    writes: bool = True
    large: bool = False
    repairs: bool = False
    verbs: bool = False
    also: Callable[[], None] | None = None


Maker = Callable[[str, Path], Subject]
_makers: dict[str, Maker] = {}


def maker(kind: str) -> Callable[[Maker], Maker]:
    """Register a function that makes the images called ``kind/...`` (it is given the rest of the name and a folder)."""

    def register(function: Maker) -> Maker:
        _makers[kind] = function
        return function

    return register


def build(name: str, folder: Path) -> Subject:
    """Make the image of that name in *folder*."""
    for module in ("bitmaps", "chains", "encryption", "faults", "large", "lies", "wide"):
        importlib.import_module(f"tests.hostile.{module}")  # they register their makers
    kind, _, rest = name.partition("/")
    return _makers[kind](rest, folder)


def save(image: Image, folder: Path, *, base: bool = False) -> Subject:
    """Write *image* to *folder*, with its backing file where *base* asks for one."""
    path = folder / "image.qcow2"
    path.write_bytes(image.data)
    content = None
    if base:
        content = bytes(range(256)) * 96
        (folder / BASE_NAME).write_bytes(content)
    return Subject(path, content, large=image.cluster_bits > 16)


# -- sound images: everything must be accepted, or the other tests prove nothing


@maker("sound")
def _sound(rest: str, folder: Path) -> Subject:
    bits, _, flavour = rest.partition("/")
    image = make(int(bits), version=2 if flavour == "v2" else 3, backing=BASE_NAME if flavour == "backed" else None)
    return save(image, folder, base=flavour == "backed")


# -- header fields

_EDGES = (
    0, 1, 2, 3, 7, 8, 9, 15, 16, 21, 22, 31, 63, 64, 511, 512, 513, 1 << 15, 1 << 16, 1 << 20, (1 << 22) + 1, (1 << 31) - 1, 1 << 31,
    (1 << 32) - 1, 1 << 40, 1 << 53, (1 << 56) - 512, 1 << 56, 1 << 60, 1 << 62, (1 << 63) - 512, (1 << 63) - 1, 1 << 63, (1 << 64) - 512,
    (1 << 64) - 1,
)  # fmt: skip


def header_names() -> Iterator[str]:
    """Yield the names of images with one header field at an edge value, versions 2 and 3."""
    for version in (2, 3):
        for name, (offset, width) in FIELDS.items():
            if offset >= 72 and version == 2:
                continue
            whole = make(version=version, backing=BASE_NAME)
            now = whole.get(name)
            near = {now - 1, now + 1, now + 8, now + 512, now * 2, len(whole.data), len(whole.data) - 512, now ^ 512}
            for value in sorted({v & ((1 << 8 * width) - 1) for v in (*_EDGES, *near)}):
                yield f"header/{version}/{name}/{value:#x}"


@maker("header")
def _header(rest: str, folder: Path) -> Subject:
    version, name, value = rest.split("/")
    image = make(version=int(version), backing=BASE_NAME)
    image.set(name, int(value, 0))
    return save(image, folder, base=True)


# -- pointers that name something else


def _targets(image: Image) -> dict[str, int]:
    places = {name: offset for name, offset in image.places.items() if not name.startswith("data") or name == "data 2"}
    end = len(image.data)
    return places | {
        "the end": end, "behind the end": end + (1 << 20), "far behind": 1 << 40, "the last offset": (1 << 56) - image.cluster,
        "an unaligned place": image.places["data 2"] + image.cluster // 2, "nothing": 0,
    }  # fmt: skip


def pointer_names() -> Iterator[str]:
    """Yield the names of images in which one pointer names another structure, itself, or what does not exist."""
    image = make()
    for slot in image.slots:
        for target in _targets(image):
            for how in ("as it is", "exclusive", "uncounted"):
                yield f"pointer/{slot}/{target}/{how}"


@maker("pointer")
def _pointer(rest: str, folder: Path) -> Subject:
    slot, name, how = rest.split("/")
    image = make()
    target = _targets(image)[name]
    flags = image.slots[slot].flags
    if how == "exclusive" and slot.endswith("entry") and "refcount" not in slot:
        flags |= COPIED
    image.point(slot, target, flags=flags)
    if how != "as it is" and target < len(image.data):
        image.set_count(target - target % image.cluster, 1 if how == "exclusive" else 0)
    return save(image, folder)


# -- truncation


def truncation_names() -> Iterator[str]:
    """Yield the names of sound images that end early, at every 512 bytes and just beside some of them."""
    for bits in (9, 12):
        length = len(make(bits).data)
        for end in range(0, length, 512):
            yield f"truncation/{bits}/{end}"
        for end in (1, 4, 8, 71, 72, 73, 103, 104, 105, 111, 112, 113, length - 1):
            yield f"truncation/{bits}/{end}"


@maker("truncation")
def _truncation(rest: str, folder: Path) -> Subject:
    bits, end = rest.split("/")
    image = make(int(bits))
    del image.data[int(end) :]
    subject = save(image, folder)
    if int(end) < 104:
        # Too short to be a header: without its magic it is a raw file, with it an error.
        subject.refused = ["open to write"]
    return subject


# -- random mutations


@maker("mutation")
def _mutation(rest: str, folder: Path) -> Subject:
    rng = random.Random(f"hostile {rest}")
    backed = rng.random() < 0.4
    image = (
        make(rng.choice((9, 9, 9, 12)), version=rng.choice((2, 3, 3)), order=4, backing=BASE_NAME if backed else None)
        if rng.random() < 0.7
        else make(9, order=rng.choice((1, 2, 3, 5, 6)), backing=BASE_NAME if backed else None)
    )
    for _ in range(rng.choice((1, 1, 2, 3, 5, 9, 20))):
        _mutate(image, rng)
    return save(image, folder, base=backed)


def _mutate(image: Image, rng: random.Random) -> None:
    if not image.data:
        return
    place = _somewhere(image, rng)
    kind = rng.randrange(8)
    if kind == 0:
        image.data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        image.data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif kind == 2:
        image.put(place, rng.randbytes(rng.choice((1, 2, 4, 8, 24))))
    elif kind == 3:
        value = rng.choice(list(image.places.values())) | rng.choice((0, COPIED, COPIED, 1, 1 << 62))
        image.put_words(place & ~7, value)
    elif kind == 4:
        image.put_words(place & ~7, rng.choice(_EDGES))
    elif kind == 5:
        source = _somewhere(image, rng)
        image.put(place, bytes(image.data[source : source + rng.choice((8, 16, 64, image.cluster))]))
    elif kind == 6:
        image.point(rng.choice(list(image.slots)), rng.choice(list(image.places.values())))
    elif rng.random() < 0.3:
        del image.data[rng.randrange(len(image.data)) :]
    else:
        image.put(place, bytes(rng.choice((4, 8, 64))))


def _somewhere(image: Image, rng: random.Random) -> int:
    """Return an offset: mostly in the header or in a table, since nobody reads structure from data."""
    limit = len(image.data)
    if rng.random() < 0.35:
        return rng.randrange(min(112, limit))
    if rng.random() < 0.8:
        tables = [offset for name, offset in image.places.items() if "table" in name or "block" in name]
        return min(limit - 1, rng.choice(tables) + rng.randrange(min(image.cluster, 128)))
    return rng.randrange(limit)
