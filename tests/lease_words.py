# SPDX-License-Identifier: LGPL-2.1-or-later
"""Words in which the tests of leases are written: a program of dom0 that has one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from fakes.toolstack import Made
from fakes.world import Daemon, World, world
from hot_changes import add

from xshmd.model import Lease, Process, Prot

PROCESS = Process(pid=77, uid=0, started=4711, name="viewer")


class Program:
    """A process of dom0 that leases a region, until it lets go, ends, or its daemon does."""

    def __init__(self, host: World, nursery: trio.Nursery, process: Process = PROCESS) -> None:
        self._host, self._nursery, self.process = host, nursery, process
        self.scope = trio.CancelScope()
        self.has = False
        self.told = ""
        self.lets_go = True
        host.processes.living[process.pid] = process.started

    async def lease(self, daemon: Daemon, region: str, prot: Prot = Prot.RO) -> Program:
        self.scope = trio.CancelScope()
        await self._nursery.start(self._run, daemon, region, prot)
        return self

    async def _run(
        self,
        daemon: Daemon,
        region: str,
        prot: Prot,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with self.scope:
            async with daemon.engine.lease(region, prot, self.process) as held:
                self.has = True
                task_status.started()
                try:
                    self.told = await held.wait_ending()
                    if not self.lets_go:
                        await trio.sleep_forever()
                finally:
                    self.has = False

    def let_go(self) -> None:
        """Close the connection."""
        self.scope.cancel()

    def die(self) -> None:
        del self._host.processes.living[self.process.pid]
        self.scope.cancel()


def leased(daemon: Daemon) -> tuple[Lease, ...]:
    return daemon.engine.snapshot().leases


def regions(daemon: Daemon) -> list[str]:
    return [region.region_id for region in daemon.engine.snapshot().regions]


@asynccontextmanager
async def leased_of_guest(
    prot: Prot = Prot.RO,
) -> AsyncIterator[tuple[World, Daemon, Program, Made]]:
    """A program leases region ``r``, which guest ``a`` owns; in the end nothing may be left."""
    async with world() as host, trio.open_nursery() as nursery:
        daemon = await host.start()
        a = await host.tools.create(host.config("a", host.request("r")))
        yield host, daemon, await Program(host, nursery).lease(daemon, "r", prot), a
        await host.check_clean()
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def leased_of_system() -> AsyncIterator[tuple[World, Daemon, Program]]:
    """A program leases region ``r``, which is the system's; in the end nothing may be left."""
    async with world() as host, trio.open_nursery() as nursery:
        daemon = await host.start()
        await daemon.engine.apply([add("r")])
        yield host, daemon, await Program(host, nursery).lease(daemon, "r")
        await host.check_clean()
        nursery.cancel_scope.cancel()
