"""The library as its users meet it: every public name is there, typed and documented, and the page that shows it is true."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cowhand
from tests.tools.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
FUNCTIONS = sorted(name for name in cowhand.__all__ if inspect.isfunction(getattr(cowhand, name)))
CLASSES = sorted(name for name in cowhand.__all__ if inspect.isclass(getattr(cowhand, name)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_typed_and_documented(name: str) -> None:
    function = getattr(cowhand, name)
    assert inspect.getdoc(function)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(item.annotation is not inspect.Parameter.empty for item in signature.parameters.values())


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_documented(name: str) -> None:
    assert "__doc__" in vars(getattr(cowhand, name)) and inspect.getdoc(getattr(cowhand, name))


def test_names_are_those_that_the_type_checker_sees() -> None:
    assert len(set(cowhand.__all__)) == len(cowhand.__all__)
    assert set(cowhand.__all__) <= set(dir(cowhand))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = cowhand.nonsense  # type: ignore[attr-defined]


def test_importing_it_imports_nothing_else() -> None:
    code = "import sys, cowhand; print(*sorted(name for name in sys.modules if name.startswith('cowhand')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.split() == ["cowhand", "cowhand.__about__"]


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one program: the blocks use what those before them made."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/library.md", "exec"), names)  # noqa: S102 - it is this project's own page


def test_the_page_names_errors_that_exist() -> None:
    table = PAGE.split("| class of `cowhand.errors`", 1)[1].split("\n\n", 1)[0]
    rows = [row.split("|")[1:3] for row in table.splitlines()[2:]]
    assert len(rows) > 5
    for names, bases in rows:
        for name, base in zip(re.findall(r"`(\w+)`", names), re.findall(r"`(\w+)`", bases) or [], strict=False):
            assert base in {parent.__name__ for parent in getattr(cowhand.errors, name).__mro__}
        assert all(
            issubclass(getattr(cowhand.errors, name), cowhand.CowhandError) for name in re.findall(r"`(\w+)`", names)
        )


def test_a_cache_mode_that_is_none_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    base, top, copy = (str(tmp_path / name) for name in ("base", "top", "copy"))
    cowhand.create(base, "qcow2", "1M")
    cowhand.create(top, "qcow2", backing=base, backing_format="qcow2")
    for call in (
        lambda: cowhand.open(top, cache="fast"),
        lambda: cowhand.convert(top, copy, cache="fast"),
        lambda: cowhand.convert(top, copy, source_cache="fast"),
        lambda: cowhand.compare(top, base, cache="fast"),
        lambda: cowhand.commit(top, cache="fast"),
        lambda: cowhand.rebase(top, base, "qcow2", cache="fast"),
        lambda: cowhand.rebase(top, base, "qcow2", source_cache="fast"),
    ):
        with pytest.raises(cowhand.errors.InvalidArgument, match="Invalid cache mode 'fast'"):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "top"]


@pytest.mark.parametrize(("kind", "level"), [("zlib", 0), ("zlib", 10), ("zstd", -1), ("zstd", 23)])
def test_a_compression_level_that_is_none_is_refused(kind: str, level: int, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(b"x" * 65536)
    with pytest.raises(cowhand.errors.InvalidArgument, match=f"compression level {level} is not between 1 and"):
        cowhand.convert(
            raw, tmp_path / "new", "qcow2",
            source_format="raw", options={"compression_type": kind}, compressed=True, compression_level=level,
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_ranges_that_are_none_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a"
    cowhand.create(path, "qcow2", "1M")
    with cowhand.open(path, writable=True) as disk:
        for call in (
            lambda: disk.read(0, -1),
            lambda: disk.read(0, 1 << 62),
            lambda: disk.read_vmstate(0, -1),
            lambda: disk.read_vmstate(-1, 1),
            lambda: disk.read_vmstate(0, 1 << 63),
            lambda: disk.write_vmstate(-65536, b"x"),
        ):
            with pytest.raises(cowhand.errors.OutOfRange):
                call()
        with pytest.raises(cowhand.errors.InvalidArgument, match="cannot have -512 bytes"):
            disk.resize(-512, shrink=True)
        assert disk.size == 1 << 20 and disk.read(0, 512) == bytes(512)
