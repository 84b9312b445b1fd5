"""The kernel's NBD client: ``-c`` gives a disk to /dev/nbdN, ``-d`` takes it away again.

Source: Linux ``include/uapi/linux/nbd.h``, ``drivers/block/nbd.c`` (the interface by ioctl).
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable

from cowhand.block.protocols.nbd.address import HANDSHAKE_SECONDS, Dial, Server
from cowhand.cli.compat import program
from cowhand.cli.compat.program import Failure
from cowhand.core.errors import CowhandError
from cowhand.nbd.constants import FLAG_READ_ONLY

SET_SOCK = 0xAB00
SET_BLKSIZE = 0xAB01
DO_IT = 0xAB03
CLEAR_SOCK = 0xAB04
CLEAR_QUE = 0xAB05
SET_SIZE_BLOCKS = 0xAB07
DISCONNECT = 0xAB08
SET_FLAGS = 0xAB0A
BLKROSET = 0x125D
_SECTOR = 512


def disconnect(device: str) -> int:
    """Take the disk away from *device*. Raises Failure."""
    try:
        descriptor = os.open(device, os.O_RDWR)
    except OSError as error:
        raise Failure(f"Cannot open {device}: {error.strerror}") from None
    try:
        for request in (CLEAR_QUE, DISCONNECT, CLEAR_SOCK):
            fcntl.ioctl(descriptor, request)
    except OSError as error:
        raise Failure(f"Cannot disconnect {device}: {error.strerror}") from None
    finally:
        os.close(descriptor)
    print(f"{device} disconnected")
    return 0


class Device:
    """A device that is given a disk: opened first, then :meth:`attach` to a server's socket; *ended* is called when the kernel lets go."""

    def __init__(self, device: str, ended: Callable[[], None]) -> None:
        self.device = device
        self._ended = ended
        try:
            self._descriptor = os.open(device, os.O_RDWR)
        except OSError as error:
            raise Failure(f"Failed to open {device}: {error.strerror}") from None

    def attach(self, path: str, export: str) -> None:
        """Connect the kernel with the *export* of the server at the socket *path*. Raises Failure."""
        try:
            sock, agreed = Dial(Server("unix", path=path), HANDSHAKE_SECONDS).run(export, structured=False)
        except CowhandError as error:
            raise Failure(error.qemu()) from None
        sock.settimeout(None)
        try:
            if agreed.size // _SECTOR * _SECTOR != agreed.size:
                program.warning("Export size is not a multiple of 512 bytes: the device ends at the last whole sector")
            fcntl.ioctl(self._descriptor, SET_SOCK, sock.fileno())
            fcntl.ioctl(self._descriptor, SET_BLKSIZE, _SECTOR)
            fcntl.ioctl(self._descriptor, SET_SIZE_BLOCKS, agreed.size // _SECTOR)
            fcntl.ioctl(self._descriptor, SET_FLAGS, agreed.flags)
            if agreed.flags & FLAG_READ_ONLY:
                fcntl.ioctl(self._descriptor, BLKROSET, (1).to_bytes(4, "little"))
        except OSError as error:
            sock.close()
            raise Failure(f"Failed to set NBD socket: {error.strerror}") from None

        def work() -> None:
            try:
                fcntl.ioctl(self._descriptor, DO_IT)  # returns when the device is disconnected
            except OSError:
                pass
            finally:
                sock.close()
                self._ended()

        threading.Thread(target=work, name="nbd-device", daemon=True).start()

    def close(self) -> None:
        """Disconnect the device."""
        try:
            fcntl.ioctl(self._descriptor, DISCONNECT)
        except OSError:
            pass
        os.close(self._descriptor)
