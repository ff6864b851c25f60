# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies lists of bytes within a domain: one map of each list's frames, one call into C for both.

The C code (``c/stable.c``) checks every range again, and runs without Python's global lock.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from xshmd.errors import OutOfRange
from xshmd.ranges import ByteRange
from xshmd.units import PAGE_SHIFT, PAGE_SIZE, DomId, bytes_of
from xshmd.xen.errno_table import failure

WORD_BYTES: Final = 8
"""Of the count."""


class Binding(NamedTuple):
    """The compiled module and an open handle for foreign memory."""

    lib: Any
    ffi: Any
    foreign: Any


class Window(NamedTuple):
    """A mapping of all frames of a list, and where in it each of its ranges is."""

    address: Any
    nr_frames: int
    pieces: Any


def copy_ranges(
    binding: Binding,
    domid: DomId,
    source: Sequence[ByteRange],
    target: Sequence[ByteRange],
    count_at: int | None,
) -> int:
    """Do as :meth:`xshmd.ports.Hypervisor.copy_ranges`."""
    count = [] if count_at is None else [ByteRange(count_at, WORD_BYTES)]
    with contextlib.ExitStack() as maps:
        into = maps.enter_context(_window(binding, domid, target, writable=True))
        out_of = maps.enter_context(_window(binding, domid, source, writable=False))
        # Before anything is copied, so that a count that has nowhere to go costs nothing.
        words = [maps.enter_context(_window(binding, domid, count, writable=True)) for _ in count]
        nr_bytes = binding.lib.xshm_scatter_copy(
            into.address, bytes_of(into.nr_frames), into.pieces, len(target),
            out_of.address, bytes_of(out_of.nr_frames), out_of.pieces, len(source),
        )  # fmt: skip
        if nr_bytes < 0:
            raise OutOfRange(f"the ranges do not fit their memory: {os.strerror(-nr_bytes)}")
        for word in words:
            start = binding.ffi.cast("char *", word.address) + word.pieces[0].offset
            binding.lib.xshm_store_count(start, nr_bytes)
        return int(nr_bytes)


@contextlib.contextmanager
def _window(
    binding: Binding, domid: DomId, ranges: Sequence[ByteRange], *, writable: bool
) -> Iterator[Window]:
    lib, ffi, foreign = binding
    gfns: list[int] = []
    pieces = ffi.new("xshm_piece[]", len(ranges))
    for piece, wanted in zip(pieces, ranges, strict=True):
        first, skip = wanted.offset_bytes >> PAGE_SHIFT, wanted.offset_bytes % PAGE_SIZE
        piece.offset, piece.length = bytes_of(len(gfns)) + skip, wanted.nr_bytes
        # A frame that two ranges lie in is mapped twice: each range is in one piece that way.
        gfns += range(first, first + -(-(skip + wanted.nr_bytes) // PAGE_SIZE))
    nr_bad, error = ffi.new("size_t *"), ffi.new("int *")
    address = lib.xshm_foreign_map_frames(foreign, domid, writable, gfns, len(gfns), nr_bad, error)
    if address == ffi.NULL:
        raise failure("xenforeignmemory_map", domid, error[0], first_gfn=gfns[0])
    try:
        if nr_bad[0]:
            raise failure("xenforeignmemory_map", domid, error[0], first_gfn=gfns[0])
        yield Window(address, len(gfns), pieces)
    finally:
        lib.xenforeignmemory_unmap(foreign, address, len(gfns))
