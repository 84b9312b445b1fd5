"""The qcow2 format, as QEMU's ``docs/interop/qcow2`` specifies it.

Rooms: ``layout`` (constants and structures), ``header``, ``tables`` (cached tables), ``refcounts``, ``mapping`` (L1 and L2), ``allocator``,
``writeback`` (the order in which metadata reaches the file), ``overlap`` (what may be written where), ``driver`` (the node), ``create``,
``resize``, ``snapshots``, ``compression``, ``check`` and ``repair``.
"""
