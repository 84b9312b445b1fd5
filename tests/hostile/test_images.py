"""Whatever an image says: an answer or an error of ours, soon, in little memory, and without touching what the user did not name.

Each image is described, opened (also as a stranger's), mapped, read, checked, and opened for writing, written, zeroed, discarded, snapshotted, grown;
see ``treatment``. COWHAND_MUTATIONS says how many random images there are, COWHAND_SEED gives others.
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import pytest

from tests.hostile import bitmaps, cases, chains, encryption, faults, large, layout, lies, pool, walk

_SHORT = 1500
MUTATIONS = int(os.environ.get("COWHAND_MUTATIONS", str(_SHORT)))
_FIRST = int(os.environ.get("COWHAND_SEED", "0")) * 1_000_000
_AT_ONCE = 300

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux's /proc"
)


class TestTheWatch:
    """The tests below prove something only if these pass."""

    @pytest.mark.parametrize("name", faults.FAULTS)
    def test_it_sees_what_must_not_happen(self, name: str, tmp_path: Path) -> None:
        answers = pool.run([f"fault/{name}", "sound/9"], tmp_path)
        assert name in answers[0]["failure"]
        assert answers[1]["failure"] is None

    @pytest.mark.parametrize("bits", [9, 12, 16])
    def test_sound_images_are_accepted_in_every_step(self, bits: int, tmp_path: Path) -> None:
        answers = pool.check([f"sound/{bits}", f"sound/{bits}/v2", f"sound/{bits}/backed"], tmp_path)
        refused = [{step for step, code in answer["steps"].items() if code != "ok"} for answer in answers]
        # Version 2 does not say how large its snapshots are; and a stranger's image may have no backing file.
        assert refused == [set(), {"grow"}, {"untrusted"}]

    def test_metadata_is_found_where_it_was_put(self) -> None:
        image = layout.make()
        found = walk.metadata(lambda offset, length: bytes(image.data[offset : offset + length]).ljust(length, b"\0"))
        tables = {offset for name, offset in image.places.items() if not name.startswith(("data", "compressed"))}
        assert {region.begin for region in found} == tables
        assert walk.touched(found, image.places["data 0"], image.cluster) is None
        assert walk.touched(found, image.places["L2 table 1"] + 511, 1) is not None


@pytest.mark.parametrize("version", [2, 3])
def test_every_header_field_at_edge_values(version: int, tmp_path: Path) -> None:
    pool.check((name for name in cases.header_names() if name.startswith(f"header/{version}/")), tmp_path)


@pytest.mark.parametrize("how", ["as it is", "exclusive", "uncounted"])
def test_tables_that_name_one_another_themselves_and_nothing(how: str, tmp_path: Path) -> None:
    pool.check((name for name in cases.pointer_names() if name.endswith(how)), tmp_path)


def test_images_that_end_early(tmp_path: Path) -> None:
    pool.check(cases.truncation_names(), tmp_path)


@pytest.mark.parametrize("kind", ["compressed", "snapshots", "extensions", "names", "features"])
def test_lies(kind: str, tmp_path: Path) -> None:
    pool.check(lies.lie_names(kind), tmp_path)


def test_encryption_headers_that_lie(tmp_path: Path) -> None:
    pool.check(encryption.names(), tmp_path)


def test_bitmaps(tmp_path: Path) -> None:
    pool.check(bitmaps.bitmap_names(), tmp_path)


def test_loops_and_long_chains(tmp_path: Path) -> None:
    pool.check(chains.chain_names(), tmp_path)


def test_images_that_say_they_are_large_or_make_much_out_of_little(tmp_path: Path) -> None:
    # All of them take most of a minute.
    pool.check(large.large_names(few=MUTATIONS <= _SHORT), tmp_path)


@pytest.mark.parametrize("first", range(0, MUTATIONS, _AT_ONCE))
def test_random_mutations(first: int, tmp_path: Path) -> None:
    numbers = range(_FIRST + first, _FIRST + min(MUTATIONS, first + _AT_ONCE))
    answers = pool.check((f"mutation/{number}" for number in numbers), tmp_path)
    accepted = sum(answer["steps"].get("open to write") == "ok" for answer in answers)
    assert accepted > len(numbers) // 20, "hardly any image was good enough to be written: the mutations prove little"


def test_the_names_of_images_are_known() -> None:
    """A name is all that it takes to make an image again."""
    names = [*islice(cases.header_names(), 3), *islice(cases.pointer_names(), 3), *islice(lies.lie_names(), 3)]
    assert len(set(names)) == len(names)
