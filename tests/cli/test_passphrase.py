"""``cowhand passphrase``: key slots of LUKS volumes and of LUKS in qcow2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import cowhand

QUICK = ("--iter-time", "1")


@pytest.fixture(params=["qcow2", "luks"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for name in ("one", "two", "three"):
        (tmp_path / name).write_text(f"passphrase {name}")
    option = "encrypt.iter-time=1" if request.param == "qcow2" else "iter-time=1"
    path = tmp_path / f"disk.{request.param}"
    cowhand("create", "--encrypt", "--key-file", tmp_path / "one", "-f", request.param, "-o", option, path, "1M")
    return path


def opens(image: Path, name: str) -> bool:
    done = cowhand(
        "checksum", "--key-file", name, image.name, cwd=image.parent, status=0 if name in known(image) else 1
    )
    return not done.status


def known(image: Path) -> list[str]:
    return (image.parent / "known").read_text().split()


def run(image: Path, *words: str, opened_by: str = "", status: int = 0) -> str:
    action, *rest = words
    done = cowhand("passphrase", action, image.name, *rest, cwd=image.parent, status=status)
    (image.parent / "known").write_text(opened_by)
    for name in ("one", "two", "three") if opened_by else ():
        assert opens(image, name) == (name in known(image))
    return done.stdout + done.stderr


def test_the_life_of_a_passphrase(image: Path) -> None:
    run(image, "add", "--key-file", "one", "--new-key-file", "two", *QUICK, opened_by="one two")
    run(image, "change", "--key-file", "one", "--new-key-file", "three", *QUICK, opened_by="two three")
    run(image, "remove", "--key-file", "two", opened_by="three")
    assert "all data" in run(image, "remove", "--key-file", "three", status=1)
    assert "all data" in run(image, "remove", "--slot", "2", "--key-file", "three", opened_by="three", status=1)
    listed = cowhand("passphrase", "list", "--output", "json", image).json()
    assert [one["slot"] for one in listed if one["active"]] == [2]
    assert run(image, "remove", "--force", "--key-file", "three").startswith("removed key slot 2 of ")
    assert not any(one["active"] for one in cowhand("passphrase", "list", "--output", "json", image).json())


def test_what_is_refused_changes_nothing(image: Path) -> None:
    before = image.read_bytes()
    assert "opens none" in run(image, "change", "--key-file", "two", "--new-key-file", "three", status=1)
    assert "is the old one" in run(image, "change", "--key-file", "one", "--new-key-file", "one", status=1)
    assert "is in use" in run(image, "add", "--slot", "0", "--key-file", "one", "--new-key-file", "two", status=1)
    assert "no key slot 8" in run(image, "add", "--slot", "8", "--key-file", "one", "--new-key-file", "two", status=1)
    assert "not in use" in run(image, "remove", "--slot", "3", "--key-file", "one", status=1)
    assert "for add and change" in run(image, "remove", "--new-key-file", "two", "--key-file", "one", status=2)
    assert "last one" in run(image, "remove", "--dry-run")
    assert "no terminal" in run(image, "change", status=1)
    assert image.read_bytes() == before


def test_only_luks_has_them(tmp_path: Path) -> None:
    cowhand("create", tmp_path / "plain.qcow2", "1M")
    assert "not encrypted with LUKS" in cowhand("passphrase", "list", tmp_path / "plain.qcow2", status=1).stderr
