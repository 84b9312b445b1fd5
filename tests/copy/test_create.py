"""Making images: the same file as qemu-img makes, the same refusals, and nothing lost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import cowhand
from cowhand.core.errors import CowhandError, ImageExists, ImageInUse, InvalidArgument, NoSpace
from cowhand.image.create import create, prepare
from cowhand.image.new_file import NewFile, is_unfinished
from tests.copy.images import MIB
from tests.tools.qemu import assert_clean, qemu_img, require_qemu

OPTIONS: list[dict[str, str]] = [
    {},
    {"compat": "0.10", "cluster_size": "1k"},
    {"cluster_size": "512", "refcount_bits": "1"},
    {"cluster_size": "2M", "refcount_bits": "64"},
    {"lazy_refcounts": "on", "compression_type": "zstd"},
    {"preallocation": "metadata"},
    {"preallocation": "metadata", "cluster_size": "4k"},
    {"nocow": "off", "extent_size_hint": "1M"},
]


def arguments(options: dict[str, str]) -> list[str]:
    return [word for name, value in options.items() for word in ("-o", f"{name}={value}")]


@require_qemu
@pytest.mark.interop
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(map("=".join, options.items())) or "default")
@pytest.mark.parametrize("size", [0, 1000, 10 * MIB, 100 * MIB + 512])
def test_a_new_image_is_the_one_that_qemu_makes(image_dir: Path, options: dict[str, str], size: int) -> None:
    ours, theirs = image_dir / "ours", image_dir / "theirs"
    creation = create(ours, "qcow2", size, options, like_qemu=True)
    printed = qemu_img("create", "-f", "qcow2", *arguments(options), theirs, str(size)).stdout.rstrip()
    assert creation.line().replace("ours", "theirs") == printed
    assert ours.read_bytes() == theirs.read_bytes()
    assert_clean(ours)


@require_qemu
@pytest.mark.interop
@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_a_new_raw_image_is_the_one_that_qemu_makes(image_dir: Path, preallocation: str) -> None:
    ours, theirs = image_dir / "ours", image_dir / "theirs"
    create(ours, "raw", 3 * MIB + 1, {"preallocation": preallocation})
    qemu_img("create", "-f", "raw", "-o", f"preallocation={preallocation}", theirs, str(3 * MIB + 1))
    assert ours.read_bytes() == theirs.read_bytes()
    # Of an empty one QEMU writes the first block, to ask it for its alignment later.
    assert theirs.stat().st_blocks - 8 <= ours.stat().st_blocks <= theirs.stat().st_blocks


@require_qemu
@pytest.mark.interop
def test_an_overlay_takes_size_and_format_from_what_it_is_given(image_dir: Path) -> None:
    create(image_dir / "base.raw", "raw", 3 * MIB)
    made = create(image_dir / "top", "qcow2", backing="base.raw", backing_format="raw", like_qemu=True)
    assert made.size == 3 * MIB
    qemu_img("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", image_dir / "theirs")
    assert (image_dir / "top").read_bytes() == (image_dir / "theirs").read_bytes()
    with cowhand.open(image_dir / "top") as disk:
        assert disk.root.backing is not None


REFUSALS: list[tuple[list[str], dict[str, object]]] = [
    (["-f", "nothing", "x", "1M"], {"format": "nothing", "size": "1M"}),
    (["-f", "qcow2", "x"], {"format": "qcow2"}),
    (["-f", "qcow2", "-o", "foo=bar", "x", "1M"], {"format": "qcow2", "size": "1M", "options": {"foo": "bar"}}),
    (["-f", "qcow2", "-o", "cluster_size=y", "x", "1M"], {"format": "qcow2", "size": "1M", "options": {"cluster_size": "y"}}),
    (["-f", "qcow2", "-o", "lazy_refcounts=x", "x", "1M"], {"format": "qcow2", "size": "1M", "options": {"lazy_refcounts": "x"}}),
    (["-f", "qcow2", "-o", "size=1M", "x", "1M"], {"format": "qcow2", "size": "1M", "options": {"size": "1M"}}),
    (["-f", "qcow2", "-b", "x", "-F", "raw", "x", "1M"], {"format": "qcow2", "size": "1M", "backing": "x", "backing_format": "raw"}),
    (["-f", "qcow2", "-b", "", "x", "1M"], {"format": "qcow2", "size": "1M", "backing": ""}),
    (["-f", "qcow2", "-b", "absent", "-F", "raw", "x"], {"format": "qcow2", "backing": "absent", "backing_format": "raw"}),
    (["-f", "qcow2", "-b", "base.raw", "x"], {"format": "qcow2", "backing": "base.raw"}),
    (["-f", "qcow2", "-u", "-b", "base.raw", "x", "1M"], {"format": "qcow2", "size": "1M", "backing": "base.raw", "open_backing": False}),
    (["-f", "qcow2", "-u", "-b", "y", "-F", "raw", "x"], {"format": "qcow2", "backing": "y", "backing_format": "raw", "open_backing": False}),
    (["-f", "raw", "-b", "base.raw", "-F", "raw", "x", "1M"], {"format": "raw", "size": "1M", "backing": "base.raw", "backing_format": "raw"}),
    (["-f", "raw", "-F", "raw", "x", "1M"], {"format": "raw", "size": "1M", "backing_format": "raw"}),
    (["-f", "blkdebug", "x", "1M"], {"format": "blkdebug", "size": "1M"}),
]  # fmt: skip


@require_qemu
@pytest.mark.interop
@pytest.mark.parametrize(("command", "call"), REFUSALS, ids=[" ".join(command) for command, _ in REFUSALS])
def test_what_is_refused_is_refused_in_qemu_words(
    image_dir: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], call: dict[str, object]
) -> None:
    monkeypatch.chdir(image_dir)
    (image_dir / "base.raw").write_bytes(bytes(MIB))
    theirs = qemu_img("create", *command, check=False)
    assert theirs.status == 1
    with pytest.raises(CowhandError) as caught:
        create("x", **call)  # type: ignore[arg-type]
    assert f"qemu-img: x: {caught.value.qemu()}" == theirs.stderr.rstrip("\n")
    assert not (image_dir / "x").exists()


def test_an_existing_image_is_left_alone(image_dir: Path, rng: random.Random) -> None:
    path = image_dir / "x"
    before = rng.randbytes(1000)
    path.write_bytes(before)
    with pytest.raises(ImageExists):
        create(path, "qcow2", MIB)
    assert path.read_bytes() == before


def test_an_image_in_use_is_not_overwritten(image_dir: Path) -> None:
    path = image_dir / "x"
    create(path, "qcow2", MIB)
    before = path.read_bytes()
    with cowhand.open(path, writable=True), pytest.raises(ImageInUse):
        create(path, "qcow2", 2 * MIB, overwrite=True)
    assert path.read_bytes() == before


def test_a_refused_option_leaves_an_existing_image_as_it_is(image_dir: Path) -> None:
    path = image_dir / "x"
    create(path, "qcow2", MIB)
    before = path.read_bytes()
    with pytest.raises(InvalidArgument):
        prepare(path, "qcow2", MIB, {"cluster_size": "nonsense"})
    assert path.read_bytes() == before


def test_a_failure_leaves_no_file(image_dir: Path) -> None:
    with pytest.raises(CowhandError):
        create(image_dir / "x", "qcow2", MIB, {"cluster_size": 3})
    with pytest.raises(NoSpace):
        create(image_dir / "y", "raw", 8 << 40, {"preallocation": "falloc"})
    assert list(image_dir.iterdir()) == []


# -- names


def test_a_new_file_has_a_recognisable_name_until_it_appears(image_dir: Path) -> None:
    path = image_dir / ("n" * 255)
    with NewFile(str(path)) as file:
        temporary = Path(file.temporary)
        assert is_unfinished(file.temporary)
        assert temporary.parent == image_dir
        temporary.write_bytes(b"content")
        file.appear(durable=True)
    assert path.read_bytes() == b"content"
    assert [entry.name for entry in image_dir.iterdir()] == [path.name]


def test_an_unfinished_file_is_removed(image_dir: Path) -> None:
    with NewFile(str(image_dir / "x")) as file:
        Path(file.temporary).write_bytes(b"half")
    assert list(image_dir.iterdir()) == []


def test_errors_tell_of_the_name_that_the_user_knows(image_dir: Path) -> None:
    path = image_dir / "x"
    file = NewFile(str(path))
    error = file.rename_in(
        CowhandError(f"could not write '{file.temporary}'", path=file.temporary).within(f"of {file.temporary}")
    )
    assert error.path == str(path)
    assert str(error) == f"could not write '{path}' (of {path})"


def test_without_links_a_rename_does_it_and_replaces_nothing(image_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: str) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr("os.link", refuse)
    with NewFile(str(image_dir / "x")) as file:
        Path(file.temporary).write_bytes(b"new")
        file.appear()
    with NewFile(str(image_dir / "y")) as file:
        Path(file.temporary).write_bytes(b"new")
        (image_dir / "y").write_bytes(b"old")
        with pytest.raises(ImageExists):
            file.appear()
    assert (image_dir / "x").read_bytes() == b"new"
    assert (image_dir / "y").read_bytes() == b"old"
    assert len(list(image_dir.iterdir())) == 2
