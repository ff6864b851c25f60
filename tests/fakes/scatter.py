# SPDX-License-Identifier: LGPL-2.1-or-later
"""A model of copies within a domain: all frames are there, or nothing is copied."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

from fakes.grants import GrantTables
from fakes.machine import CONTROL_DOMAIN
from fakes.objects import GrantEntry, Page
from xshmd.ranges import ByteRange, nr_frames_of
from xshmd.units import PAGE_SHIFT, PAGE_SIZE, DomId, Gfn
from xshmd.xen.errno_table import failure


class SimulatedCopies(GrantTables):
    """What :meth:`xshmd.ports.Hypervisor.copy_ranges` and its twin do to the machine's pages."""

    def copy_ranges(
        self,
        domid: DomId,
        source: Sequence[ByteRange],
        target: Sequence[ByteRange],
        *,
        count_at: int | None = None,
    ) -> int:
        with self._call("copy_ranges", domid, tuple(source), tuple(target), count_at):
            return self._copy(domid, source, target, count_at)

    def copy_granted(
        self,
        holder: DomId,
        first_ref: int,
        source: Sequence[ByteRange],
        target: Sequence[ByteRange],
        *,
        count_at: int | None = None,
    ) -> int:
        what = first_ref, tuple(source), tuple(target), count_at
        with self._call("copy_granted", holder, *what):
            entries = self._entries(holder, first_ref, nr_frames_of((*target, *source)))
            if any(self._is_of_others(entry) for entry in entries):
                raise failure("writing grants", holder, errno.EBUSY)
            for entry in entries:
                entry.valid = False
            return self._copy(holder, source, target, count_at)

    @staticmethod
    def _is_of_others(entry: GrantEntry) -> bool:
        return entry.in_use or (entry.valid and entry.domid != CONTROL_DOMAIN)

    def _copy(
        self,
        domid: DomId,
        source: Sequence[ByteRange],
        target: Sequence[ByteRange],
        count_at: int | None,
    ) -> int:
        word = [] if count_at is None else [ByteRange(count_at, 8)]
        into, out_of, count = (list(self._bytes(domid, each)) for each in (target, source, word))
        copied = 0
        for (to_page, to_at), (from_page, from_at) in zip(into, out_of, strict=False):
            to_page.write(to_at, from_page.read(from_at, 1))
            copied += 1
        for (page, at), value in zip(count, copied.to_bytes(8, "little"), strict=False):
            page.write(at, bytes([value]))
        return copied

    def _bytes(self, domid: DomId, ranges: Sequence[ByteRange]) -> Iterator[tuple[Page, int]]:
        """Yield where each byte of the ranges is; a frame that is not there fails as a map does."""
        for each in ranges:
            first = each.offset_bytes >> PAGE_SHIFT
            nr_frames = -(-each.end // PAGE_SIZE) - first
            pages = self._mappable(domid, Gfn(first), nr_frames)
            for address in range(each.offset_bytes, each.end):
                yield pages[(address >> PAGE_SHIFT) - first], address % PAGE_SIZE
