# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hypercall buffers that have owners: memory that Xen may read and write, every page counted.

Xen takes the arguments of most hypercalls from memory of its caller, which must stay resident while
Xen uses it.  Several users have such buffers at a time, so each has an owner, each piece of memory
names its buffer, all of it is bounded, and an owner's end ends its buffers.
"""

from __future__ import annotations

import bisect
import dataclasses
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, NewType, Protocol

from xshmd.errors import (
    AlreadyFreed,
    BufferBusy,
    ForeignBuffer,
    NoSuchBuffer,
    OutOfRange,
    QuotaExceeded,
)
from xshmd.units import PAGE_SIZE, bytes_of, human_size, is_within

BufferId = NewType("BufferId", int)
"""Which buffer: from 1 on, never given again."""
MemRef = NewType("MemRef", int)
"""Memory in a buffer: ``buffer id << 32 | serial << 24 | offset in bytes``.

The serial is the number of the allocation in its buffer, of which eight bits are kept: what is
freed has the same reference again after 256 allocations at the earliest.
"""

_OFFSET_BITS: Final = 24
_SERIAL_BITS: Final = 8
_BUFFER_SHIFT: Final = _OFFSET_BITS + _SERIAL_BITS
MAX_BUFFER_PAGES: Final = 1 << _OFFSET_BITS >> 12
"""Pages of one buffer, at the most: what an offset can name, 16 MiB."""
ALIGN_BYTES: Final = 64
"""What memory in a buffer is aligned to: a cache line, more than any of Xen's structures asks."""


class Pages(Protocol):
    """Pages of this process that stay resident, one after the other in its address space.

    That is what makes data that span pages safe: Xen goes through the caller's page tables for
    each page (xen/arch/arm/guestcopy.c, xen/arch/x86/usercopy.c, xen/arch/x86/hvm/hvm.c).
    """

    @property
    def address(self) -> int:
        """Where in this process's address space they begin."""
        ...

    def read(self, offset_bytes: int, nr_bytes: int) -> bytes: ...

    def write(self, offset_bytes: int, data: bytes) -> None: ...

    def free(self) -> None: ...


class Memory(Protocol):
    """Where pages come from."""

    def allocate(self, nr_pages: int) -> Pages:
        """Return so many pages, all zero.

        Raises:
            OutOfMemory: there are none.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one owner, and all of them together, may have."""

    total_pages: int = 2048
    pages_per_owner: int = 256
    buffers_per_owner: int = 16
    pieces_per_buffer: int = 256


class Lent:
    """Memory that a hypercall may use now, and nobody but who has this.

    Attributes:
        address: Where it begins in this process's address space.
        size_bytes: How much it is.
    """

    def __init__(self, pages: Pages, offset_bytes: int, size_bytes: int) -> None:
        self._pages, self._offset = pages, offset_bytes
        self.address, self.size_bytes = pages.address + offset_bytes, size_bytes

    def read(self, nr_bytes: int) -> bytes:
        """Return its first bytes."""
        return self._pages.read(self._offset, min(nr_bytes, self.size_bytes))


@dataclasses.dataclass(slots=True)
class _Piece:
    offset: int
    size_bytes: int
    serial: int
    in_use: bool = False

    @property
    def end(self) -> int:
        return -(-(self.offset + self.size_bytes) // ALIGN_BYTES) * ALIGN_BYTES


class _Buffer:
    """One buffer and what is allocated in it."""

    def __init__(self, buffer_id: BufferId, owner: Owner, pages: Pages, nr_pages: int) -> None:
        self.buffer_id, self.owner, self.pages, self.nr_pages = buffer_id, owner, pages, nr_pages
        self.pieces: list[_Piece] = []
        """In the order of their offsets."""
        self.issued: dict[int, int] = {}
        """The offset that each serial was last given for."""
        self.nr_issued = 0
        self.doomed = False
        """Its owner has ended; it goes when the last use of it does."""

    @property
    def busy(self) -> bool:
        return any(piece.in_use for piece in self.pieces)

    def gap(self, nr_bytes: int) -> int | None:
        """Return the first offset at which so many bytes are free."""
        start = 0
        for piece in self.pieces:
            if piece.offset - start >= nr_bytes:
                return start
            start = piece.end
        return start if bytes_of(self.nr_pages) - start >= nr_bytes else None


class Buffers:
    """All hypercall buffers of this process.

    Args:
        memory: Where their pages come from.
        limits: How many there may be.

    Synchronization: any thread may call anything.
    """

    def __init__(self, memory: Memory, limits: Limits | None = None) -> None:
        self._memory, self.limits = memory, limits or Limits()
        self._lock = threading.Lock()
        self._buffers: dict[BufferId, _Buffer] = {}
        self._last_id = 0

    def owner(self, name: str) -> Owner:
        """Return a new owner.

        Args:
            name: Who that is, for messages.
        """
        return Owner(self, name)

    def close(self) -> None:
        """Free all buffers, when nobody uses any; may be called again without harm."""
        with self._lock:
            for buffer in list(self._buffers.values()):
                self._drop(buffer)

    @property
    def nr_buffers(self) -> int:
        """How many buffers there are."""
        return len(self._buffers)

    @property
    def nr_pages(self) -> int:
        """How many pages all of them have."""
        with self._lock:
            return _pages(self._buffers.values())

    # -- what owners do; all under the lock -----------------------------------------------------

    def _allocate(self, owner: Owner, nr_pages: int) -> BufferId:
        with self._lock:
            self._check_quota(owner, nr_pages)
            pages = self._memory.allocate(nr_pages)
            self._last_id += 1
            buffer_id = BufferId(self._last_id)
            self._buffers[buffer_id] = _Buffer(buffer_id, owner, pages, nr_pages)
            return buffer_id

    def _check_quota(self, owner: Owner, nr_pages: int) -> None:
        if not 1 <= nr_pages <= MAX_BUFFER_PAGES:
            raise OutOfRange(
                f"a buffer of {nr_pages} pages",
                hint=f"a buffer has 1 to {MAX_BUFFER_PAGES} pages",
            )
        if owner.closed:
            raise NoSuchBuffer(f"{owner.name} has ended, and its buffers with it")
        limits = self.limits
        own = [buffer for buffer in self._buffers.values() if buffer.owner is owner]
        for have, more, most, what in (
            (len(own), 1, limits.buffers_per_owner, f"buffers of {owner.name}"),
            (_pages(own), nr_pages, limits.pages_per_owner, f"pages of {owner.name}"),
            (
                _pages(self._buffers.values()), nr_pages, limits.total_pages,
                "pages of all buffers",
            ),
        ):  # fmt: skip
            if have + more > most:
                raise QuotaExceeded(
                    f"{more} more would make {have + more} {what}, and {most} is the most",
                    hint="free a buffer, or use one again",
                    limit=most,
                )

    def _find(self, owner: Owner, buffer_id: int) -> _Buffer:
        buffer = self._buffers.get(BufferId(buffer_id))
        if buffer is not None and buffer.owner is owner and not buffer.doomed:
            return buffer
        if buffer is not None and buffer.owner is not owner:
            raise ForeignBuffer(f"buffer {buffer_id} is not {owner.name}'s", buffer=buffer_id)
        if 1 <= buffer_id <= self._last_id:
            raise AlreadyFreed(f"buffer {buffer_id} has been freed", buffer=buffer_id)
        raise NoSuchBuffer(f"there never was a buffer {buffer_id}", buffer=buffer_id)

    def _find_piece(self, owner: Owner, reference: int) -> tuple[_Buffer, _Piece]:
        buffer = self._find(owner, reference >> _BUFFER_SHIFT)
        offset = reference & ((1 << _OFFSET_BITS) - 1)
        serial = reference >> _OFFSET_BITS & ((1 << _SERIAL_BITS) - 1)
        for piece in buffer.pieces:
            if piece.offset == offset and piece.serial == serial:
                return buffer, piece
        if buffer.issued.get(serial) == offset:
            raise AlreadyFreed(f"memory {reference:#x} has been freed", reference=reference)
        raise OutOfRange(
            f"buffer {buffer.buffer_id} never gave out memory {reference:#x}", reference=reference
        )

    def _free(self, owner: Owner, buffer_id: int) -> None:
        with self._lock:
            buffer = self._find(owner, buffer_id)
            if buffer.busy:
                raise _busy(f"buffer {buffer_id}")
            self._drop(buffer)

    def _drop(self, buffer: _Buffer) -> None:
        del self._buffers[buffer.buffer_id]
        buffer.pages.free()

    def _allocate_piece(self, owner: Owner, buffer_id: int, nr_bytes: int) -> MemRef:
        with self._lock:
            buffer = self._find(owner, buffer_id)
            if nr_bytes < 1:
                raise OutOfRange(f"{nr_bytes} bytes of a buffer", hint="ask for 1 at least")
            if len(buffer.pieces) >= self.limits.pieces_per_buffer:
                raise QuotaExceeded(
                    f"buffer {buffer_id} has its {len(buffer.pieces)} pieces already",
                    hint="free some, or use another buffer",
                    limit=self.limits.pieces_per_buffer,
                )
            offset = buffer.gap(nr_bytes)
            if offset is None:
                raise QuotaExceeded(
                    f"buffer {buffer_id} has no {nr_bytes} bytes in one piece left of its "
                    f"{human_size(bytes_of(buffer.nr_pages))}",
                    hint="a buffer never grows: have one of as many pages as it will take",
                    limit=bytes_of(buffer.nr_pages),
                )
            serial = buffer.nr_issued & ((1 << _SERIAL_BITS) - 1)
            piece = _Piece(offset, nr_bytes, serial)
            bisect.insort(buffer.pieces, piece, key=lambda each: each.offset)
            buffer.issued[serial] = offset
            buffer.nr_issued += 1
            return MemRef(buffer.buffer_id << _BUFFER_SHIFT | serial << _OFFSET_BITS | offset)

    def _free_piece(self, owner: Owner, reference: int) -> None:
        with self._lock:
            buffer, piece = self._find_idle(owner, reference)
            # Who has the memory next shall not find another's data in it.
            buffer.pages.write(piece.offset, bytes(piece.size_bytes))
            buffer.pieces.remove(piece)

    def _find_idle(self, owner: Owner, reference: int) -> tuple[_Buffer, _Piece]:
        buffer, piece = self._find_piece(owner, reference)
        if piece.in_use:
            raise _busy(f"memory {reference:#x}")
        return buffer, piece

    def _begin_use(self, owner: Owner, reference: int) -> tuple[_Buffer, _Piece]:
        with self._lock:
            buffer, piece = self._find_idle(owner, reference)
            piece.in_use = True
            return buffer, piece

    def _end_use(self, buffer: _Buffer, piece: _Piece) -> None:
        with self._lock:
            piece.in_use = False
            if buffer.doomed and not buffer.busy:
                self._drop(buffer)

    def _close(self, owner: Owner) -> None:
        with self._lock:
            owner.closed = True
            for buffer in [each for each in self._buffers.values() if each.owner is owner]:
                buffer.doomed = True
                if not buffer.busy:
                    self._drop(buffer)

    def _read(self, owner: Owner, reference: int, offset_bytes: int, nr_bytes: int) -> bytes:
        with self._lock:
            buffer, piece = self._find_idle(owner, reference)
            _check_inside(piece, reference, offset_bytes, nr_bytes)
            return buffer.pages.read(piece.offset + offset_bytes, nr_bytes)

    def _write(self, owner: Owner, reference: int, offset_bytes: int, data: bytes) -> None:
        with self._lock:
            buffer, piece = self._find_idle(owner, reference)
            _check_inside(piece, reference, offset_bytes, len(data))
            buffer.pages.write(piece.offset + offset_bytes, data)


class Owner:
    """Somebody who has buffers.  Made by :meth:`Buffers.owner`; closing it frees all it has.

    Every method may raise ``NoSuchBuffer``, ``AlreadyFreed`` (a second free as well), and
    ``ForeignBuffer`` for what belongs to another owner.
    """

    def __init__(self, buffers: Buffers, name: str) -> None:
        self._buffers, self.name = buffers, name
        self.closed = False

    def alloc_buf(self, nr_pages: int) -> BufferId:
        """Return a new buffer of so many pages, which it has for ever.

        Raises:
            OutOfRange: no buffer can have so many.
            QuotaExceeded: it would be more than this owner, or all together, may have.
            OutOfMemory: dom0 has none.
        """
        return self._buffers._allocate(self, nr_pages)

    def free_buf(self, buffer_id: BufferId) -> None:
        """Free a buffer and all memory in it.

        Raises:
            BufferBusy: a hypercall uses some of it.
        """
        self._buffers._free(self, buffer_id)

    def alloc_mem(self, buffer_id: BufferId, nr_bytes: int) -> MemRef:
        """Return a reference to so many zeroed bytes of a buffer, in one piece.

        Raises:
            OutOfRange: no bytes at all.
            QuotaExceeded: the buffer has not that much left, or is in too many pieces.
        """
        return self._buffers._allocate_piece(self, buffer_id, nr_bytes)

    def free_mem(self, reference: MemRef) -> None:
        """Give memory back to its buffer.

        Raises:
            OutOfRange: the buffer never gave out such a reference.
            BufferBusy: a hypercall uses it.
        """
        self._buffers._free_piece(self, reference)

    def read(self, reference: MemRef, offset_bytes: int, nr_bytes: int) -> bytes:
        """Return some bytes of the memory.

        Raises:
            OutOfRange: they are not all in it.
            BufferBusy: a hypercall uses it.
        """
        return self._buffers._read(self, reference, offset_bytes, nr_bytes)

    def write(self, reference: MemRef, offset_bytes: int, data: bytes) -> None:
        """Put bytes into the memory.  Raises as :meth:`read` does."""
        self._buffers._write(self, reference, offset_bytes, data)

    @contextmanager
    def use(self, reference: MemRef) -> Iterator[Lent]:
        """Lend the memory to one hypercall: until the block ends nobody else has it.

        If the owner ends meanwhile, its pages are freed when the block ends and no sooner.

        Raises:
            OutOfRange: the buffer never gave out such a reference.
            BufferBusy: another hypercall uses it.
        """
        buffer, piece = self._buffers._begin_use(self, reference)
        try:
            yield Lent(buffer.pages, piece.offset, piece.size_bytes)
        finally:
            self._buffers._end_use(buffer, piece)

    def close(self) -> None:
        """Free everything it has; may be called again without harm."""
        self._buffers._close(self)

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pages_for(nr_bytes: int) -> int:
    """Return how many pages so many bytes take."""
    return -(-nr_bytes // PAGE_SIZE)


def _pages(buffers: Iterable[_Buffer]) -> int:
    return sum(buffer.nr_pages for buffer in buffers)


def _busy(what: str) -> BufferBusy:
    return BufferBusy(f"{what} is in use by a hypercall", hint="try again when that has returned")


def _check_inside(piece: _Piece, reference: int, offset_bytes: int, nr_bytes: int) -> None:
    if not is_within(offset_bytes, nr_bytes, piece.size_bytes):
        raise OutOfRange(
            f"{nr_bytes} bytes at {offset_bytes} are not in memory {reference:#x}",
            hint=f"it has {piece.size_bytes} bytes",
            reference=reference,
        )
