# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the engine needs of the outside, as Protocols: the seam the verified fakes plug into.

``xshmd.xen`` implements :class:`Hypervisor` and :class:`Store` for real; ``tests/fakes`` implements
them for tests.  Nothing here knows cffi, sockets or paths of this machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol, TypeVar

import trio

from xshmd.errors import XshmError
from xshmd.model import (
    Change,
    Declarations,
    DomainInfo,
    Event,
    Guest,
    GuestConfig,
    HostInfo,
    HostPolicy,
    HostRange,
    Lease,
    MemoryRange,
    Process,
    Prot,
    RegionConfig,
    Snapshot,
    Step,
)
from xshmd.ranges import ByteRange, Part
from xshmd.units import DomId, Gfn, Mfn

T = TypeVar("T")

MAX_ACCESS_BYTES: Final = 64 * 1024
"""How much of a region a client may read or write at a time: the daemon's loop waits meanwhile."""


class PageMap(Protocol):
    """A dom0 mapping of some domain's frames, which keeps those pages (and the domid) alive."""

    def read(self, offset_bytes: int, nr_bytes: int) -> bytes: ...

    def write(self, offset_bytes: int, data: bytes) -> None: ...

    def decrement(self, offset_bytes: int) -> int | None:
        """Take one off an aligned 32-bit word, atomically; None if it is 0, and stays that.

        Returns:
            What is left of it.
        """
        ...

    def wipe(self) -> None:
        """Fill all of it with zeros."""
        ...

    def close(self) -> None:
        """Drop the mapping; may be called again without harm."""
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


class Clock(Protocol):
    """Time, injected so that a reboot's grace can be tested without waiting."""

    def now(self) -> float:
        """Return seconds since the epoch, for people: an admin or NTP may set it at any moment."""
        ...

    def uptime(self) -> float:
        """Return seconds since the machine started, which nobody sets."""
        ...


class ConfigFinder(Protocol):
    """Finds what a new domain's configuration says about shared memory."""

    def find(self, *, name: str, uuid: str) -> GuestConfig | None:
        """Return the configuration of the guest of this name, or None if nobody has one.

        Raises:
            ConfigError, ConfigUnreadable: it was found, and is wrong.
        """
        ...

    def complete(self, config: GuestConfig) -> GuestConfig:
        """Return a configuration from elsewhere with what files of ours add, and placed.

        Raises:
            ConfigError, Conflict: what they say together is wrong.
        """
        ...

    def known(self) -> tuple[GuestConfig, ...]:
        """Return every readable configuration with shared memory in the usual places."""
        ...

    def regions(self) -> tuple[RegionConfig, ...]:
        """Return every region that a readable file in the usual places defines for the system."""
        ...

    def policy(self) -> HostPolicy | XshmError:
        """Return what the administrator lets guests have, as the file says now.

        Returns:
            That, or a ConfigError or ConfigUnreadable: then nobody may have anything new.
        """
        ...

    def declarations(self) -> Declarations:
        """Read all files of ours anew, and return what they say.

        Raises:
            ConfigError, ConfigUnreadable: any of them is wrong; all that is wrong with all of them.
        """
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


class Processes(Protocol):
    """The processes of the control domain."""

    def started_at(self, pid: int) -> int | None:
        """Return when a process began, in ticks since the boot; None if there is no such."""
        ...


class HeldLease(Protocol):
    """A lease while its process is connected."""

    @property
    def lease(self) -> Lease: ...

    async def wait_ending(self) -> str:
        """Return why the region is wanted back, once it is."""
        ...


class RegionsApi(Protocol):
    """What the daemon offers to its clients; the Varlink service is a thin skin over this."""

    def snapshot(self) -> Snapshot: ...

    async def declare(self, config: GuestConfig) -> GuestConfig:
        """Check this configuration and use it for the next domain of its name.

        Returns:
            The configuration with what files of ours add to it, and all of it placed.

        Raises:
            ConfigError, Refused, Conflict, OutOfMemory: it cannot be given; nothing is kept.
        """
        ...

    async def withdraw(self, name: str) -> None:
        """Forget a declaration that no domain has used; does nothing if there is none."""
        ...

    async def wait_guest(self, name: str, timeout_s: float) -> Guest:
        """Return the guest once it has its regions.

        Raises:
            TimedOut: it did not get them in time.
            Refused, Conflict, ...: it could not be given them; the reason the gate had.
        """
        ...

    async def host(self) -> HostInfo: ...

    async def apply(self, changes: Sequence[Change], *, dry_run: bool = False) -> tuple[Step, ...]:
        """Carry out all of the changes, or none of them, on guests that run.

        Each guest is paused while its memory changes.  What is made comes first and what is taken
        away last, so that nothing need be put back if a step fails.

        Args:
            changes: What to do; their order does not matter.
            dry_run: Check everything, do nothing.

        Returns:
            The steps, as they were or would be taken.

        Raises:
            NoSuchGuest, NoSuchRegion, ConfigError, Refused, Conflict, OutOfMemory: it cannot be
                done; nothing is.
        """
        ...

    async def reload(self, *, dry_run: bool = False) -> tuple[Step, ...]:
        """Read the configuration files again, and :meth:`apply` what differs from what exists.

        Raises:
            ConfigError, ConfigUnreadable, ...: a file is wrong or a change cannot be made; nothing
                is done.
        """
        ...

    async def read_region(self, region_id: str, offset_bytes: int, nr_bytes: int) -> bytes:
        """Return some bytes of a region, as its members see them at this moment.

        Args:
            region_id: The region.
            offset_bytes: Where in the region to begin.
            nr_bytes: How many: 1 to :data:`MAX_ACCESS_BYTES`.

        Raises:
            UsageError: the bytes are not all in the region, or too many at a time.
            NoSuchRegion, Conflict, Refused: it is not there, not ready or not readable this way.
        """
        ...

    async def write_region(
        self, region_id: str, offset_bytes: int, data: bytes, *, dry_run: bool = False
    ) -> None:
        """Write bytes into a region while its members run; they see them at once.

        Args:
            region_id: The region.
            offset_bytes: Where in the region to begin.
            data: 1 to :data:`MAX_ACCESS_BYTES` bytes.
            dry_run: Check everything, write nothing.

        Raises:
            UsageError: the bytes would not all be in the region, or are too many at a time.
            NoSuchRegion, Conflict, Refused: it is not there, not ready or not writable this way.
        """
        ...

    def lease(
        self, region_id: str, prot: Prot, process: Process
    ) -> AbstractAsyncContextManager[HeldLease]:
        """Keep a region where it is while a process of the control domain may have it mapped.

        Raises:
            NoSuchRegion, Conflict, Refused: it is not there, or cannot be had this way or now.
        """
        ...

    async def trigger(self, region_id: str, offset_bytes: int) -> int:
        """Wake whoever watches a byte of a region; see docs/doorbells.md.

        Returns:
            How many peers were woken, dom0's clients together being one.

        Raises:
            UsageError: the byte is not in the region.
            NoSuchRegion, Conflict, Refused: it is not there, not ready or has no doorbells.
        """
        ...

    def watch(
        self, region_id: str, offset_bytes: int, counter_offset_bytes: int | None
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[None]]:
        """Receive something whenever a byte of a region may have been triggered.

        Whoever is woken looks at what it waits for: several triggers may be one, and one too many.

        Args:
            region_id: The region.
            offset_bytes: Which byte of it.
            counter_offset_bytes: An aligned 32-bit word of it that each trigger decrements: it
                wakes when that becomes 0.  None: it wakes each time.

        Raises:
            UsageError: the byte or the word is not in the region.
            NoSuchRegion, Refused: it is not there, or has no doorbells.
            Conflict: it is not ready, or dom0 watches as many places of it as it can.
        """
        ...

    def monitor(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Event]]:
        """Receive every event from now on.

        The channel ends when its reader is so slow that events had to be dropped: take a new
        snapshot and monitor again.
        """
        ...

    def statistics(self) -> Mapping[str, int]:
        """Return counters since the daemon's start, by name; names are part of the contract.

        ``last_reload_at`` is in seconds since the epoch, and 0 if there was no reload.  What was
        refused is counted as ``refusals_`` and the name of the rule that it broke.
        """
        ...


class PartCopier(Protocol):
    """dom0 as the mediator of guests that share a region and not all of it."""

    async def copy_parts(
        self, region_id: str, source: Part, target: Part, *, count_at: Part | None = None
    ) -> int:
        """Copy bytes of a region from one of its guests' part of it to another's.

        Args:
            region_id: The region.
            source: What is copied.
            target: Where it goes; its guest must have the region to write.
            count_at: An aligned 64-bit little-endian word that then gets the number of bytes.

        Returns:
            How many bytes: those of the shorter of the two.

        Raises:
            NoSuchRegion, NoSuchGuest: it, or a guest's part in it, is not there (any more).
            UsageError, OutOfRange, Conflict: the ranges are too many, not in the guest's part, or
                overlap.
            Refused: the target's guest may only read, or the region is the host's memory.
        """
        ...

    async def read_part(self, region_id: str, part: Part) -> bytes:
        """Return the bytes of one range of a guest's part: one page of them at the most.

        Raises:
            NoSuchRegion, NoSuchGuest, OutOfRange: as :meth:`copy_parts`.
        """
        ...

    async def write_part(self, region_id: str, part: Part, data: bytes) -> None:
        """Write bytes over the one range of a guest's part, which is as long.

        Raises:
            NoSuchRegion, NoSuchGuest, OutOfRange, Refused: as :meth:`copy_parts`.
        """
        ...

    async def wake_part(self, region_id: str, part: Part) -> None:
        """Ring a part's guest, as dom0, if it has a doorbell in the region."""
        ...
