# SPDX-License-Identifier: LGPL-2.1-or-later
"""A region of 40 frames: ``a`` has the first ten, ``b`` the next ten, and neither the other's.

The engine is the product's, on the models of Xen and xenstored.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from fakes.toolstack import Made
from fakes.world import Daemon, World, world

from xshmd.ranges import ByteRange
from xshmd.share.lists import Direction
from xshmd.share.mediator import Mediator
from xshmd.share.scatter import Scatter
from xshmd.units import PAGE_SIZE, DomId, bytes_of

IN, OUT = Direction.INPUT, Direction.OUTPUT
PART = bytes_of(10)


class Host:
    """Two guests, a daemon, and its scatter-gather."""

    def __init__(self, host: World, daemon: Daemon, scatter: Scatter) -> None:
        self.world, self.daemon, self.scatter = host, daemon, scatter
        self.mediator = Mediator(scatter, daemon.engine)
        daemon.engine.on_ring = self.mediator.hasten
        self.made: dict[str, Made] = {}

    async def create(self, name: str, offset: int, *, owner: bool = False) -> None:
        host = self.world
        request = (
            host.request("r", 40, doorbells=4)
            if owner
            else host.borrow("r", 10, at=64, offset=offset)
        )
        self.made[name] = await host.tools.create(host.config(name, request))
        await host.until(lambda: self.daemon.is_attached(name))

    def domid(self, name: str) -> DomId:
        return self.made[name].domid

    def _at(self, name: str, offset: int) -> tuple[DomId, int, int]:
        (request,) = next(
            guest.requests for guest in self.daemon.engine.snapshot().guests if guest.name == name
        )
        return self.domid(name), request.first_gfn + offset // PAGE_SIZE, offset % PAGE_SIZE

    def _dom0s_port(self, name: str) -> int:
        guest = self.daemon.guest(name)
        peer = guest.peer("r") if guest else None
        assert peer is not None
        return peer.ports[peer.peer_id]

    def ring_dom0(self, name: str) -> None:
        """As the guest does it."""
        self.world.channels.guest_sends(self.domid(name), self._dom0s_port(name))

    def rung_by_dom0(self, name: str) -> bool:
        """Whether dom0 has rung the guest since it was last asked."""
        return self._dom0s_port(name) in self.world.channels.guest_takes(self.domid(name))

    def write(self, name: str, offset: int, data: bytes) -> None:
        """As the guest does it."""
        for index in range(len(data)):
            self.world.xen.guest_write(*self._at(name, offset + index), data[index : index + 1])

    def read(self, name: str, offset: int, count: int) -> bytes:
        at = range(offset, offset + count)
        return b"".join(self.world.xen.guest_read(*self._at(name, each), 1) for each in at)


@asynccontextmanager
async def hosted() -> AsyncIterator[Host]:
    async with world() as running, trio.open_nursery() as nursery:
        daemon = await running.start()
        host = Host(running, daemon, Scatter(daemon.engine, daemon.engine))
        await nursery.start(host.scatter.run)
        await nursery.start(host.mediator.run)
        await host.create("system", 0, owner=True)
        await host.create("a", 0)
        await host.create("b", 10)
        yield host
        nursery.cancel_scope.cancel()
        for name in tuple(host.made):
            await running.tools.destroy(host.made.pop(name))
        await running.check_clean()


def one(offset: int, count: int) -> list[ByteRange]:
    return [ByteRange(offset, count)]
