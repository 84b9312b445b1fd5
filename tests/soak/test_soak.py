"""The soak run is what it says: a few images pass, all options come up, and damage is noticed."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from cowhand.crypto import secrets
from tests.soak.choice import PASSPHRASE, SECRET, choose
from tests.soak.soak import Image, Wrong
from tests.tools.qemu import require_qemu


def test_every_option_comes_up() -> None:
    seen = Counter(f"{k}={v}" for seed in range(300) for k, v in choose(random.Random(seed)).options.items())
    wanted = [
        "extended_l2=on",
        "data_file_raw=on",
        "encrypt.format=luks",
        "encrypt.format=aes",
        "lazy_refcounts=on",
        "compat=0.10",
    ]
    wanted += [f"refcount_bits={1 << order}" for order in range(7)] + ["cluster_size=512", "cluster_size=2097152"]
    wanted += [f"preallocation={mode}" for mode in ("metadata", "falloc", "full")]
    assert [name for name in wanted if not seen[name]] == []


@require_qemu
@pytest.mark.interop
@pytest.mark.parametrize("seed", [3, 7, 12])
def test_images_pass(tmp_path: Path, seed: int) -> None:
    with secrets.given({SECRET: PASSPHRASE}):
        assert Image(tmp_path, seed).run()


@require_qemu
@pytest.mark.interop
def test_a_lost_write_is_noticed(tmp_path: Path) -> None:
    with secrets.given({SECRET: PASSPHRASE}):
        image = Image(tmp_path, 3)
        with image.open(writable=True) as disk:
            disk.write(0, b"kept")
        with pytest.raises(Wrong, match="another content"):
            image.judge()
        image.model[:4] = b"kept"
        image.judge()
