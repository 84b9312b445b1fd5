"""The inputs that fuzzing begins with: small, and each with something that the others have not. ``python -m tests.fuzz seeds`` writes them."""

from __future__ import annotations

import subprocess
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cowhand
from cowhand.block.disk import Disk
from cowhand.crypto import secrets
from cowhand.image.bitmaps import add_bitmap
from cowhand.image.create import create
from cowhand.image.snapshots import create_snapshot
from tests.fuzz import wide
from tests.fuzz.exercise import PASSPHRASE, SECRET
from tests.fuzz.targets import COMPRESSED
from tests.hostile import layout
from tests.tools.patience import PATIENCE

_SIZE = 256 << 10
#: Larger inputs are kept compressed.
_PLAIN_BYTES = 64 << 10
#: Images that cowhand makes itself: name → options of creation.
_CREATED = {
    "empty": {"cluster_size": "512"},
    "version-2": {"cluster_size": "512", "compat": "0.10"},
    "one-bit-counts": {"cluster_size": "512", "refcount_bits": "1"},
    "wide-counts": {"cluster_size": "1k", "refcount_bits": "64"},
    "zstd": {"cluster_size": "4k", "compression_type": "zstd"},
    "lazy": {"cluster_size": "512", "lazy_refcounts": "on"},
    "extended": {"cluster_size": "16k", "extended_l2": "on"},
    "bitmaps": {"cluster_size": "512"},
    "data-apart": {"cluster_size": "512", "data_file": "seed.data"},
    "data-apart-raw": {"cluster_size": "512", "data_file": "raw.data", "data_file_raw": "on"},
}
#: Encrypted images that QEMU's tool makes: name → options.
_ENCRYPTED = {
    "aes": {"encrypt.format": "aes", "encrypt.key-secret": SECRET, "cluster_size": "512"},
    "luks-inside": {
        "encrypt.format": "luks", "encrypt.key-secret": SECRET, "cluster_size": "4k", "encrypt.cipher-alg": "aes-128",
        "encrypt.cipher-mode": "cbc", "encrypt.ivgen-alg": "plain64", "encrypt.iter-time": "10",
    },
}  # fmt: skip
#: LUKS volumes, which cowhand makes: name → options.
_VOLUMES = {
    "xts": {"cipher-alg": "aes-128"},
    "essiv": {"cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "essiv", "hash-alg": "sha1"},
    "plain": {"cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "plain"},
}
_NAMES = {
    "json": '{"driver":"qcow2","file":{"driver":"memory","size":65536},"read-only":true,"cache":{"direct":false}}',
    "quotes": "{'driver':'raw','offset':512,'size':\"1k\",'file':{'driver':'memory','size':4096}}",
    "flat": '{"driver":"raw","file.driver":"memory","file.size":"1M","node-name":"a","discard":"unmap"}',
    "options": "driver=raw,file.driver=blkdebug,file.image.driver=memory,file.image.size=1M,offset=0",
    "commas": "driver=memory,size=64k,node-name=a,,b,read-only",
    "rules": '[inject-error]\nevent = "read_aio"\nerrno = "5"\nonce = "on"\n[set-state]\nstate = "1"\nevent = "l1_update"\nnew_state = "2"\n',
    "blkdebug": '{"driver":"blkdebug","image":{"driver":"memory"},"inject-error":[{"event":"read_aio","errno":5,"sector":1}],"align":512}',
    "quorum": '{"driver":"quorum","children":[{"driver":"memory"},{"driver":"memory"}],"vote-threshold":2}',
    "filters": "driver=copy-on-read,file.driver=blklogwrites,file.file.driver=memory,file.log.driver=memory",
    "size": "0x10GiB",
    "fraction": "1.5T",
    "prefix": "blkdebug::json:{}",
    "qcow2": "QFI\xfb\0\0\0\3",
}


def images(*, foreign: bool = False) -> dict[str, bytes]:
    """Return the qcow2 images by name; *foreign*: those too that QEMU's tools make."""
    made = {
        "everything": bytes(layout.make(9).data),
        "everything-version-2": bytes(layout.make(9, version=2).data),
        "everything-backed": bytes(layout.make(9, backing="base.raw").data),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, options in _CREATED.items():
            path = folder / f"{seed}.qcow2"
            given = {key: str(folder / value) if key == "data_file" else value for key, value in options.items()}
            create(path, "qcow2", str(_SIZE), given)
            with cowhand.open(path, writable=True) as disk:
                _fill(disk, with_bitmaps=seed == "bitmaps")
            made[seed] = path.read_bytes().replace(str(folder).encode(), b"/nowhere".ljust(len(str(folder)), b"-"))
        if foreign:
            made |= _encrypted(folder)
    return made


def _fill(disk: Disk, *, with_bitmaps: bool) -> None:
    disk.write(5000, b"data" * 300)
    if with_bitmaps:
        add_bitmap(disk, "changes", granularity=512)
        add_bitmap(disk, "stopped", granularity=4096, enabled=False)
        create_snapshot(disk, "before")
    disk.write_zeroes(65536, 4096)
    disk.write(100000, b"more" * 200)


def _encrypted(folder: Path) -> dict[str, bytes]:
    made = {}
    for seed, options in _ENCRYPTED.items():
        path = folder / f"{seed}.qcow2"
        given = ",".join(f"{name}={value}" for name, value in options.items())
        secret = f"secret,id={SECRET},data={PASSPHRASE.decode()}"
        tool = ["qemu-img", "create", "-q", "-f", "qcow2", "--object", secret, "-o", given, path, "64k"]
        subprocess.run(tool, check=True, timeout=PATIENCE)
        image = f"driver=qcow2,file.filename={path},encrypt.key-secret={SECRET}"
        subprocess.run(
            ["qemu-io", "--object", secret, "--image-opts", "-c", "write -P 7 5k 3k", image],
            check=True, timeout=PATIENCE, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        made[seed] = path.read_bytes()
    return made


def luks_volumes() -> dict[str, bytes]:
    """Return LUKS volumes by name."""
    made = {}
    with tempfile.TemporaryDirectory() as folder, secrets.given({SECRET: PASSPHRASE}):
        for seed, options in _VOLUMES.items():
            path = Path(folder) / seed
            create(path, "luks", "4k", {"key-secret": SECRET, "iter-time": "1", **options})
            described: dict[str, Any] = {"driver": "luks", "key-secret": SECRET, "file.filename": str(path)}
            with cowhand.open(described, writable=True) as disk:
                disk.write(700, b"secret" * 100)
            made[seed] = path.read_bytes()
    return made


def names() -> dict[str, bytes]:
    """Return texts by name."""
    return {name: text.encode("latin-1") for name, text in _NAMES.items()}


_MADE: dict[str, Callable[[], dict[str, bytes]]] = {
    "qcow2": partial(images, foreign=True),
    "luks": luks_volumes,
    "names": names,
    "wide": wide.seeds,
}


def write(target: str, folder: Path) -> int:
    """Write the seeds of *target* into *folder*; return how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = _MADE[target]()
    for name, data in everything.items():
        if len(data) > _PLAIN_BYTES:
            (folder / f"{name}{COMPRESSED}").write_bytes(zlib.compress(data, 9))
        else:
            (folder / f"{name}.{target}").write_bytes(data)
    return len(everything)
