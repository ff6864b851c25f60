# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the daemon offers, as Protocols: its front ends know these, and nothing of the engine.

The engine implements them; the Varlink service, the audit and dom0's transfers between guests are
written against them.  What the engine itself needs of the outside is :mod:`xshmd.ports`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

import trio

from xshmd.changes import Change, Step
from xshmd.events import Event
from xshmd.machine import HostInfo
from xshmd.model import Guest, GuestConfig, Lease, Process, Prot, Snapshot
from xshmd.ranges import Part

MAX_ACCESS_BYTES: Final = 64 * 1024
"""How much of a region a client may read or write at a time: the daemon's loop waits meanwhile."""


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
