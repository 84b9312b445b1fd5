"""Pictures are well-formed, true to scale, and legible whatever names images have."""

from __future__ import annotations

import random
import re
from xml.etree import ElementTree

import pytest

from cowhand.cli.pictures import chain, disk
from cowhand.cli.pictures.chain import LayerDrawing
from cowhand.cli.pictures.raster import NOTHING, ZEROES, Kind, Raster, in_order
from cowhand.core.extents import ALLOCATED, COMPRESSED, DATA, OFFSET, ZERO, ExtentBatch

SVG = "{http://www.w3.org/2000/svg}"
MiB = 1 << 20
HERE = DATA | ALLOCATED | OFFSET


def batch(*rows: tuple[int, int, int, int]) -> ExtentBatch:
    """Return a batch of (start, length, flags, depth)."""
    out = ExtentBatch()
    for start, length, flags, depth in rows:
        out.add(start, length, flags, start, None, depth)
    return out


def drawn(text: str) -> ElementTree.Element:
    """Parse a picture; it must be well-formed."""
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    return root


def spaces(root: ElementTree.Element, label: str) -> list[ElementTree.Element]:
    """Return the rectangles whose hover text contains *label*."""
    return [rect for rect in root.iter(f"{SVG}rect") if label in (rect.findtext(f"{SVG}title") or "")]


def area(rects: list[ElementTree.Element]) -> float:
    return sum(float(rect.attrib["width"]) * float(rect.attrib["height"]) for rect in rects)


class TestRaster:
    def test_counts_every_byte_once(self, rng: random.Random) -> None:
        for _ in range(50):
            size = rng.randrange(1, 1 << 20)
            raster = Raster(size, rng.randrange(1, 300))
            position = 0
            expected: dict[Kind, int] = {}
            while position < size:
                length = min(size - position, rng.randrange(1, 1 << rng.randrange(1, 20)))
                kind = rng.choice([Kind("data"), Kind("data", 1), ZEROES, NOTHING])
                raster.add(position, length, kind)
                expected[kind] = expected.get(kind, 0) + length
                position += length
            assert raster.totals == expected
            assert [sum(cell.values()) for cell in raster.cells] == [
                raster.begin_of(index + 1) - raster.begin_of(index) for index in range(len(raster.cells))
            ]

    def test_leaves_out_what_lies_behind_the_end(self) -> None:
        raster = Raster(100, 3)
        raster.add(90, 1000, Kind("data"))
        raster.add(200, 10, Kind("data"))
        assert raster.totals == {Kind("data"): 10}

    def test_tells_kinds_apart(self) -> None:
        rows = batch(
            (0, 10, HERE, 0),
            (10, 10, DATA | ALLOCATED | COMPRESSED, 2),
            (20, 10, ZERO | ALLOCATED, 1),
            (30, 10, ZERO, 1),
        )
        totals = Raster(40, 1).add_batches([rows]).totals
        assert totals == {Kind("data", 0): 10, Kind("compressed", 2): 10, ZEROES: 10, NOTHING: 10}

    def test_orders_legends_from_the_active_layer_down(self) -> None:
        kinds = [NOTHING, ZEROES, Kind("compressed", 1), Kind("data", 1), Kind("data", 0)]
        assert in_order(kinds) == [Kind("data", 0), Kind("data", 1), Kind("compressed", 1), ZEROES, NOTHING]


class TestDisk:
    def test_areas_are_in_proportion(self) -> None:
        size = 64 * MiB
        rows = batch((0, size // 4, HERE, 0), (size // 4, size // 8, HERE, 1), (size * 3 // 8, size * 5 // 8, ZERO, 0))
        root = drawn(disk.picture([rows], size, title="x", layers=["top", "base"]))
        top = [rect for rect in spaces(root, "top") if " to " in (rect.findtext(f"{SVG}title") or "")]
        base = [rect for rect in spaces(root, "base") if " to " in (rect.findtext(f"{SVG}title") or "")]
        assert area(top) == pytest.approx(2 * area(base), rel=0.01)
        whole = (disk.WIDTH - 2 * disk.MARGIN - disk.GUTTER) * disk.ROW_HEIGHT * size / disk.row_bytes(size)
        assert area(top) == pytest.approx(whole / 4, rel=0.01)

    def test_rows_begin_at_round_offsets(self) -> None:
        for size in (1, 512, 5 * MiB, 10 << 30, (3 << 40) + 17, (1 << 63) - 512):
            each = disk.row_bytes(size)
            assert each & (each - 1) == 0
            assert -(-size // each) <= disk.MAX_ROWS

    def test_a_single_sector_in_a_huge_disk_is_seen(self) -> None:
        size = 1 << 40
        root = drawn(
            disk.picture([batch((0, 512, HERE, 0), (512, size - 512, ZERO, 0))], size, title="x", layers=["sector"])
        )
        seen = [rect for rect in spaces(root, "sector") if " to " in (rect.findtext(f"{SVG}title") or "")]
        assert len(seen) == 1
        assert float(seen[0].attrib["height"]) >= 1

    def test_legend_tells_sizes_and_shares(self) -> None:
        root = drawn(
            disk.picture(
                [batch((0, 3 * MiB, HERE, 0), (3 * MiB, MiB, ZERO | ALLOCATED, 0))], 4 * MiB, title="x", layers=["a"]
            )
        )
        texts = [element.text for element in root.iter(f"{SVG}text")]
        assert "3 MiB · 75 %" in texts
        assert "1 MiB · 25 %" in texts
        assert "zeroes, nothing stored" in texts

    def test_compressed_data_is_hatched(self) -> None:
        text = disk.picture([batch((0, MiB, DATA | ALLOCATED | COMPRESSED, 0))], MiB, title="x", layers=["a"])
        pattern = drawn(text).find(f".//{SVG}pattern")
        assert pattern is not None
        assert f'fill="url(#{pattern.attrib["id"]})"' in text

    def test_an_empty_disk_is_a_picture_too(self) -> None:
        drawn(disk.picture([], 0, title="empty"))

    def test_size_is_bounded_whatever_the_extents(self) -> None:
        rows = ExtentBatch()
        for index in range(60000):
            rows.add(index * 65536, 65536, HERE if index % 2 else ZERO, index * 65536, None, index % 5)
        assert len(disk.picture([rows], 60000 * 65536, title="x")) < 4 << 20

    def test_hostile_names_are_text(self) -> None:
        name = 'a<script>alert("x")</script>&\x1b[31m\udcff'
        text = disk.picture([batch((0, MiB, HERE, 0))], MiB, title=name, subtitle=name, layers=[name])
        root = drawn(text)
        assert root.find(f".//{SVG}script") is None
        assert "\x1b" not in text

    def test_two_pictures_of_one_disk_share_no_id(self) -> None:
        ids = []
        for end in (MiB, 2 * MiB):
            rows = batch((0, end, DATA | ALLOCATED | COMPRESSED, 0), (end, 3 * MiB - end, ZERO, 0))
            ids.append(set(re.findall(r' id="([^"]+)"', disk.picture([rows], 3 * MiB, title="one"))))
        assert ids[0]
        assert not ids[0] & ids[1]

    def test_two_kinds_of_pictures_share_no_id(self) -> None:
        rows = batch((0, MiB, DATA | ALLOCATED | COMPRESSED, 0))
        first = re.findall(r' id="([^"]+)"', disk.picture([rows], MiB, title="one"))
        second = re.findall(
            r' id="([^"]+)"', chain.picture([LayerDrawing("one", "qcow2", MiB, batches=[rows])], title="one")
        )
        assert first
        assert second
        assert not set(first) & set(second)

    def test_each_theme_has_its_ground(self) -> None:
        light, dark, auto = (disk.picture([], MiB, title="x", theme=theme) for theme in ("light", "dark", "auto"))
        assert "#0f172a" in dark
        assert "prefers-color-scheme" not in light + dark
        assert "prefers-color-scheme: dark" in auto


class TestChain:
    LAYERS = (
        LayerDrawing(
            "work",
            "qcow2",
            4 * MiB,
            1 * MiB,
            1 * MiB,
            [batch((0, MiB, HERE, 0), (MiB, 3 * MiB, 0, 0))],
            ["before", "after"],
        ),
        LayerDrawing(
            "base", "raw", 2 * MiB, 2 * MiB, 1 * MiB, [batch((0, 2 * MiB, HERE, 0))], others=["other-1", "other-2"]
        ),
    )

    def test_bars_are_to_one_scale(self) -> None:
        root = drawn(chain.picture(self.LAYERS, title="work"))
        work, base = spaces(root, ": work"), spaces(root, ": base")
        assert area(base) == pytest.approx(2 * area(work), rel=0.02)

    def test_names_everything(self) -> None:
        text = "".join(drawn(chain.picture(self.LAYERS, title="work", subtitle="two images")).itertext())
        for word in ("work", "base", "two images", "before", "after", "other-1", "other-2", "active layer"):
            assert word in text

    def test_a_missing_layer_is_told(self) -> None:
        layers = (self.LAYERS[0], LayerDrawing("gone.qcow2", "qcow2", 0, note="missing: no such file"))
        assert "missing: no such file" in "".join(drawn(chain.picture(layers, title="work")).itertext())

    def test_many_overlays_and_snapshots_are_counted_not_drawn(self) -> None:
        crowded = self.LAYERS[1]._replace(
            others=[f"overlay{n}" for n in range(100)], snapshots=[f"snapshot{n}" for n in range(100)]
        )
        text = "".join(drawn(chain.picture([crowded], title="x")).itertext())
        assert "and 96 more" in text
        assert "overlay50" not in text
        assert "snapshot50" not in text

    def test_two_hundred_layers(self) -> None:
        layers = [self.LAYERS[1]._replace(name=f"layer{n}", others=()) for n in range(200)]
        root = drawn(chain.picture(layers, title="long"))
        assert float(root.attrib["height"]) > 200 * 100


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 10, "0 %"),
        (1, 10**6, "under 0.1 %"),
        (10**6 - 1, 10**6, "over 99.9 %"),
        (10, 10, "100 %"),
        (1, 3, "33 %"),
        (1, 30, "3.3 %"),
    ],
)
def test_shares_never_hide_what_exists(part: int, whole: int, text: str) -> None:
    assert disk.percent(part, whole) == text
