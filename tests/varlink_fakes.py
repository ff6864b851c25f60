# SPDX-License-Identifier: LGPL-2.1-or-later
"""A daemon without Xen behind its socket, for the tests of the server, the client and xshmctl."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from xshmd.api import HeldLease, PartCopier, RegionsApi
from xshmd.changes import Change, Step
from xshmd.daemon import service
from xshmd.daemon.buffer_methods import BufferMethods
from xshmd.errors import XshmError
from xshmd.events import Event
from xshmd.machine import Arch, HostInfo
from xshmd.model import (
    Guest,
    GuestConfig,
    GuestState,
    Holder,
    Lease,
    Process,
    Prot,
    Region,
    RegionRequest,
    Role,
    Snapshot,
)
from xshmd.ranges import Part
from xshmd.units import DomId, Gfn
from xshmd.varlink.admission import Limits
from xshmd.varlink.server import open_listener, serve

HOST = HostInfo(
    arch=Arch.X86_64,
    xen_version=(4, 20),
    xen_extra=".4",
    xen_command_line="dom0_mem=1024M scrub-domheap",
    has_hvm=True,
    has_hap=True,
    free_pages=1 << 18,
    total_pages=1 << 19,
)


def request(region_id: str = "r0", first_gfn: int = 0x38000, nr_frames: int = 256) -> RegionRequest:
    return RegionRequest(
        region_id=region_id, first_gfn=Gfn(first_gfn), nr_frames=nr_frames, role=Role.OWNER
    )


OWNER = Guest(
    domid=DomId(5),
    uuid="00000000-0000-0000-0000-000000000005",
    name="ctl",
    generation="g5",
    state=GuestState.ATTACHED,
    holder_uuid="00000000-0000-0000-0000-000000000003",
    requests=(request(),),
)
BORROWER = Guest(
    domid=DomId(6),
    uuid="00000000-0000-0000-0000-000000000006",
    name="log",
    generation="g6",
    state=GuestState.REBOOTING,
    holder_uuid=OWNER.holder_uuid,
    requests=(
        RegionRequest(
            region_id="r0",
            first_gfn=Gfn(0x40000),
            nr_frames=2,
            offset_frames=1,
            role=Role.BORROWER,
            prot=Prot.RO,
        ),
    ),
)
SNAPSHOT = Snapshot(
    holders=(Holder(uuid=OWNER.holder_uuid, domid=DomId(3), next_gfn=Gfn(0x300)),),
    regions=(
        Region(
            region_id="r0",
            nr_frames=256,
            holder_uuid=OWNER.holder_uuid,
            holder_first_gfn=Gfn(0x100),
            owner="ctl",
            ready=True,
        ),
    ),
    guests=(BORROWER, OWNER),
)


class FakeLease:
    """A lease that the test ends."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.is_over = False
        self._send, self._receive = trio.open_memory_channel[str](1)
        self._token = trio.lowlevel.current_trio_token()

    def want_back(self, why: str) -> None:
        """Ask for the region; from any thread."""
        self._token.run_sync_soon(self._send.send_nowait, why)

    async def wait_ending(self) -> str:
        return await self._receive.receive()


class FakeRegions(RegionsApi):
    """Answers from what the test put in; records what it was asked."""

    def __init__(self) -> None:
        self.now = SNAPSHOT
        self.refusal: BaseException | None = None
        self.wait_outcome: Guest | BaseException | None = OWNER
        """None: wait_guest never returns."""
        self.declared: list[GuestConfig] = []
        self.withdrawn: list[str] = []
        self.waited: list[tuple[str, float]] = []
        self.watched: list[tuple[tuple[str, int, int | None], trio.MemorySendChannel[None]]] = []
        """What is watched: region, byte, counter."""
        self.waiting = trio.Event()
        self.wait_cancelled = trio.Event()
        self.steps: tuple[Step, ...] = ()
        """What apply and reload return."""
        self.applied: list[tuple[tuple[Change, ...], bool]] = []
        """The changes and dry_run of every apply."""
        self.reloaded: list[bool] = []
        """dry_run of every reload."""
        self.monitors: list[trio.MemorySendChannel[Event]] = []
        """One for each monitor that runs: send what happens, close it to end it."""
        self.to_come: list[list[Event]] = []
        """What each monitor receives at once; all but the last list end as for a slow reader."""
        self.figures: dict[str, int] = {"regions": 1, "guests": 2}
        self.memory = bytearray(SNAPSHOT.regions[0].size_bytes)
        """The bytes of region r0."""
        self.leases: list[FakeLease] = []
        """Every lease there was."""
        self.written: list[tuple[str, int, bytes, bool]] = []

    def snapshot(self) -> Snapshot:
        return self.now

    async def declare(self, config: GuestConfig) -> GuestConfig:
        if self.refusal is not None:
            raise self.refusal
        self.declared.append(config)
        return config

    async def withdraw(self, name: str) -> None:
        self.withdrawn.append(name)

    async def wait_guest(self, name: str, timeout_s: float) -> Guest:
        self.waited.append((name, timeout_s))
        self.waiting.set()
        if self.wait_outcome is None:
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                self.wait_cancelled.set()
                raise
        if isinstance(self.wait_outcome, BaseException):
            raise self.wait_outcome
        assert self.wait_outcome is not None
        return self.wait_outcome

    async def host(self) -> HostInfo:
        return HOST

    async def apply(self, changes: Sequence[Change], *, dry_run: bool = False) -> tuple[Step, ...]:
        self.applied.append((tuple(changes), dry_run))
        if self.refusal is not None:
            raise self.refusal
        return self.steps

    async def reload(self, *, dry_run: bool = False) -> tuple[Step, ...]:
        self.reloaded.append(dry_run)
        if self.refusal is not None:
            raise self.refusal
        return self.steps

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
        send, receive = trio.open_memory_channel[Event](8)
        self.monitors.append(send)
        if self.to_come:
            for event in self.to_come.pop(0):
                send.send_nowait(event)
            if self.to_come:
                send.close()
        try:
            with send, receive:
                yield receive
        finally:
            self.monitors.remove(send)

    async def read_region(self, region_id: str, offset_bytes: int, nr_bytes: int) -> bytes:
        if self.refusal is not None:
            raise self.refusal
        return bytes(self.memory[offset_bytes : offset_bytes + nr_bytes])

    async def write_region(
        self, region_id: str, offset_bytes: int, data: bytes, *, dry_run: bool = False
    ) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.written.append((region_id, offset_bytes, data, dry_run))
        if not dry_run:
            self.memory[offset_bytes : offset_bytes + len(data)] = data

    @asynccontextmanager
    async def lease(self, region_id: str, prot: Prot, process: Process) -> AsyncIterator[HeldLease]:
        if self.refusal is not None:
            raise self.refusal
        held = FakeLease(
            Lease(lease_id=str(len(self.leases)), region_id=region_id, prot=prot, process=process)
        )
        self.leases.append(held)
        try:
            yield held
        finally:
            held.is_over = True

    async def trigger(self, region_id: str, offset_bytes: int) -> int:
        if self.refusal is not None:
            raise self.refusal
        for watched, send in self.watched:
            if watched[:2] == (region_id, offset_bytes):
                await send.send(None)
        return len(self.watched)

    @asynccontextmanager
    async def watch(
        self, region_id: str, offset_bytes: int, counter_offset_bytes: int | None
    ) -> AsyncIterator[trio.MemoryReceiveChannel[None]]:
        if self.refusal is not None:
            raise self.refusal
        send, receive = trio.open_memory_channel[None](1)
        watched = ((region_id, offset_bytes, counter_offset_bytes), send)
        self.watched.append(watched)
        try:
            with send, receive:
                yield receive
        finally:
            self.watched.remove(watched)

    def statistics(self) -> Mapping[str, int]:
        return self.figures


class NoCopier(PartCopier):
    """For tests in which nothing is to be copied: it is a failure if anything is."""

    async def copy_parts(
        self, region_id: str, source: Part, target: Part, *, count_at: Part | None = None
    ) -> int:
        raise AssertionError(f"bytes of region {region_id} are copied from {source} to {target}")

    async def read_part(self, region_id: str, part: Part) -> bytes:
        raise AssertionError(f"{part} of region {region_id} is read")

    async def write_part(self, region_id: str, part: Part, data: bytes) -> None:
        raise AssertionError(f"{part} of region {region_id} is written")

    async def wake_part(self, region_id: str, part: Part) -> None:
        raise AssertionError(f"{part} of region {region_id} is woken")


def limits() -> Limits:
    return Limits(allowed_uids=frozenset({os.getuid()}))


@contextlib.contextmanager
def daemon(path: Path, api: RegionsApi, *others: service.MethodTable) -> Iterator[None]:
    """Serve ``api``, and what others answer, from a thread of its own until the block ends."""
    started = threading.Event()
    inside: list[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = []
    failed: list[BaseException] = []

    async def main() -> None:
        with trio.CancelScope() as scope:
            inside.append((trio.lowlevel.current_trio_token(), scope))
            async with trio.open_nursery() as nursery:
                dispatcher = service.dispatcher(api, *others)
                for other in others:
                    if isinstance(other, BufferMethods):
                        await nursery.start(other.run)
                listener = open_listener(path, environ={})
                await nursery.start(
                    lambda task_status: serve(
                        listener, dispatcher, limits=limits(), task_status=task_status
                    )
                )
                started.set()

    def body() -> None:
        try:
            trio.run(main)
        except BaseException as exc:
            failed.append(exc)
        finally:
            started.set()

    thread = threading.Thread(target=body)
    thread.start()
    started.wait()
    try:
        assert not failed, failed
        yield
    finally:
        if not failed:
            token, scope = inside[0]
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(scope.cancel)
        thread.join()
    if failed:
        raise XshmError("the daemon under test died") from failed[0]
