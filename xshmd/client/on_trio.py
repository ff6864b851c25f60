# SPDX-License-Identifier: LGPL-2.1-or-later
"""The library for trio: the same words as in :mod:`xshmd.client`, with what blocks in a thread.

A question to the daemon takes at most its ``timeout_s``, so that is how long it can hold up a
cancellation; waiting for the end of a lease holds up none.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from xshmd.client import lease as plain
from xshmd.client import sync, watches
from xshmd.client.lease import RENEW_S
from xshmd.client.mapping import Opener, open_xen
from xshmd.client.sync import DEFAULT_TIMEOUT_S
from xshmd.errors import DaemonUnreachable
from xshmd.model import Prot
from xshmd.varlink.client import DEFAULT_PATH

__all__ = ["Connection", "Lease", "Region", "Watch", "connect"]


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
        return tuple(Region(region) for region in found)

    async def region(self, region_id: str) -> Region:
        """Return one region; NoSuchRegion if there is none of this id."""
        found = await trio.to_thread.run_sync(
            self._sync.region, region_id, limiter=self._one_at_a_time
        )
        return Region(found)


class Region:
    """A region as it was when it was asked for; see :class:`xshmd.client.Region`."""

    def __init__(self, region: sync.Region) -> None:
        self._sync = region
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
