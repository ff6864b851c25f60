# SPDX-License-Identifier: LGPL-2.1-or-later
"""The library for trio: the same words as in :mod:`xshmd.client`, with what blocks in a thread.

A question to the daemon takes at most its ``timeout_s``, so that is how long it can hold up a
cancellation; waiting for the end of a lease holds up none.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from xshmd.client import lease as plain
from xshmd.client import lists, sync, watches
from xshmd.client.lease import RENEW_S
from xshmd.client.lists import DOM0, Ranges
from xshmd.client.mapping import Opener, open_xen
from xshmd.client.sync import DEFAULT_TIMEOUT_S
from xshmd.errors import DaemonUnreachable, TimedOut
from xshmd.model import Prot
from xshmd.varlink.client import DEFAULT_PATH

__all__ = ["Connection", "Lease", "PostedList", "Region", "Watch", "connect"]

LOOK_S: Final = 0.1
"""How often one looks whether a list is done."""


@asynccontextmanager
async def connect(
    path: str = DEFAULT_PATH, *, timeout_s: float = DEFAULT_TIMEOUT_S, xen: Opener = open_xen
) -> AsyncIterator[Connection]:
    """Yield a connection to the daemon; see :func:`xshmd.client.connect`."""
    with sync.connect(path, timeout_s=timeout_s, xen=xen) as connection:
        yield Connection(connection)


class Connection:
    """What a daemon knows; see :class:`xshmd.client.Connection`."""

    def __init__(self, connection: sync.Connection) -> None:
        self._sync = connection
        self._one_at_a_time = trio.CapacityLimiter(1)

    async def regions(self) -> tuple[Region, ...]:
        """Return every region there is, sorted by id."""
        found = await trio.to_thread.run_sync(self._sync.regions, limiter=self._one_at_a_time)
        return tuple(Region(region, self._one_at_a_time) for region in found)

    async def region(self, region_id: str) -> Region:
        """Return one region; NoSuchRegion if there is none of this id."""
        found = await trio.to_thread.run_sync(
            self._sync.region, region_id, limiter=self._one_at_a_time
        )
        return Region(found, self._one_at_a_time)


class Region:
    """A region as it was when it was asked for; see :class:`xshmd.client.Region`."""

    def __init__(self, region: sync.Region, one_at_a_time: trio.CapacityLimiter) -> None:
        self._sync, self._one_at_a_time = region, one_at_a_time
        self.id, self.size_bytes = region.id, region.size_bytes
        self.lifetime, self.owner = region.lifetime, region.owner
        self.members, self.processes = region.members, region.processes

    def __repr__(self) -> str:
        return repr(self._sync)

    @asynccontextmanager
    async def attach(self, prot: Prot | str = Prot.RO) -> AsyncIterator[Lease]:
        """Be a member of the region in the control domain for the body."""
        lease = await trio.to_thread.run_sync(self._sync.attach, prot)
        try:
            yield Lease(lease)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(lease.close)

    @asynccontextmanager
    async def map(
        self, prot: Prot | str = Prot.RO, *, offset_bytes: int = 0, size_bytes: int | None = None
    ) -> AsyncIterator[memoryview]:
        """Attach, and map the region or a part of it for the body."""
        async with (
            self.attach(prot) as lease,
            lease.map(offset_bytes=offset_bytes, size_bytes=size_bytes) as memory,
        ):
            yield memory

    async def trigger(self, offset_bytes: int) -> int:
        """Wake whoever watches a byte of the region; return how many were."""
        return await trio.to_thread.run_sync(self._sync.trigger, offset_bytes)

    @asynccontextmanager
    async def watch(
        self, offset_bytes: int, *, counter_offset_bytes: int | None = None
    ) -> AsyncIterator[Watch]:
        """Watch a byte of the region for the body."""
        watch = await trio.to_thread.run_sync(
            lambda: self._sync.watch(offset_bytes, counter_offset_bytes=counter_offset_bytes)
        )
        with watch:
            yield Watch(watch)

    async def post_list(
        self, direction: str, ranges: Ranges, *, guest: str = DOM0,
        count_offset_bytes: int | None = None,
    ) -> PostedList:  # fmt: skip
        """Put up bytes of a guest; see :meth:`xshmd.client.Region.post_list`."""
        posted = await trio.to_thread.run_sync(
            lambda: self._sync.post_list(
                direction, ranges, guest=guest, count_offset_bytes=count_offset_bytes
            ),
            limiter=self._one_at_a_time,
        )
        return PostedList(posted, self._one_at_a_time)

    async def transfer(
        self, direction: str, ranges: Ranges, *, guest: str = DOM0, peer: str = DOM0,
        posted: PostedList | None = None,
    ) -> int:  # fmt: skip
        """Move bytes by a posted list; see :meth:`xshmd.client.Region.transfer`."""
        chosen = posted.sync if posted else None
        return await trio.to_thread.run_sync(
            lambda: self._sync.transfer(direction, ranges, guest=guest, peer=peer, posted=chosen),
            limiter=self._one_at_a_time,
        )


class Watch:
    """A byte of a region that is watched; see :class:`xshmd.client.Watch`."""

    def __init__(self, watch: watches.Watch) -> None:
        self._sync = watch

    def __repr__(self) -> str:
        return repr(self._sync)

    async def wait(self) -> None:
        """Wait until the byte was triggered, or may have been."""
        while not self._sync.wait(0):
            await trio.lowlevel.wait_readable(self._sync.fileno())


class PostedList:
    """Bytes of a guest that wait for a transfer; see :class:`xshmd.client.PostedList`."""

    def __init__(self, posted: lists.PostedList, one_at_a_time: trio.CapacityLimiter) -> None:
        self.sync, self._one_at_a_time = posted, one_at_a_time
        self.list_id = posted.list_id

    def __repr__(self) -> str:
        return repr(self.sync)

    async def wait(self) -> int:
        """Return how many bytes were moved, once a transfer has used the list."""
        while True:
            with contextlib.suppress(TimedOut):
                # Others use the connection in between, and a cancellation is not held up.
                return await trio.to_thread.run_sync(self.sync.wait, 0, limiter=self._one_at_a_time)
            await trio.sleep(LOOK_S)

    async def cancel(self) -> None:
        """Take the list back."""
        await trio.to_thread.run_sync(self.sync.cancel, limiter=self._one_at_a_time)


class Lease:
    """This process' membership of a region; see :class:`xshmd.client.Lease`."""

    def __init__(self, lease: plain.Lease) -> None:
        self._sync = lease
        self.region_id, self.prot, self.size_bytes = lease.region_id, lease.prot, lease.size_bytes

    def __repr__(self) -> str:
        return repr(self._sync)

    @asynccontextmanager
    async def map(
        self, *, offset_bytes: int = 0, size_bytes: int | None = None
    ) -> AsyncIterator[memoryview]:
        """Map the region, or a part of it, for the body."""
        mapping = self._sync.map(offset_bytes=offset_bytes, size_bytes=size_bytes)
        with contextlib.ExitStack() as stack:
            yield await trio.to_thread.run_sync(stack.enter_context, mapping)

    async def wait_ending(self) -> str:
        """Return why the region is wanted back, once it is."""
        while True:
            try:
                if why := await trio.to_thread.run_sync(self._sync.poll):
                    return why
                await trio.lowlevel.wait_readable(self._sync.fileno())
            except DaemonUnreachable:
                await trio.sleep(RENEW_S)
