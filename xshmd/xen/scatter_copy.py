# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies lists of bytes within a domain: one map of each list's frames, one call into C for both.

Or no map but one of a few frames of the domain's grant table, and Xen copies.  The C code
(``c/stable.c``) checks every range again, and runs without Python's global lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from xshmd.errors import OutOfRange
from xshmd.ranges import ByteRange, nr_frames_of
from xshmd.units import DOMID_0, PAGE_SHIFT, PAGE_SIZE, DomId, bytes_of
from xshmd.xen.errno_table import failure

WORD_BYTES: Final = 8
"""Of the count."""


class Binding(NamedTuple):
    """The compiled module and an open handle for foreign memory."""

    lib: Any
    ffi: Any
    foreign: Any


class Granting(NamedTuple):
    """What it takes to give dom0 references to a domain's frames for a moment."""

    gnttab: Any
    table: Any
    """Where the entries are mapped,"""
    at: int
    """which of them there is the first,"""
    first_ref: int
    """and which reference that is."""


class Window(NamedTuple):
    """A mapping of all frames of a list, and where in it each of its ranges is."""

    address: Any
    nr_frames: int
    pieces: Any


class Spread(NamedTuple):
    """The frames of a list, one range after the other, and where in them each range is."""

    gfns: list[int]
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
            _store_count(binding, word, nr_bytes)
        return int(nr_bytes)


def copy_granted(
    binding: Binding,
    granting: Granting,
    holder: DomId,
    source: Sequence[ByteRange],
    target: Sequence[ByteRange],
    count_at: int | None,
) -> int:
    """Do as :meth:`xshmd.ports.Hypervisor.copy_granted`."""
    lib, ffi, _ = binding
    gnttab, table, at, first_ref = granting
    count = [] if count_at is None else [ByteRange(count_at, WORD_BYTES)]
    into, out_of = _spread(ffi, target), _spread(ffi, source)
    gfns = into.gfns + out_of.gfns
    with contextlib.ExitStack() as maps:
        # Xen's own copy may come byte by byte, so the count is stored from here.
        words = [maps.enter_context(_window(binding, holder, count, writable=True)) for _ in count]
        taken = lib.xshm_grants_of_others(table, at, len(gfns), DOMID_0)
        if taken:
            raise failure("writing grants", holder, errno.EBUSY, first_ref=first_ref, busy=taken)
        maps.callback(lib.xshm_grants_end, table, at, len(gfns))  # whatever comes
        for ranges, readonly in ((target, False), (source, True)):
            for each in ranges:
                nr_frames = nr_frames_of((each,))
                first_gfn = each.offset_bytes >> PAGE_SHIFT
                lib.xshm_grants_write(table, at, nr_frames, DOMID_0, first_gfn, readonly)
                at += nr_frames
        nr_bytes = lib.xshm_grant_copy(
            gnttab, holder,
            ffi.new("xshm_granted *", (first_ref, len(into.gfns), into.pieces, len(target))),
            ffi.new(
                "xshm_granted *",
                (first_ref + len(into.gfns), len(out_of.gfns), out_of.pieces, len(source)),
            ),
        )  # fmt: skip
        if nr_bytes < 0:
            raise failure("xengnttab_grant_copy", holder, -nr_bytes, first_gfn=gfns[0])
        for word in words:
            _store_count(binding, word, nr_bytes)
        return int(nr_bytes)


def _store_count(binding: Binding, word: Window, nr_bytes: int) -> None:
    start = binding.ffi.cast("char *", word.address) + word.pieces[0].offset
    binding.lib.xshm_store_count(start, nr_bytes)


def _spread(ffi: Any, ranges: Sequence[ByteRange]) -> Spread:
    gfns: list[int] = []
    pieces = ffi.new("xshm_piece[]", len(ranges))
    for piece, wanted in zip(pieces, ranges, strict=True):
        first, skip = wanted.offset_bytes >> PAGE_SHIFT, wanted.offset_bytes % PAGE_SIZE
        piece.offset, piece.length = bytes_of(len(gfns)) + skip, wanted.nr_bytes
        # A frame that two ranges lie in is there twice: each range is in one piece that way.
        gfns += range(first, first + -(-(skip + wanted.nr_bytes) // PAGE_SIZE))
    return Spread(gfns, pieces)


@contextlib.contextmanager
def _window(
    binding: Binding, domid: DomId, ranges: Sequence[ByteRange], *, writable: bool
) -> Iterator[Window]:
    lib, ffi, foreign = binding
    gfns, pieces = _spread(ffi, ranges)
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
