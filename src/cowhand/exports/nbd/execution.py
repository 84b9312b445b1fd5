"""Doing one request on a disk: everything but what a connection does many at once.

A function returns the buffers of the reply. Errors of the disk become the client's; what has no errno of the protocol is EIO there.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cowhand.core.buffers import Buffer, give, take
from cowhand.core.errors import CowhandError
from cowhand.exports.nbd import contexts
from cowhand.nbd.constants import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
)
from cowhand.nbd.offers import Agreement
from cowhand.nbd.server_replies import ReplyEncoder, number_of
from cowhand.nbd.server_requests import ClientRequest, decode_status_payload, outside

if TYPE_CHECKING:
    from cowhand.exports.nbd.export import NbdExport

#: Stretches of one context in one reply (QEMU's server: 131072).
MAX_EXTENTS = 65536
#: Bytes that are zeroed, discarded or read into the cache by one call, so that others come in between.
PIECE = 1 << 30
CACHE_PIECE = 1 << 20


def perform(
    export: NbdExport, agreement: Agreement, encoder: ReplyEncoder, request: ClientRequest, payload: Buffer
) -> Sequence[Buffer]:
    """Do *request*, which was found to be possible; *payload* is what came with it. Return its reply."""
    try:
        return _ACTIONS[request.command](export, agreement, encoder, request, payload)
    except CowhandError as error:
        return (encoder.error(request, number_of(error), str(error)),)
    except MemoryError:
        return (encoder.error(request, errno.ENOMEM, "the server has not enough memory"),)


def _read(
    export: NbdExport, agreement: Agreement, encoder: ReplyEncoder, request: ClientRequest, payload: Buffer
) -> Sequence[Buffer]:
    if not request.length:
        return (encoder.end(request) if agreement.structured else encoder.success(request),)
    out = bytearray(encoder.data_header + request.length)
    export.disk.read_into(request.offset, memoryview(out)[encoder.data_header :])
    encoder.put_data_header(out, 0, request.cookie, request.offset, request.length, request.offset)
    return (out,)


def _write(
    export: NbdExport, agreement: Agreement, encoder: ReplyEncoder, request: ClientRequest, payload: Buffer
) -> Sequence[Buffer]:
    export.disk.write(request.offset, payload, fua=bool(request.flags & CMD_FLAG_FUA))
    return (encoder.success(request),)


def _flush(
    export: NbdExport, agreement: Agreement, encoder: ReplyEncoder, request: ClientRequest, payload: Buffer
) -> Sequence[Buffer]:
    export.disk.flush()
    return (encoder.success(request),)


def _trim(
    export: NbdExport, agreement: Agreement, encoder: ReplyEncoder, request: ClientRequest, payload: Buffer
) -> Sequence[Buffer]:
    _by_pieces(request, export.disk.discard)
    if request.flags & CMD_FLAG_FUA:
        export.disk.flush()
    return (encoder.success(request),)


def _write_zeroes(
    export: NbdExport, agreement: Agreement, encoder: ReplyEncoder, request: ClientRequest, payload: Buffer
) -> Sequence[Buffer]:
    unmap = not request.flags & CMD_FLAG_NO_HOLE
    fallback = not request.flags & CMD_FLAG_FAST_ZERO

    def zero(offset: int, length: int) -> None:
        export.disk.write_zeroes(offset, length, unmap=unmap, fallback=fallback)

    _by_pieces(request, zero)
    if request.flags & CMD_FLAG_FUA:
        export.disk.flush()
    return (encoder.success(request),)


def _by_pieces(request: ClientRequest, work: Callable[[int, int], None]) -> None:
    end = request.offset + request.length
    for begin in range(request.offset, end, PIECE):
        work(begin, min(PIECE, end - begin))


def _cache(
    export: NbdExport, agreement: Agreement, encoder: ReplyEncoder, request: ClientRequest, payload: Buffer
) -> Sequence[Buffer]:
    # What caches there are fill by reading: the system's, a copy-on-read filter's.
    end = request.offset + request.length
    buffer = take(min(CACHE_PIECE, request.length)) if request.length else memoryview(b"")
    for begin in range(request.offset, end, CACHE_PIECE):
        export.disk.read_into(begin, buffer[: min(CACHE_PIECE, end - begin)])
    give(buffer)
    return (encoder.success(request),)


def _block_status(
    export: NbdExport, agreement: Agreement, encoder: ReplyEncoder, request: ClientRequest, payload: Buffer
) -> Sequence[Buffer]:
    length, idents = request.length, tuple(range(len(agreement.contexts)))
    if request.payload:
        asked = decode_status_payload(bytes(payload), agreement)
        if asked is None:
            return (encoder.error(request, errno.EINVAL, "the payload of block status says nothing"),)
        length, idents = asked
        refused = outside(request, request.offset, length, agreement.offer.size)
        if refused is not None:
            return (encoder.error(request, refused.errno, refused.message),)
        if not idents:
            return (encoder.end(request),)
    limit = 1 if request.flags & CMD_FLAG_REQ_ONE else MAX_EXTENTS
    out = []
    for ident in idents:
        context = export.contexts[agreement.contexts[ident]]
        extents = contexts.first(context, request.offset, length, limit)
        out.append(encoder.status(request, ident, extents, done=ident == idents[-1]))
    return out


_ACTIONS = {
    CMD_READ: _read,
    CMD_WRITE: _write,
    CMD_FLUSH: _flush,
    CMD_TRIM: _trim,
    CMD_CACHE: _cache,
    CMD_WRITE_ZEROES: _write_zeroes,
    CMD_BLOCK_STATUS: _block_status,
}
