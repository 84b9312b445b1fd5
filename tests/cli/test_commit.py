"""``cowhand commit``: the base gets the changes, and nobody else who stands on it is harmed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import cowhand
from tests.cli.images import MiB, content, fill, image, snapshot_of
from tests.tools.qemu import assert_clean, require_qemu


@pytest.fixture
def chain(image_dir: Path) -> Path:
    """Return the folder of base ← middle ← top."""
    base = image(image_dir / "base")
    middle = image(image_dir / "middle", backing=base)
    top = image(image_dir / "top", backing=middle)
    fill(base, 0, 3 * MiB, 1)
    fill(middle, MiB, 2 * MiB, 2)
    fill(top, 2 * MiB, MiB, 3)
    return image_dir


@require_qemu
def test_the_base_gets_the_changes_and_the_overlay_is_emptied(chain: Path) -> None:
    before = content(chain / "top")
    document = cowhand("commit", "--output", "json", "top", cwd=chain).json()
    assert document == {
        "filename": "top",
        "base": "middle",
        "copied": MiB,
        "zeroes": 0,
        "base-grown": False,
        "emptied": True,
    }
    assert content(chain / "top") == content(chain / "middle") == before
    assert cowhand("map", "--output", "json", "top", cwd=chain).json()[0]["depth"] > 0
    assert_clean(chain / "middle")
    assert_clean(chain / "top")


def test_down_to_a_named_base(chain: Path) -> None:
    before, middle = content(chain / "top"), content(chain / "middle")
    refused = cowhand("commit", "-b", "base", "top", cwd=chain, status=9).stderr
    assert "would change what middle shows" in refused
    assert content(chain / "middle") == middle
    assert "top is empty" not in cowhand("commit", "--force", "-b", "base", "top", cwd=chain).stdout
    assert content(chain / "base") == before


def test_is_refused_when_another_overlay_would_read_changed_bytes(chain: Path) -> None:
    image(chain / "sibling", backing=chain / "middle")
    before = snapshot_of(chain)
    done = cowhand("commit", "top", cwd=chain, status=9)
    assert "sibling" in done.stderr and "--force" in done.stderr
    error = cowhand("commit", "--output", "json", "top", cwd=chain, status=9).error()
    assert error["code"] == "has-overlays"
    assert snapshot_of(chain) == before
    assert "warning" in cowhand("commit", "--force", "top", cwd=chain).stderr


def test_overlays_of_every_layer_on_the_way_count(chain: Path) -> None:
    image(chain / "sibling", backing=chain / "middle")
    assert "sibling" in cowhand("commit", "-b", "base", "top", cwd=chain, status=9).stderr


def test_overlays_of_the_top_do_not_count(chain: Path) -> None:
    upper = image(chain / "upper", backing=chain / "top")
    before = content(upper)
    cowhand("commit", "top", cwd=chain)
    assert content(upper) == before


def test_other_folders_can_be_looked_in(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    image(elsewhere / "sibling", backing=chain / "middle")
    assert "sibling" in cowhand("commit", "--look-in", elsewhere, "top", cwd=chain, status=9).stderr
    assert "sibling" in cowhand("commit", "top", cwd=chain, status=9, COWHAND_POOLS=f"/absent:{elsewhere}").stderr
    cowhand("commit", "top", cwd=chain)


def test_a_base_in_another_folder_is_looked_around(image_dir: Path) -> None:
    bases = image_dir / "bases"
    bases.mkdir()
    base = image(bases / "base")
    image(bases / "sibling", backing=base)
    image(image_dir / "top", backing=base)
    assert "sibling" in cowhand("commit", "top", cwd=image_dir, status=9).stderr


def test_dry_run_says_who_would_be_harmed(chain: Path) -> None:
    image(chain / "sibling", backing=chain / "middle")
    image(chain / "nephew", backing=chain / "sibling")
    before = snapshot_of(chain)
    plan = cowhand("commit", "--dry-run", "--output", "json", "top", cwd=chain).json()
    assert plan["dependents"] == ["sibling", "nephew"]
    assert plan["moves"] == MiB
    assert [item["path"] for item in plan["writes"]] == ["middle", "top"]
    assert "present content is overwritten" in plan["undo"]
    text = cowhand("commit", "--dry-run", "top", cwd=chain).stdout
    assert "would commit top into middle; nothing was changed" in text
    assert "depends on it: sibling" in text
    assert snapshot_of(chain) == before


def test_what_cannot_be_committed_is_told(chain: Path) -> None:
    assert "has no backing file" in cowhand("commit", "base", cwd=chain, status=1).stderr
    assert "'absent' is not below" in cowhand("commit", "-b", "absent", "top", cwd=chain, status=1).stderr
    (chain / "base").rename(chain / "gone")
    assert "not complete" in cowhand("commit", "top", cwd=chain, status=1).stderr
