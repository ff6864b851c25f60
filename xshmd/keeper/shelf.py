# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a keeper keeps: mappings under names, each name's one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, Protocol

from xshmd.errors import Conflict
from xshmd.ports import PageMap
from xshmd.units import DomId, Gfn, bytes_of, is_within

COPY_BYTES: Final = 256 * 1024
"""How much is copied at a time: it comes by the cache twice."""


class Mapper(Protocol):
    """Who can map a domain's frames: Xen."""

    def map_pages(
        self, domid: DomId, first_gfn: Gfn, nr_frames: int, *, writable: bool
    ) -> PageMap: ...


class Shelf:
    """Implements :class:`xshmd.ports.Keeper` in its own process."""

    def __init__(self, xen: Mapper) -> None:
        self._xen = xen
        self._pieces: dict[str, list[tuple[int, PageMap]]] = {}
        """By name: numbers of frames, and their mappings."""

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
        for _, piece in self._pieces.pop(name, ()):
            if wipe:
                piece.wipe()
            piece.close()

    def close(self) -> None:
        """Let go of everything, as the end of the process does."""
        for name in tuple(self._pieces):
            self.drop(name, wipe=False)


_Part = tuple[PageMap, int, int]
