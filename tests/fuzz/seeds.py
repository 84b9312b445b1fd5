"""The images that fuzzing begins with: small, and each with something that the others have not. ``python -m tests.fuzz seeds`` writes them."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import cowhand
from cowhand.block.create import prepare
from tests.hostile import layout

_SIZE = 256 << 10
#: Images that cowhand makes itself: name → options of creation.
_CREATED = {
    "empty": {"cluster_size": "512"},
    "version-2": {"cluster_size": "512", "compat": "0.10"},
    "one-bit-counts": {"cluster_size": "512", "refcount_bits": "1"},
    "wide-counts": {"cluster_size": "1k", "refcount_bits": "64"},
    "zstd": {"cluster_size": "4k", "compression_type": "zstd"},
    "lazy": {"cluster_size": "512", "lazy_refcounts": "on"},
}
#: Images with features for which QEMU's tool is asked, where it is installed.
_QEMU = {
    "extended-l2": ["-o", "cluster_size=16k,extended_l2=on"],
    "data-file": ["-o", "cluster_size=512,data_file={folder}/seed.data,data_file_raw=on"],
}


def images() -> dict[str, bytes]:
    """Return the images by name."""
    made = {
        "everything": bytes(layout.make(9).data),
        "everything-version-2": bytes(layout.make(9, version=2).data),
        "everything-backed": bytes(layout.make(9, backing="base.raw").data),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, options in _CREATED.items():
            path = folder / f"{seed}.qcow2"
            prepare(str(path), "qcow2", str(_SIZE), options).run()
            with cowhand.open(path, writable=True) as disk:
                disk.write(5000, b"data" * 300)
                disk.write_zeroes(65536, 4096)
            made[seed] = path.read_bytes()
        if shutil.which("qemu-img"):
            made |= _by_qemu(folder)
    return made


def _by_qemu(folder: Path) -> dict[str, bytes]:
    made = {}
    for seed, options in _QEMU.items():
        path = folder / f"{seed}.qcow2"
        given = [text.format(folder=folder) for text in options]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *given, path, str(_SIZE)], check=True, timeout=60)
        made[seed] = path.read_bytes().replace(str(folder).encode(), b"/nowhere".ljust(len(str(folder)), b"-"))
    path = folder / "bitmap.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "64k"], check=True, timeout=60
    )
    subprocess.run(["qemu-img", "bitmap", "--add", "-g", "512", path, "changes"], check=True, timeout=60)
    made["bitmap"] = path.read_bytes()
    return made


def write(folder: Path) -> int:
    """Write the images into *folder*; return how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = images()
    for name, data in everything.items():
        (folder / f"{name}.qcow2").write_bytes(data)
    return len(everything)
