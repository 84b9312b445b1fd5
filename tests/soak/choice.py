"""What an image of a soak run is made with: every option of qcow2, in combinations that go together, drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

SECRET = "soak"
PASSPHRASE = "correct horse"
_CLUSTERS = (512, 1024, 4096, 16384, 65536, 262144, 2 << 20)
_EXTENDED_LEAST = 16384  #: extended L2 entries need clusters of this size (QEMU ``docs/interop/qcow2``)
_BITMAPS_LEAST = 3  #: version


@dataclass(frozen=True, slots=True)
class Choice:
    """``options`` of creation without the data file's name; the other fields say what they mean for the run."""

    options: dict[str, str]
    size: int
    version: int
    external: bool
    encrypted: bool
    most_snapshots: int

    @property
    def keeps_bitmaps(self) -> bool:
        return self.version >= _BITMAPS_LEAST

    @property
    def snapshots(self) -> bool:
        return not self.external and self.most_snapshots > 0


def choose(chance: random.Random) -> Choice:
    """Return the options of one image."""
    version = chance.choice((2, 3, 3, 3, 3))
    cluster = chance.choice(_CLUSTERS)
    options = {"compat": "0.10" if version == 2 else "1.1", "cluster_size": str(cluster)}
    bits, external = 16, False
    encrypted = chance.random() < 0.2
    if version == 3:
        bits = chance.choice((1, 2, 4, 8, 16, 16, 32, 64))
        options["refcount_bits"] = str(bits)
        options["compression_type"] = chance.choice(("zlib", "zstd"))
        options["lazy_refcounts"] = chance.choice(("off", "off", "on"))
        if cluster >= _EXTENDED_LEAST and chance.random() < 0.5:
            options["extended_l2"] = "on"
        external = not encrypted and chance.random() < 0.2
        if external:
            options["data_file_raw"] = chance.choice(("off", "on"))
    if encrypted:
        options |= {"encrypt.format": chance.choice(("luks", "luks", "aes")), "encrypt.key-secret": SECRET}
        if options["encrypt.format"] == "luks":
            options |= {
                "encrypt.iter-time": "10", "encrypt.cipher-alg": chance.choice(("aes-128", "aes-256")),
                "encrypt.cipher-mode": chance.choice(("xts", "cbc")),
            }  # fmt: skip
    if chance.random() < 0.25:
        options["preallocation"] = chance.choice(("metadata", "falloc", "full"))
    size = chance.randrange(1, 4 * max(cluster, 65536)) // 512 * 512 + 512
    return Choice(options, min(size, 6 << 20), version, external, encrypted, min(8, (1 << bits) - 2 if bits < 8 else 8))


def arguments_for_qemu(path: Path, choice: Choice) -> tuple[list[str], str]:
    """Return qemu-img's arguments that name the image with its secret: (options, description)."""
    description = f"driver=qcow2,file.filename={path}"
    if not choice.encrypted:
        return ["--image-opts"], description
    secret = f"secret,id={SECRET},data={PASSPHRASE}"
    return ["--object", secret, "--image-opts"], f"{description},encrypt.key-secret={SECRET}"
