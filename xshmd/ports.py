# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the engine needs of Xen, as Protocols: the seam the verified fakes plug into.

``xshmd.xen`` implements :class:`Hypervisor` and :class:`Store` for real; ``tests/fakes`` implements
them for tests.  Nothing here knows cffi, sockets or paths of this machine.  What is not Xen's, the
time and the files, is in :mod:`xshmd.dom0_ports`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol, TypeVar

import trio

from xshmd.machine import DomainInfo, HostInfo, HostRange, MemoryRange
from xshmd.ranges import ByteRange
from xshmd.units import DomId, Gfn, Mfn

T = TypeVar("T")


class Pages(Protocol):
    """Memory that dom0 has mapped."""

    def read(self, offset_bytes: int, nr_bytes: int) -> bytes: ...

    def write(self, offset_bytes: int, data: bytes) -> None: ...

    def wipe(self) -> None:
        """Fill all of it with zeros."""
        ...

    def close(self) -> None:
        """Drop the mapping; may be called again without harm."""
        ...


class LentPages(Pages, Protocol):
    """Pages of dom0's own that a guest may map; closing them ends that, as far as it can be.

    What the guest has mapped by then it may map again until it has unmapped it, or ends; nobody
    tells whether it has.
    """

    @property
    def refs(self) -> tuple[int, ...]:
        """The reference to each, which rise."""
        ...


class PageMap(Pages, Protocol):
    """A dom0 mapping of some domain's frames, which keeps those pages (and the domid) alive."""

    def decrement(self, offset_bytes: int) -> int | None:
        """Take one off an aligned 32-bit word, atomically; None if it is 0, and stays that.

        Returns:
            What is left of it.
        """
        ...


class Hypervisor(Protocol):
    """Xen's control interface.  Synchronous and total: records in, records or an XshmError out.

    Every call may raise :class:`~xshmd.errors.HypercallFailed` (``DomainGone`` for ESRCH).
    Calls block for as long as Xen takes: run them in a thread.
    """

    def host_info(self) -> HostInfo: ...

    def domain_info(self, domid: DomId) -> DomainInfo | None:
        """Return the domain with exactly this domid, or None if there is none."""
        ...

    def domains(self) -> tuple[DomainInfo, ...]:
        """Return every domain, dom0 included, in domid order."""
        ...

    def create_holder_domain(self, uuid: str, *, nr_grant_frames: int = 1) -> DomId:
        """Create a domain by the holder recipe: vCPU 0 there, never to run, owning no page.

        Args:
            uuid: Its handle.
            nr_grant_frames: The most frames that its grant table may have; more than one makes it
                a holder that serves grants, which must never be a target.
        """
        ...

    def destroy(self, domid: DomId) -> None:
        """Destroy the domain; returns when its own foreign references are gone."""
        ...

    def pause(self, domid: DomId) -> None:
        """Add one to the domain's pause count and wait until none of its vCPUs runs."""
        ...

    def unpause(self, domid: DomId) -> None:
        """Take one from the domain's pause count."""
        ...

    def shut_down(self, domid: DomId, reason: int) -> None: ...

    def set_target(self, domid: DomId, target: DomId) -> None:
        """Make ``domid`` privileged over ``target``: once in its life, never undone."""
        ...

    def set_max_pages(self, domid: DomId, nr_pages: int) -> None: ...

    def paging_pool_bytes(self, domid: DomId) -> int: ...

    def set_paging_pool_bytes(self, domid: DomId, size_bytes: int) -> None: ...

    def populate(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> None:
        """Give the domain fresh pages at these frames, all of them or (on error) none."""
        ...

    def depopulate(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> int:
        """Free the domain's pages at these frames; return how many there were."""
        ...

    def zero(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> None:
        """Overwrite the frames with zeros and make that visible to uncached readers."""
        ...

    def flush(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> None:
        """Make what dom0 wrote to the frames visible to uncached readers; x86 has none."""
        ...

    def map_foreign(
        self, guest: DomId, first_gfn: Gfn, holder: DomId, holder_gfn: Gfn, nr_frames: int
    ) -> None:
        """Map the holder's frames into the guest, all of them or (on error) none.

        Raises:
            PartialMap: an entry failed; facts name the first and its errno; all is undone.
        """
        ...

    def unmap(self, guest: DomId, first_gfn: Gfn, nr_frames: int) -> int:
        """Remove whatever the guest has at these frames; return how many there were."""
        ...

    def populated_frames(self, domid: DomId, gfns: Sequence[Gfn]) -> tuple[Gfn, ...]:
        """Return those of ``gfns`` at which dom0 can map a page of the domain."""
        ...

    def map_pages(
        self, domid: DomId, first_gfn: Gfn, nr_frames: int, *, writable: bool
    ) -> PageMap: ...

    def copy_ranges(
        self,
        domid: DomId,
        source: Sequence[ByteRange],
        target: Sequence[ByteRange],
        *,
        count_at: int | None = None,
    ) -> int:
        """Copy bytes of a domain to others of it, the lists taken one after the other.

        No byte but those of ``target`` (and the count) is written; if any frame is not there, none
        is.  Ranges are guest-physical addresses, and no byte is named twice.

        Args:
            domid: Whose memory it is.
            source: What is copied.
            target: Where it goes.
            count_at: Address of an aligned 64-bit little-endian word that then gets the number of
                bytes, after all of them are there.

        Returns:
            How many bytes: those of the shorter of the two lists.
        """
        ...

    def copy_granted(
        self,
        holder: DomId,
        first_ref: int,
        source: Sequence[ByteRange],
        target: Sequence[ByteRange],
        *,
        count_at: int | None = None,
    ) -> int:
        """Copy as :meth:`copy_ranges` does, but have Xen do it: dom0 maps no frame of the lists.

        Args:
            holder: A domain whose grant table is ours to write.
            first_ref: The first of as many consecutive references as the lists have frames
                (:func:`xshmd.ranges.nr_frames_of`), all of them nobody's; they are again after it.
            source, target, count_at: As there; the count's frame is mapped.

        Raises:
            HypercallFailed: EBUSY if one of the references is somebody's; EINVAL if a frame is not
                there, or the table has not so many.  Nothing is copied.
        """
        ...

    def write_grants(
        self,
        holder: DomId,
        first_ref: int,
        nr_frames: int,
        first_gfn: Gfn,
        guest: DomId,
        *,
        readonly: bool,
    ) -> None:
        """Give a guest grant references to the holder's frames from ``first_gfn`` on.

        Args:
            holder: Whose frames and whose grant table they are.
            first_ref: The first of the consecutive references.
            nr_frames: How many frames, and references.
            first_gfn: The first frame.
            guest: Who alone may map them.
            readonly: Whether Xen is to refuse to map them writable.

        Raises:
            HypercallFailed: EBUSY if a domain still maps what one of the references was before;
                the others are written.
        """
        ...

    def end_grants(self, holder: DomId, first_ref: int, nr_frames: int) -> int:
        """Let nobody map these references any more; return how many are still mapped.

        Who has one of those mapped may map it again until its last mapping of it is gone; not
        writable if it was not.
        """
        ...

    def grants_in_use(self, holder: DomId, first_ref: int, nr_frames: int) -> int:
        """Return how many of these references are mapped at this moment."""
        ...

    def map_grants(
        self, holder: DomId, first_ref: int, nr_frames: int, *, writable: bool
    ) -> PageMap:
        """Map references that were given to the control domain into this process."""
        ...

    def lendable_frames(self) -> int:
        """Return how many frames dom0's kernel lends to guests, all together; 0: it cannot."""
        ...

    def lend_pages(self, guest: DomId, nr_frames: int, *, readonly: bool) -> LentPages:
        """Have fresh, zeroed pages of dom0's own that this guest may map, and nobody else.

        Raises:
            HypercallFailed: ENOSPC if they would be more than may be lent, or references are short.
            XenUnavailable: this kernel cannot.
        """
        ...

    def host_ranges(self) -> tuple[HostRange, ...]:
        """Return which of the machine's frames dom0 knows to be no one's RAM, and what they are.

        :func:`xshmd.policy.host_ranges.why_not_shareable` decides on them.
        """
        ...

    def map_host_range(self, guest: DomId, first_gfn: Gfn, first_mfn: Mfn, nr_frames: int) -> None:
        """Permit the guest these machine frames and map them, all of them or (on error) none.

        Xen takes no reference on them and knows no owner; they are mapped uncached (x86: a guest's
        PAT may make that write-combining) or as device memory (Arm).  Nothing may be mapped there:
        x86 crashes a guest for it.
        """
        ...

    def unmap_host_range(
        self, guest: DomId, first_gfn: Gfn, first_mfn: Mfn, nr_frames: int
    ) -> None:
        """Remove the frames, as far as they are mapped there, and withdraw the permission."""
        ...

    def entry_register(self, domid: DomId) -> int | None:
        """Return what an x86 vCPU 0 will find in rbx; None if it is not to run, and on Arm.

        Before its first instruction that is the address of its start info
        (xen/include/public/arch-x86/hvm/start_info.h).
        """
        ...

    def set_memory_map(self, domid: DomId, ranges: Sequence[MemoryRange]) -> None:
        """Replace the map that an x86 guest is given by XENMEM_memory_map; Arm has none: ENOSYS."""
        ...


NOWHERE_LINE: Final = 0
"""Where rings go that nobody is to hear: no port has that number."""


@dataclasses.dataclass(frozen=True, slots=True)
class PortStatus:
    """Whom a port of a domain is for, or bound to."""

    remote: DomId
    remote_port: int
    """The other end's number; 0: nobody has bound it yet, or whoever had is gone."""


class EventChannels(Protocol):
    """Event channels between guests and the control domain, and the relay between two of them.

    A *port* is a number in a guest, a *line* the number of the control domain's end.  Every call
    but :meth:`run` and :meth:`heard` is synchronous and short, and may raise
    :class:`~xshmd.errors.HypercallFailed` (``DomainGone`` for ESRCH).
    """

    def allocate(self, domid: DomId, remote: DomId) -> int:
        """Return a new port of the domain, the lowest free one, that ``remote`` alone may bind."""
        ...

    def status(self, domid: DomId, port: int) -> PortStatus | None:
        """Return whom a port is for; None if it is closed, or no channel between domains."""
        ...

    def bind(self, domid: DomId, port: int) -> int:
        """Bind a guest's port; return the line, which rings once, for what may have been lost."""
        ...

    def unbind(self, line: int) -> None:
        """Give a line up; the guest's port then waits to be bound again, and rings nobody."""
        ...

    def notify(self, line: int) -> None:
        """Ring at the guest's end of a line."""
        ...

    def pass_on(self, line: int, to: int | None) -> None:
        """From now on have each ring of a line ring another; None: report it to :meth:`heard`."""
        ...

    def rings(self, line: int) -> int:
        """Return how often a line has rung; rings that come before it is looked at are one."""
        ...

    def held_up(self) -> int:
        """Return how often any line rang faster than is passed on, and had to wait."""
        ...

    async def run(self) -> None:
        """Pass rings on for as long as it is not cancelled."""
        ...

    async def heard(self) -> tuple[int, ...]:
        """Wait for rings that are not passed on; return their lines, each but once."""
        ...


class Keeper(Protocol):
    """Keeps dom0's mappings of sealed pages for longer than any life of the daemon.

    A sealed page is in no p2m but its members', where dom0 cannot map it: on Arm and in a PVH dom0
    Xen refuses frames that are foreign themselves (xen/arch/arm/mm.c, xenmem_add_to_physmap_one();
    xen/arch/x86/mm/p2m.c, p2m_add_foreign()), and when all members reboot it would be freed.  So a
    mapping made before the seal is the only way to it.

    Memory that dom0 lends is kept there too, as the kernel takes it back from a process that ends.

    Synchronous.  Every call but ``drop`` raises Conflict if there is no keeper.
    """

    def kept(self) -> Mapping[str, int]:
        """Return how many frames are kept under each name."""
        ...

    def keep(self, name: str, domid: DomId, first_gfn: Gfn, nr_frames: int) -> None:
        """Map frames and keep them under a name, after those that are kept under it already."""
        ...

    def copy(self, name: str, source: str, first_frame: int, nr_frames: int) -> None:
        """Copy frames of what is kept as ``source`` to the same frames of what is kept here."""
        ...

    def lend(
        self, name: str, source: str, domid: DomId, nr_frames: int, *, readonly: bool
    ) -> Sequence[tuple[int, int]]:
        """Keep pages that are lent to a domain, unless such are kept under this name already.

        Args:
            name: The name.
            source: Under which name there is what is to be in them; empty: zeros.
            domid: The domain.
            nr_frames: How many.
            readonly: Whether Xen is to refuse to map them writable.

        Returns:
            The references to them, in their order: the first of a range, and how many.

        Raises:
            As :meth:`Hypervisor.lend_pages`; nothing is kept then.
        """
        ...

    def park(self, name: str, source: str, nr_frames: int) -> None:
        """Keep memory that is lent to nobody, unless it is kept already; ``source`` as above."""
        ...

    def read(self, name: str, offset_bytes: int, nr_bytes: int) -> bytes: ...

    def write(self, name: str, offset_bytes: int, data: bytes) -> None: ...

    def drop(self, name: str, *, wipe: bool) -> None:
        """Let go of what is kept under a name, wiped first if so said; without harm if nothing is.

        Wiping is for pages that nobody else has: a living domain's go back to Xen as they are.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class WatchEvent:
    """Something at or below a watched path may have changed.  A hint: read again what matters."""

    path: str


class StoreTransaction(Protocol):
    """Reads and writes of one transaction; see :meth:`Store.transact`."""

    async def read(self, path: str) -> str | None: ...

    async def directory(self, path: str) -> tuple[str, ...] | None: ...

    async def write(self, path: str, value: str) -> None: ...

    async def remove(self, path: str) -> None: ...

    async def set_permissions(self, path: str, permissions: Sequence[str]) -> None: ...


class Store(StoreTransaction, Protocol):
    """xenstore.  Every call raises StoreLost when the connection breaks, TimedOut past a deadline.

    ``read`` and ``directory`` return None for a node that is not there; ``remove`` of such a node
    does nothing.  Values are text.
    """

    @property
    def messages_sent(self) -> int:
        """How many requests went over the wire since the start: a published figure."""
        ...

    async def read_many(self, paths: Sequence[str]) -> tuple[str | None, ...]:
        """Read several nodes in one go (pipelined); same order as ``paths``."""
        ...

    async def write_many(self, items: Sequence[tuple[str, str]]) -> None:
        """Write several nodes in one go (pipelined, in this order, not atomic)."""
        ...

    async def is_introduced(self, domid: DomId) -> bool:
        """Return whether the toolstack has introduced the domain to xenstored."""
        ...

    async def transact(self, body: Callable[[StoreTransaction], Awaitable[T]]) -> T:
        """Run ``body`` in a transaction, again from the start for as long as it conflicts."""
        ...

    def watch(
        self, path: str
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[WatchEvent]]:
        """Watch a path.  One event comes at once; after a reconnect each watch fires again."""
        ...


class HeldLock(Protocol):
    """A lock that is held."""

    def release(self) -> None:
        """Let go of it; may be called again without harm."""
        ...


class CreationLock(Protocol):
    """libxl's lock on a domain's stored configuration: without it ``xl create`` cannot end."""

    def try_hold(self, domid: DomId, uuid: str) -> HeldLock | None:
        """Hold it, or return None at once if somebody else does."""
        ...

    def is_finished(self, domid: DomId, uuid: str) -> bool:
        """Return whether libxl has stored the configuration: all but the unpause is done."""
        ...
