#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What copying by lists costs, next to memcpy of as many bytes between the same two mappings.

    scatter_in_dom0.py PAIRS        its measurements as JSON on stdout

``copy`` is the call into C alone, ``whole`` with the mapping and unmapping that every transfer has;
``granted`` is a transfer where guests map themselves, and Xen copies.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from xshmd.policy.identity import new_holder_uuid
from xshmd.ranges import MAX_LIST_BYTES, ByteRange
from xshmd.units import DomId, Gfn, bytes_of, frames_of
from xshmd.xen import _ffi
from xshmd.xen.hypervisor import XenHypervisor

HOLDER_GFN: Final = Gfn(0x40200)
FRAMES: Final = 2 * frames_of(MAX_LIST_BYTES)
"""The first half is copied to the second."""
GRANT_FRAMES: Final = 16
"""Of the holder's table: room for a reference to each frame of both halves, and some."""
FIRST_REF: Final = 8
POOL_BYTES: Final = 1 << 20
SEGMENTS: Final = {"4 KiB": (4 << 10, 64), "64 KiB": (64 << 10, 64), "2 MiB": (2 << 20, 4)}
"""Bytes of a segment, and how many of them are in a list."""
LEAST_S: Final = 0.05
"""How long a figure is measured at least."""


def spread(size_bytes: int, number: int, start: int) -> list[ByteRange]:
    """Segments from the last to the first, with room between them where there is any."""
    step = MAX_LIST_BYTES // number
    return [ByteRange(start + index * step, size_bytes) for index in reversed(range(number))]


def seconds(work: Callable[[], object]) -> float:
    """How long one turn takes, over as many as make it worth measuring."""
    turns, began = 0, time.perf_counter()
    while True:
        work()
        turns += 1
        took = time.perf_counter() - began
        if took >= LEAST_S:
            return took / turns


class Mapped:
    """Both halves of a holder's pages, mapped into dom0."""

    def __init__(self, domid: DomId) -> None:
        self._ffi, self._lib = _ffi.stable()
        self._foreign = self._lib.xshm_foreign_open()
        bad, error = self._ffi.new("size_t *"), self._ffi.new("int *")
        half = FRAMES // 2
        self.source, self.target = (
            self._lib.xshm_foreign_map(self._foreign, domid, True, first, half, bad, error)
            for first in (HOLDER_GFN, HOLDER_GFN + half)
        )
        assert bad[0] == 0
        assert error[0] == 0

    def close(self) -> None:
        """Unmap them, or the holder could not go."""
        for start in (self.source, self.target):
            self._lib.xenforeignmemory_unmap(self._foreign, start, FRAMES // 2)
        self._lib.xenforeignmemory_close(self._foreign)

    def memcpy(self, nr_bytes: int) -> None:
        """As many bytes in one piece."""
        self._ffi.memmove(self.target, self.source, nr_bytes)

    def copier(self, size_bytes: int, number: int) -> Callable[[], int]:
        """Return what copies a list to a list."""
        ranges = [(each.offset_bytes, each.nr_bytes) for each in spread(size_bytes, number, 0)]
        pieces = self._ffi.new("xshm_piece[]", ranges)
        into = (self.target, MAX_LIST_BYTES, pieces, number)
        out_of = (self.source, MAX_LIST_BYTES, pieces, number)
        return lambda: int(self._lib.xshm_scatter_copy(*into, *out_of))


def measure(pairs: int) -> dict[str, Any]:
    """Every size in turn, again and again."""
    columns: dict[str, list[float]] = {}
    with XenHypervisor() as xen:
        domid = xen.create_holder_domain(new_holder_uuid(), nr_grant_frames=GRANT_FRAMES)
        try:
            xen.set_paging_pool_bytes(domid, POOL_BYTES)
            xen.set_max_pages(domid, FRAMES)
            xen.populate(domid, HOLDER_GFN, FRAMES)
            xen.zero(domid, HOLDER_GFN, FRAMES)
            xen.set_max_pages(domid, 0)
            mapped = Mapped(domid)
            start = bytes_of(HOLDER_GFN)
            for turn in range(pairs + 1):  # the first is to warm up
                for name, (size, number) in SEGMENTS.items():
                    copy = mapped.copier(size, number)
                    assert copy() == size * number
                    source = spread(size, number, start)
                    target = spread(size, number, start + MAX_LIST_BYTES)
                    kinds: dict[str, Callable[[], object]] = {
                        "memcpy": functools.partial(mapped.memcpy, size * number),
                        "copy": copy,
                        "whole": functools.partial(xen.copy_ranges, domid, source, target),
                        "granted": functools.partial(
                            xen.copy_granted, domid, FIRST_REF, source, target
                        ),
                    }
                    first = turn % len(kinds)
                    order = list(kinds)[first:] + list(kinds)[:first]
                    for kind in order:
                        took = seconds(kinds[kind])
                        if turn:
                            columns.setdefault(f"{name} {kind}", []).append(took)
                print(f"scatter {turn}/{pairs}", file=sys.stderr, flush=True)
            mapped.close()
        finally:
            xen.destroy(domid)
    return {"series": columns, "segments": SEGMENTS}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
