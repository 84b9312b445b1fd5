"""Rows for encrypted disks: conversion into and out of LUKS, inside qcow2 and by itself. Targets exist, so that making a key is not timed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

from inputs import Inputs
from measuring import Case, spawn

_SECRET = "bench"


def cases(inputs: Inputs) -> Iterator[Case]:
    """Yield the rows, making their inputs one by one."""
    for format, name in (("luks", "LUKS"), ("qcow2", "LUKS in qcow2")):
        rows = _Rows(inputs, format)
        yield rows.write(f"write {name} (-n)")
        yield rows.read(f"read {name}")
        rows.end()


class _Rows:
    def __init__(self, inputs: Inputs, format: str) -> None:
        from bulk_rows import Bulk

        self.bulk = Bulk(inputs)
        self.format = format
        self.raw = inputs.sparse_raw()
        self.key = inputs.path("key")
        self.key.write_text(_SECRET)
        self.secret = ("--object", f"secret,id=s,file={self.key}")
        self.source = inputs.path(f"source.{format}")
        self._make(self.source)
        spawn(*self._ours_in(self.source))

    def _make(self, path: Path) -> None:
        prefix = "encrypt." if self.format == "qcow2" else ""
        chosen = {f"{prefix}iter-time": "100", f"{prefix}key-secret": "s"}
        if prefix:
            chosen["encrypt.format"] = "luks"
        options = ",".join(f"{name}={value}" for name, value in chosen.items())
        size = str(self.raw.stat().st_size)
        command = [self.bulk.qemu_img, "create", "-q", "-f", self.format, *self.secret, "-o", options, str(path), size]
        for _ in range(10):
            # On a busy machine it cannot time its key derivation, and says so.
            path.unlink(missing_ok=True)
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return
        raise RuntimeError(f"qemu-img cannot make {path}")

    def _described(self, path: Path) -> str:
        prefix = "encrypt." if self.format == "qcow2" else ""
        return f"driver={self.format},file.filename={path},{prefix}key-secret=s"

    def _ours_in(self, target: Path) -> list[str]:
        words = ["convert", "--quiet", "--key-file", str(self.key), "-n", "-f", "raw", "-O", self.format]
        return [self.bulk.cowhand, *words, str(self.raw), str(target)]

    def write(self, name: str) -> Case:
        """Return the row of a conversion into an encrypted image that exists."""
        state: dict[str, Path] = {}

        def prepare() -> None:
            self.bulk.clear()
            state["target"] = self.bulk.fresh()
            self._make(state["target"])

        convert = (self.bulk.qemu_img, "convert", *self.secret, "-n", "-f", "raw", "--target-image-opts", self.raw)
        return Case(
            name,
            "qemu-img convert -n",
            0.65,
            lambda: spawn(*self._ours_in(state["target"])),
            lambda: spawn(*convert, self._described(state["target"])),
            prepare,
        )

    def read(self, name: str) -> Case:
        """Return the row of a conversion into a raw disk."""
        ours = (self.bulk.cowhand, "convert", "--quiet", "--key-file", self.key, "-f", self.format, "-O", "raw")
        peer = (self.bulk.qemu_img, "convert", *self.secret, "--image-opts", "-O", "raw")
        return Case(
            name,
            "qemu-img convert",
            0.6,
            lambda: spawn(*ours, self.source, self.bulk.fresh()),
            lambda: spawn(*peer, self._described(self.source), self.bulk.fresh()),
            self.bulk.clear,
        )

    def end(self) -> None:
        """Remove what only these rows need."""
        self.source.unlink(missing_ok=True)
