# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a keeper keeps: mappings under names, each name's one after the other."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Protocol

from xshmd.errors import Conflict
from xshmd.ports import LentPages, PageMap, Pages
from xshmd.units import DomId, Gfn, bytes_of, is_within

COPY_BYTES: Final = 256 * 1024
"""How much is copied at a time: it comes by the cache twice."""


class Mapper(Protocol):
    """Who can map a domain's frames, and lend dom0's: Xen, and dom0's kernel."""

    def map_pages(
        self, domid: DomId, first_gfn: Gfn, nr_frames: int, *, writable: bool
    ) -> PageMap: ...

    def lend_pages(self, guest: DomId, nr_frames: int, *, readonly: bool) -> LentPages: ...


class Plain:
    """Memory of this process alone.  See :class:`xshmd.ports.Pages`."""

    def __init__(self, nr_frames: int) -> None:
        self._view = mmap.mmap(-1, bytes_of(nr_frames))

    def read(self, offset_bytes: int, nr_bytes: int) -> bytes:
        return self._view[offset_bytes : offset_bytes + nr_bytes]

    def write(self, offset_bytes: int, data: bytes) -> None:
        self._view[offset_bytes : offset_bytes + len(data)] = data

    def wipe(self) -> None:
        """Nothing is to be done: whoever has the memory next has it zeroed by the kernel."""

    def close(self) -> None:
        self._view.close()


class Shelf:
    """Implements :class:`xshmd.ports.Keeper` in its own process."""

    def __init__(self, xen: Mapper) -> None:
        self._xen = xen
        self._pieces: dict[str, list[tuple[int, Pages]]] = {}
        """By name: numbers of frames, and their mappings."""
        self._refs: dict[str, tuple[int, ...]] = {}
        """Of what is lent: the reference to each frame."""

    def kept(self) -> Mapping[str, int]:
        return {name: sum(nr for nr, _ in pieces) for name, pieces in self._pieces.items()}

    def keep(self, name: str, domid: DomId, first_gfn: Gfn, nr_frames: int) -> None:
        piece = self._xen.map_pages(domid, first_gfn, nr_frames, writable=True)
        self._pieces.setdefault(name, []).append((nr_frames, piece))

    def copy(self, name: str, source: str, first_frame: int, nr_frames: int) -> None:
        end = bytes_of(first_frame + nr_frames)
        for start in range(bytes_of(first_frame), end, COPY_BYTES):
            count = min(COPY_BYTES, end - start)
            self.write(name, start, self.read(source, start, count))

    def lend(
        self, name: str, source: str, domid: DomId, nr_frames: int, *, readonly: bool
    ) -> Sequence[tuple[int, int]]:
        if name not in self._refs:
            pages = self._xen.lend_pages(domid, nr_frames, readonly=readonly)
            self._add(name, source, pages, nr_frames)
            self._refs[name] = pages.refs
        return ranges(self._refs[name])

    def park(self, name: str, source: str, nr_frames: int) -> None:
        if name not in self._pieces:
            self._add(name, source, Plain(nr_frames), nr_frames)

    def _add(self, name: str, source: str, pages: Pages, nr_frames: int) -> None:
        self._pieces[name] = [(nr_frames, pages)]
        try:
            if source:
                self.copy(name, source, 0, nr_frames)
        except BaseException:
            self.drop(name, wipe=True)
            raise

    def read(self, name: str, offset_bytes: int, nr_bytes: int) -> bytes:
        parts = self._parts(name, offset_bytes, nr_bytes)
        return b"".join(piece.read(at, count) for piece, at, count in parts)

    def write(self, name: str, offset_bytes: int, data: bytes) -> None:
        done = 0
        for piece, at, count in self._parts(name, offset_bytes, len(data)):
            piece.write(at, data[done : done + count])
            done += count

    def _parts(self, name: str, offset_bytes: int, nr_bytes: int) -> Iterator[_Part]:
        """Yield the mappings that have these bytes, each with where in it and how many."""
        if name not in self._pieces:
            raise Conflict(f"xshmd-keeper keeps nothing as {name}", hint="it may be another by now")
        start, end = 0, offset_bytes + nr_bytes
        kept_bytes = bytes_of(sum(nr_frames for nr_frames, _ in self._pieces[name]))
        if not is_within(offset_bytes, nr_bytes, kept_bytes):
            raise Conflict(f"xshmd-keeper keeps fewer than {end} bytes as {name}")
        for nr_frames, piece in self._pieces[name]:
            stop = start + bytes_of(nr_frames)
            first, last = max(start, offset_bytes), min(stop, end)
            if first < last:
                yield piece, first - start, last - first
            start = stop

    def drop(self, name: str, *, wipe: bool) -> None:
        self._refs.pop(name, None)
        for _, piece in self._pieces.pop(name, ()):
            if wipe:
                piece.wipe()
            piece.close()

    def close(self) -> None:
        """Let go of everything, as the end of the process does."""
        for name in tuple(self._pieces):
            self.drop(name, wipe=False)


_Part = tuple[Pages, int, int]


def ranges(refs: Sequence[int]) -> list[tuple[int, int]]:
    """Return rising numbers as ranges: the first of each, and how many."""
    found: list[tuple[int, int]] = []
    for ref in refs:
        if found and ref == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((ref, 1))
    return found
