"""Measuring: the figures of qemu-img measure, to the byte."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cowhand.copy.ops.convert import convert
from cowhand.copy.ops.measure import Measurement, measure
from cowhand.core.errors import InvalidArgument
from cowhand.image.create import create
from tests.copy.images import MIB, content, sparse_file
from tests.tools.qemu import qemu_img, qemu_io, require_qemu

pytestmark = [require_qemu, pytest.mark.interop]

SIZES = [0, 1, 512, 65536, 1000 * 1000, 64 * MIB + 512, 1 << 33, (1 << 40) + 12345, 1 << 46]


def theirs(*arguments: str | Path) -> Measurement:
    document = qemu_img("measure", "--output=json", *arguments).json()
    return Measurement(document["required"], document["fully-allocated"], document.get("bitmaps"))


def given(options: dict[str, str]) -> list[str]:
    return ["-o", ",".join(f"{name}={value}" for name, value in options.items())] if options else []


@pytest.mark.parametrize("cluster", ["512", "4k", "64k", "2M"])
@pytest.mark.parametrize("bits", ["1", "8", "16", "64"])
def test_of_a_size(cluster: str, bits: str) -> None:
    for size in SIZES:
        options = {"cluster_size": cluster, "refcount_bits": bits}
        answer = qemu_img("measure", "-O", "qcow2", *given(options), "--size", str(size), check=False)
        if answer.status:
            with pytest.raises(InvalidArgument) as caught:
                measure(target_format="qcow2", size=size, options=options)
            assert f"qemu-img: {caught.value.qemu()}\n" == answer.stderr
            continue
        assert measure(target_format="qcow2", size=size, options=options) == theirs(
            "-O", "qcow2", *given(options), "--size", str(size)
        )


@pytest.mark.parametrize(
    "options",
    [
        {"preallocation": "metadata"},
        {"preallocation": "full", "cluster_size": "4k"},
        {"preallocation": "falloc"},
        {"compat": "0.10"},
        {"backing_file": "x"},
        {"extended_l2": "on"},
        {"extended_l2": "on", "cluster_size": "16k"},
        {"size": "3M"},
    ],
    ids=lambda options: ",".join(map("=".join, options.items())),
)
def test_of_options(options: dict[str, str], image_dir: Path, rng: random.Random) -> None:
    raw = sparse_file(image_dir / "raw", content(rng, 3 * MIB + 512, 8))
    if "size" not in options:
        for size in SIZES[2:-1]:
            assert measure(target_format="qcow2", size=size, options=options) == theirs(
                "-O", "qcow2", *given(options), "--size", str(size)
            )
    assert measure(raw, "qcow2", source_format="raw", options=options) == theirs(
        "-O", "qcow2", "-f", "raw", *given(options), raw
    )


WRONG: list[dict[str, str]] = [
    {"cluster_size": "100"},
    {"refcount_bits": "3"},
    {"compat": "9"},
    {"compat": "0.10", "refcount_bits": "8"},
    {"nonsense": "1"},
    {"preallocation": "some"},
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda options: ",".join(map("=".join, options.items())))
def test_wrong_options_are_refused_in_qemu_words(wrong: dict[str, str]) -> None:
    answer = qemu_img("measure", "-O", "qcow2", *given(wrong), "--size", "1M", check=False)
    with pytest.raises(InvalidArgument) as caught:
        measure(target_format="qcow2", size="1M", options=wrong)
    # QEMU reports the two parts one by one, each with its name.
    assert "".join(f"qemu-img: {line}\n" for line in caught.value.qemu().split("\n")) == answer.stderr


@pytest.mark.parametrize("cluster", ["512", "64k", "1M"])
@pytest.mark.parametrize("target", ["512", "4k", "64k", "2M"])
def test_of_what_an_image_holds(image_dir: Path, rng: random.Random, cluster: str, target: str) -> None:
    raw = sparse_file(image_dir / "raw", content(rng, 5 * MIB + 512, 15))
    base, top = image_dir / "base", image_dir / "top"
    convert(raw, base, "qcow2", source_format="raw", options={"cluster_size": cluster}, compressed=rng.random() < 0.5)
    create(top, "qcow2", 6 * MIB, {"cluster_size": "4k"}, backing=str(base), backing_format="qcow2")
    qemu_io(top, "write 1M 100k", "write -z 2M 70k", "discard 3M 1M", format="qcow2")
    for image, format in ((raw, "raw"), (base, "qcow2"), (top, "qcow2")):
        options = {"cluster_size": target}
        assert measure(image, "qcow2", source_format=format, options=options) == theirs(
            "-O", "qcow2", "-f", format, *given(options), image
        )
        assert measure(image, "raw", source_format=format) == theirs("-O", "raw", "-f", format, image)


def test_bitmaps_are_counted(image_dir: Path) -> None:
    image = image_dir / "x"
    qemu_img("create", "-f", "qcow2", image, "100M")
    qemu_img("bitmap", "--add", image, "first")
    qemu_img("bitmap", "--add", "-g", "4k", image, "a second one")
    for cluster in ("512", "64k"):
        options = {"cluster_size": cluster}
        assert measure(image, "qcow2", options=options) == theirs("-O", "qcow2", *given(options), image)
    assert measure(image, "qcow2", options={"compat": "0.10"}) == theirs("-O", "qcow2", "-o", "compat=0.10", image)


def test_of_a_snapshot(image_dir: Path) -> None:
    image = image_dir / "x"
    qemu_img("create", "-f", "qcow2", image, "10M")
    qemu_io(image, "write 0 1M", format="qcow2")
    qemu_img("snapshot", "-c", "then", image)
    qemu_io(image, "write 5M 3M", format="qcow2")
    assert measure(image, "qcow2", snapshot="then") == theirs("-O", "qcow2", "-l", "then", image)
    assert measure(image, "qcow2") == theirs("-O", "qcow2", image)


def test_a_full_image_has_the_size_that_was_measured(image_dir: Path, rng: random.Random) -> None:
    raw = image_dir / "raw"
    raw.write_bytes(rng.randbytes(3 * MIB))
    for options in ({}, {"cluster_size": "512"}, {"cluster_size": "4k", "refcount_bits": "64"}):
        target = image_dir / f"x{len(options)}"
        convert(raw, target, "qcow2", source_format="raw", options=options)
        assert target.stat().st_size <= measure(raw, "qcow2", source_format="raw", options=options).required
