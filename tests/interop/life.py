"""The life of one image in the hands of one or two programs, and the comparison of all that both say about it in the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cowhand
from tests.interop.images import Expected, Request, Shape, pattern, span
from tests.interop.partners import Cowhand, Partner, Qemu

#: A session: which program ("cowhand" or "qemu"), with discards handed down or not, and what it does.
Session = tuple[str, bool, list[Request]]


class Life:
    """An image of *shape* in *folder*, made and, with its backing files, filled by *maker*."""

    def __init__(self, folder: Path, shape: Shape, maker: str) -> None:
        self.folder = folder
        self.shape = shape
        self.path = folder / "disk.qcow2"
        below, base = self._make_below(shape, maker, 1)
        (Cowhand if maker == "cowhand" else Qemu).create(self.path, shape, base)
        self.expected = Expected(shape.sizes[0], below)
        self.partners: dict[str, Partner] = {"cowhand": Cowhand(self.path, shape), "qemu": Qemu(self.path, shape)}

    def _make_below(self, shape: Shape, maker: str, level: int) -> tuple[bytes, Path | None]:
        """Make the backing files of *shape*; return what shows through and the topmost one."""
        if not shape.formats:
            return b"", None
        path = self.folder / f"base{level}"
        below, base = self._make_below(shape.below(), maker, level + 1)
        expected = Expected(shape.sizes[1], below)
        if shape.formats[0] == "raw":
            with path.open("wb") as file:
                file.truncate(expected.size)
            writer: Partner | None = None
        else:
            (Cowhand if maker == "cowhand" else Qemu).create(path, shape.below(), base)
            writer = (Cowhand if maker == "cowhand" else Qemu)(path, shape.below())
            writer.begin("ignore")
        for number in range(6):
            request = Request(
                "write", (number * 7919 + level * 104729) * 977, (number * 31 + level) * 65537, level * 16 + number
            )
            offset, length = span(request, expected.size, shape.below().cluster)
            data = pattern(request.seed, length)
            if writer is None:
                with path.open("r+b") as file:
                    file.seek(offset)
                    file.write(data)
            elif number == 3:
                writer.zero(offset, length, True)
                data = bytes(length)
            else:
                writer.write(offset, request.seed, length)
            expected.write(offset, data)
        if writer is not None:
            writer.end()
        return bytes(expected.content), path

    # -- living

    def session(self, session: Session) -> None:
        """Have one program do its requests, and the other one read the result."""
        who, unmap, requests = session
        partner = self.partners[who]
        partner.begin("unmap" if unmap else "ignore")
        for request in requests:
            getattr(self, "_" + request.verb)(partner, request)
        partner.end()
        other = self.partners["qemu" if who == "cowhand" else "cowhand"]
        self.expected.settle(other.content(), f"what {other.name} reads after {who}")

    def _span(self, request: Request) -> tuple[int, int]:
        offset, length = span(request, self.expected.size, self.shape.cluster)
        cluster = self.shape.cluster
        self.expected.touched.update(range(offset // cluster, (offset + length - 1) // cluster + 1))
        return offset, length

    def _write(self, partner: Partner, request: Request) -> None:
        offset, length = self._span(request)
        partner.write(offset, request.seed, length)
        self.expected.write(offset, pattern(request.seed, length))

    def _compress(self, partner: Partner, request: Request) -> None:
        cluster = self.shape.cluster
        number = request.place % -(-self.expected.size // cluster)
        if self.shape.data or number in self.expected.touched:
            return
        self.expected.touched.add(number)
        length = min(cluster, self.expected.size - number * cluster)
        partner.compress(number * cluster, request.seed, length)
        self.expected.write(number * cluster, pattern(request.seed, length))

    def _zero(self, partner: Partner, request: Request) -> None:
        offset, length = self._span(request)
        partner.zero(offset, length, request.seed % 2 == 0)
        self.expected.write(offset, bytes(length))

    def _discard(self, partner: Partner, request: Request) -> None:
        offset, length = self._span(request)
        partner.discard(offset, length)
        self.expected.discard(offset, length)

    def _flush(self, partner: Partner, request: Request) -> None:
        partner.flush()

    def _settle_now(self, partner: Partner) -> None:
        """Learn what discards did, since the whole content is to be remembered or replaced."""
        partner.end()
        self.expected.settle(self.partners["cowhand"].content(), f"what cowhand reads after {partner.name}")
        partner.begin("ignore")

    def _snapshot(self, partner: Partner, request: Request) -> None:
        expected = self.expected
        if len(expected.snapshots) >= self.shape.most_snapshots:
            return
        self._settle_now(partner)
        name = f"s{len(expected.snapshots)}-{request.seed}"
        if name not in expected.snapshots:
            partner.snapshot("create", name)
            expected.snapshots[name] = bytes(expected.content)

    def _apply(self, partner: Partner, request: Request) -> None:
        if not self.expected.snapshots:
            return
        name = sorted(self.expected.snapshots)[request.place % len(self.expected.snapshots)]
        partner.snapshot("apply", name)
        self.expected.content = bytearray(self.expected.snapshots[name])
        self.expected.open = bytearray(self.expected.size)

    def _delete(self, partner: Partner, request: Request) -> None:
        if not self.expected.snapshots:
            return
        name = sorted(self.expected.snapshots)[request.place % len(self.expected.snapshots)]
        partner.snapshot("delete", name)
        del self.expected.snapshots[name]

    def _grow(self, partner: Partner, request: Request) -> None:
        expected = self.expected
        if self.shape.version == 2 and (expected.snapshots or (self.shape.formats and partner.name == "qemu")):
            return  # version 2 does not know a snapshot's size; QEMU does not hide a longer backing file there
        if expected.size >= 2 * self.shape.sizes[0] + (1 << 20):
            return
        size = expected.size + (1 + request.place % (max(expected.size, 65536) // 512)) * 512
        partner.resize(size)
        # What an old tail cluster holds beyond the old end was never the guest's.
        expected.touched.add((expected.size - 1) // self.shape.cluster)
        expected.resize(size)

    # -- judging

    def judge(self) -> None:
        """Compare what both programs say of the closed image: content, snapshots, map, check."""
        ours, theirs = self.partners["cowhand"], self.partners["qemu"]
        for partner in (ours, theirs):
            assert partner.content() == self.expected.content, f"what {partner.name} reads in the end"
            for name, content in self.expected.snapshots.items():
                found = partner.content(name)
                # qemu-img gives a snapshot the present size of the disk.
                length = len(content) if partner is ours else min(len(content), len(found))
                assert found[:length] == content[:length], f"what {partner.name} reads of snapshot {name}"
                assert partner is theirs or len(found) == length
        check = theirs.check()
        assert check["status"] == 0, check
        assert ours.check() == check
        assert ours.map() == theirs.map()
        with cowhand.open(self.path, format="qcow2") as disk:
            assert sum(row.length for batch in disk.extents() for row in batch) == self.expected.size


def live(folder: Path, shape: Shape, maker: str, sessions: Sequence[Session]) -> None:
    """Live and judge."""
    life = Life(folder, shape, maker)
    for session in sessions:
        life.session(session)
    life.judge()
