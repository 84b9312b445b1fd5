"""``cowhand info``: one image, chains, broken chains, pictures."""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree

import pytest

import cowhand as library
from cowhand.block.opening.policy import UNTRUSTED
from cowhand.image.info import chain_info
from tests.cli.command import cowhand
from tests.cli.images import MiB, fill, image


@pytest.fixture
def chain(image_dir: Path) -> Path:
    """Return the folder of base ← middle ← top, and of another overlay of base."""
    base = image(image_dir / "base")
    middle = image(image_dir / "middle", backing=base)
    image(image_dir / "top", backing=middle)
    image(image_dir / "other", backing=base)
    fill(base, 0, MiB, 1)
    fill(middle, MiB, MiB, 2)
    fill(image_dir / "top", 2 * MiB, MiB, 3)
    return image_dir


def test_text_is_aligned_facts(chain: Path) -> None:
    lines = cowhand("info", "top", cwd=chain).stdout.splitlines()
    assert lines[0] == "image:        top"
    assert "format:       qcow2 (compat 1.1)" in lines
    assert "disk size:    8 MiB (8388608 bytes)" in lines
    assert "backing file: middle (qcow2)" in lines


def test_json_has_the_keys_of_qemu_img(chain: Path) -> None:
    document = cowhand("info", "--output", "json", "top", cwd=chain).json()
    assert document["virtual-size"] == 8 * MiB
    assert document["actual-size"] == os.stat(chain / "top").st_blocks * 512
    assert document["cluster-size"] == 65536
    assert document["backing-filename"] == "middle"
    assert document["backing-filename-format"] == "qcow2"
    assert document["dirty-flag"] is False
    assert document["format-specific"]["data"]["compat"] == "1.1"


def test_chain_names_every_layer_and_the_other_overlays(chain: Path) -> None:
    documents = cowhand("info", "--chain", "--output", "json", "top", cwd=chain).json()
    assert [os.path.basename(item["filename"]) for item in documents] == ["top", "middle", "base"]
    assert [[os.path.basename(name) for name in item["other-overlays"]] for item in documents] == [[], [], ["other"]]
    text = cowhand("info", "--chain", "top", cwd=chain).stdout
    assert text.count("image:") == 3
    assert "overlays:     other" in text


def test_a_missing_base_is_told_after_what_is_there(chain: Path) -> None:
    (chain / "base").unlink()
    done = cowhand("info", "--chain", "top", cwd=chain, status=1)
    assert done.stdout.count("format:") == 2
    assert "problem: " in done.stdout
    document = cowhand("info", "--chain", "--output", "json", "top", cwd=chain, status=1).json()[-1]
    assert (document["filename"], "problem" in document) == ("base", True)
    assert "backing file:" in cowhand("info", "middle", cwd=chain).stdout


def test_a_loop_ends(image_dir: Path) -> None:
    image(image_dir / "a")
    image(image_dir / "b", backing=image_dir / "a")
    (image_dir / "a").unlink()
    (image_dir / "b").rename(image_dir / "a")
    assert "comes back to this file" in cowhand("info", "--chain", "a", cwd=image_dir, status=1).stdout


def test_an_untrusted_image_gets_nothing_opened(chain: Path) -> None:
    found = chain_info(chain / "top", policy=UNTRUSTED)
    assert len(found) == 2
    assert "not opened" in found[1].problem


def test_an_image_in_use_is_described_all_the_same(chain: Path) -> None:
    with library.open(chain / "top", writable=True):
        assert "in use:" in cowhand("info", "top", cwd=chain).stdout
        assert cowhand("info", "--output", "json", "top", cwd=chain).json()["in-use"] is True
    assert cowhand("info", "--output", "json", "top", cwd=chain).json()["in-use"] is False


def test_picture_of_the_chain(chain: Path) -> None:
    done = cowhand("info", "--chain", "--svg", "chain.svg", "top", cwd=chain)
    assert done.stdout == "wrote chain.svg\n"
    root = ElementTree.parse(chain / "chain.svg").getroot()
    text = "".join(root.itertext())
    assert all(word in text for word in ("top", "middle", "base", "other", "1 MiB (12 %) seen from the top"))
    cowhand("info", "--svg", "chain.svg", "top", cwd=chain)


def test_picture_of_a_broken_chain(chain: Path) -> None:
    (chain / "base").unlink()
    done = cowhand("info", "--chain", "--svg", "-", "top", cwd=chain, status=1)
    assert "No such file" in "".join(ElementTree.fromstring(done.stdout).itertext())


def test_a_picture_never_replaces_an_image(chain: Path) -> None:
    before = (chain / "base").read_bytes()
    assert "is not a picture" in cowhand("info", "--svg", "base", "top", cwd=chain, status=1).stderr
    assert (chain / "base").read_bytes() == before


def test_broken_images_are_told_with_offset(image_dir: Path) -> None:
    path = image(image_dir / "a")
    data = bytearray(path.read_bytes())
    data[20:24] = b"\0\0\0\x40"
    path.write_bytes(data)
    error = cowhand("info", "--output", "json", "a", cwd=image_dir, status=4).error()
    assert (error["code"], error["path"], error["offset"]) == ("invalid-format", "a", 20)
    assert "offset 0x14" in cowhand("info", "a", cwd=image_dir, status=4).stderr


def test_absent_images(image_dir: Path) -> None:
    done = cowhand("info", "absent", cwd=image_dir, status=1)
    assert "absent" in done.stderr and "No such file or directory" in done.stderr


def test_names_with_escape_sequences_do_not_reach_the_terminal(image_dir: Path) -> None:
    image(image_dir / "a\x1b[31m")
    done = cowhand("info", "a\x1b[31m", cwd=image_dir)
    assert "\x1b" not in done.stdout
    assert "a\\x1b[31m" in done.stdout


def test_names_cannot_pretend_to_be_lines(image_dir: Path) -> None:
    image(image_dir / "a\nformat: raw")
    done = cowhand("info", "a\nformat: raw", cwd=image_dir)
    assert done.stdout.startswith("image:        ./a\\x0aformat: raw\n")


def test_on_a_terminal_there_is_colour(chain: Path) -> None:
    assert "\x1b[" in cowhand("info", "top", cwd=chain, FORCE_COLOR="1", TERM="xterm-256color").stdout
