"""LUKS headers as nobody lays them out: slots in any order and with gaps, only one in the middle in use, the header elsewhere in the image."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

import cowhand
from cowhand.crypto import luks, secrets
from cowhand.image.check import check
from cowhand.image.create import create
from tests.tools.qemu import qemu_img, qemu_io, require_qemu

pytestmark = [require_qemu, pytest.mark.interop]

_SECRETS = {"s0": "passphrase", "s1": "another"}
_OBJECTS = [word for name, value in _SECRETS.items() for word in ("--object", f"secret,id={name},data={value}")]
_SIZE = 1 << 20
_POINTER = struct.pack(">II", 0x0537BE77, 16)


def disorder(rng: random.Random, data: bytearray, at: int) -> None:
    """Give the key slots of the LUKS header at *at* other places and other numbers; the first one does not stay the active one."""
    payload, key = struct.unpack_from(">II", data, at + 104)
    sectors = luks.slot_sectors(key)
    entries = [bytearray(data[at + luks.slot_at(n) : at + luks.slot_at(n + 1)]) for n in range(luks.SLOTS)]
    places = [struct.unpack_from(">I", entry, 40)[0] for entry in entries]
    material = [bytes(data[at + 512 * place :][: 512 * sectors]) for place in places]
    order = rng.sample(range(luks.SLOTS), luks.SLOTS)
    position, room = 8, payload - 8 - luks.SLOTS * sectors
    for number in order:
        gap = rng.randint(0, room)
        position, room = position + gap, room - gap
        data[at + 512 * position : at + 512 * (position + sectors)] = material[number]
        struct.pack_into(">I", entries[number], 40, position)
        position += sectors
    turn = rng.randrange(1, luks.SLOTS)
    for number in range(luks.SLOTS):
        entry = entries[(number + turn) % luks.SLOTS]
        data[at + luks.slot_at(number) : at + luks.slot_at(number + 1)] = entry


@pytest.mark.parametrize("driver", ["qcow2", "luks"])
def test_both_sides_open_write_and_amend(driver: str, tmp_path: Path, rng: random.Random) -> None:
    path = tmp_path / "disk"
    prefix = "encrypt." if driver == "qcow2" else ""
    options = {f"{prefix}key-secret": "s0", f"{prefix}iter-time": 1, f"{prefix}cipher-alg": "aes-128"}
    if driver == "qcow2":
        options |= {"encrypt.format": "luks", "cluster_size": 4096}
    described = f"driver={driver},file.filename={path},{prefix}key-secret="
    with secrets.given(_SECRETS):
        create(path, driver, _SIZE, options)
        data = bytearray(path.read_bytes())
        if driver == "qcow2":
            pointer = data.index(_POINTER) + 8
            at, length = struct.unpack_from(">QQ", data, pointer)
            disorder(rng, data, at)
            data += bytes(-len(data) % 4096 + 3 * 4096)
            struct.pack_into(">QQ", data, pointer, len(data), length + 1000)
            data += data[at : at + length] + bytes(1000)
        else:
            disorder(rng, data, 0)
        path.write_bytes(data)
        opening = {f"{prefix}key-secret": "s0"}
        if driver == "qcow2":
            assert check(path, repair="all", format="qcow2", options=opening).clean
        model = bytearray(_SIZE)
        with cowhand.open(path, format=driver, writable=True, options=opening) as disk:
            disk.write(0, bytes(_SIZE))
            disk.write(100_000, b"c" * 70_000)
            disk.root.amend(
                {
                    f"{prefix}state": "active",
                    f"{prefix}new-secret": "s1",
                    f"{prefix}iter-time": 1,
                    f"{prefix}keyslot": 0,
                }
            )
        model[100_000:170_000] = b"c" * 70_000
        qemu_io(described + "s1", "write -P 0x71 150k 64k", options=(*_OBJECTS, "--image-opts"))
        model[150 << 10 : 214 << 10] = b"q" * (64 << 10)
        erased = f"{prefix}state=inactive,{prefix}old-secret=s0"
        qemu_img("amend", *_OBJECTS, "--image-opts", described + "s1", "-o", erased)
        with pytest.raises(cowhand.errors.AccessDenied):
            cowhand.open(path, format=driver, options=opening)
        with cowhand.open(path, format=driver, options={f"{prefix}key-secret": "s1"}) as disk:
            assert disk.read(0, _SIZE) == model
        if driver == "qcow2":
            qemu_img("check", *_OBJECTS, "--image-opts", described + "s1")
