"""Key slots of encrypted qcow2 images: added and erased by amend, as QEMU does, through power failures and failing media."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cowhand
from cowhand.block.disk import Disk
from cowhand.block.formats.qcow2.driver import Qcow2Node
from cowhand.block.opening.opening import Opening
from cowhand.block.protocols.memory import MemoryNode
from cowhand.core.errors import AccessDenied, CowhandError, InvalidArgument, NotSupported, ReadOnly
from cowhand.crypto import secrets
from cowhand.drivers import REGISTRY
from cowhand.image.create import create
from cowhand.testing import replay
from cowhand.testing.faults import CHANGES, HALF, FaultNode
from cowhand.testing.recorder import RecorderNode
from tests.qcow2 import images, oracle
from tests.qcow2.images import PASSPHRASE, Shape
from tests.tools.qemu import qemu_img, qemu_io, require_qemu

_SHAPE = Shape(cluster=4096, size=64 << 10, encrypt="luks")
_SECRETS = {"s0": PASSPHRASE, "s1": b"another", "s2": b"a third"}


@pytest.fixture(autouse=True)
def known_secrets() -> Iterator[None]:
    with secrets.given(_SECRETS):
        yield


def add(secret: str, **more: Any) -> dict[str, Any]:
    return {"encrypt.state": "active", "encrypt.new-secret": secret, "encrypt.iter-time": 1, **more}


def erase(**more: Any) -> dict[str, Any]:
    return {"encrypt.state": "inactive", **more}


def over(file: Any, secret: str = "s0", *, writable: bool = False) -> Disk:
    description = {"driver": "qcow2", "file": file, "encrypt": {"key-secret": secret}, "read-only": not writable}
    return Disk(Opening(REGISTRY).open(description), writable=writable)


def opens(image: MemoryNode, secret: str, content: bytes) -> bool:
    """Tell whether *secret* opens a copy of *image*, which then holds *content*."""
    try:
        with over(image.copy(), secret) as disk:
            assert disk.read(0, disk.size) == content
    except AccessDenied:
        return False
    return True


def test_no_power_failure_costs_more_than_the_slot_that_changes(rng: random.Random) -> None:
    content = rng.randbytes(_SHAPE.size)
    image = images.create(_SHAPE, content)
    recorder = RecorderNode(image, sector=512)
    keeper = Disk(recorder)
    moments = []
    with over(recorder, writable=True) as disk:
        node = disk.root
        assert isinstance(node, Qcow2Node)
        for options in (add("s1"), add("s2", **{"encrypt.keyslot": 6}), erase(**{"encrypt.old-secret": "s1"})):
            node.amend(options)
            moments.append(recorder.log.now())
    keeper.close()
    added, third, erased = moments
    seen = 0
    for state in replay.crash_states(recorder.log, samples=30, seed=1):
        found = oracle.Image(state.image.snapshot_bytes(), key=None)
        assert found.check() == oracle.Findings(), "key slots are no matter of counts"
        seen += 1
        if seen % 9 and state.moment not in moments:
            continue  # deriving keys takes its time
        assert opens(state.image, "s0", content)
        assert opens(state.image, "s2", content) or state.moment <= third
        if added < state.moment <= third:
            assert opens(state.image, "s1", content)
        if state.moment > erased:
            assert not opens(state.image, "s1", content)
    assert seen > 60


@pytest.mark.parametrize("step", range(6))
def test_a_medium_that_fails_costs_no_other_slot(step: int, rng: random.Random) -> None:
    content = rng.randbytes(_SHAPE.size)
    image = images.create(_SHAPE, content)
    file = FaultNode(image, sector=512)
    keeper = Disk(file)
    disk = over(file, writable=True)
    node = disk.root
    assert isinstance(node, Qcow2Node)
    node.amend(add("s1"))
    file.fail(CHANGES, step + 1, lasting=True, done=HALF)
    with pytest.raises(CowhandError):
        node.amend(erase(**{"encrypt.old-secret": "s1"}) if step % 2 else add("s2"))
    file.reset()
    disk.close()
    assert opens(image, "s0", content)
    assert opens(image, "s1", content) or step % 2
    keeper.close()


def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    chosen = {"encrypt.format": "luks", "encrypt.key-secret": "s0", "encrypt.iter-time": "1"}
    create(path, "qcow2", 1 << 20, chosen)
    before = path.read_bytes()
    with cowhand.open(path, writable=True, options={"encrypt.key-secret": "s0"}) as disk:
        for options, message in (
            ({"encrypt.new-secret": "s1"}, "'state' is missing"),
            (add("s1", **{"encrypt.keyslot": 8}), "Invalid keyslot 8"),
            (add("s1", **{"encrypt.keyslot": 0}), "Refusing to overwrite active keyslot 0"),
            (add("nobody"), "No secret with id 'nobody'"),
            (erase(**{"encrypt.keyslot": 0}), "only active keyslot"),
            (erase(**{"encrypt.old-secret": "s2"}), "No keyslots match"),
        ):
            with pytest.raises(InvalidArgument, match=message):
                disk.root.amend(options)
    assert path.read_bytes() == before
    create(tmp_path / "aes", "qcow2", 1 << 20, {"encryption": "on", "encrypt.key-secret": "s0"})
    with (
        cowhand.open(tmp_path / "aes", writable=True, options={"encrypt.key-secret": "s0"}) as disk,
        pytest.raises(NotSupported, match="Only LUKS encryption options"),
    ):
        disk.root.amend(add("s1"))


@require_qemu
def test_qemu_opens_what_was_added_and_not_what_was_erased(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    chosen = {"encrypt.format": "luks", "encrypt.key-secret": "s0", "encrypt.iter-time": "1"}
    create(path, "qcow2", 1 << 20, chosen)
    with cowhand.open(path, writable=True, options={"encrypt.key-secret": "s0"}) as disk:
        disk.write(0, b"\5" * 4096)
        disk.root.amend(add("s1"))
        disk.root.amend(erase(**{"encrypt.keyslot": 0}))
    described = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
    for secret, good in (("another", True), (PASSPHRASE.decode(), False)):
        options = ("--object", f"secret,id=s,data={secret}", "--image-opts")
        assert (qemu_io(described, "read -P 5 0 4096", options=options, check=False).status == 0) == good
    # And back: QEMU adds a slot, which opens here.
    qemu_img(
        "amend", "--object", "secret,id=s,data=another", "--object", "secret,id=n,data=a third", "--image-opts", described,
        "-o", "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=200",
    )  # fmt: skip
    with cowhand.open(path, options={"encrypt.key-secret": "s2"}) as disk:
        assert disk.read(0, 4096) == b"\5" * 4096


def test_the_slots_of_an_image_that_is_only_read_stay(tmp_path: Path) -> None:
    path = tmp_path / "d.luks"
    create(str(path), "luks", 65536, {"key-secret": "s0", "iter-time": 1})
    before = path.read_bytes()
    with cowhand.open(path, options={"key-secret": "s0"}) as disk, pytest.raises(ReadOnly):
        disk.root.amend({"state": "active", "new-secret": "s1", "iter-time": 1})  # type: ignore[attr-defined]
    assert path.read_bytes() == before
