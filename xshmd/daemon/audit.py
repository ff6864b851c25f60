# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes down every grant and withdrawal of memory: what, to whom, why, and who asked for it.

Each kind of entry has a MESSAGE_ID that never changes (docs/hooks.md, resources/xshmd.catalog), and
the facts are fields of the journal: XSHM_REGION=, XSHM_GUEST=, XSHM_DOMID=, XSHM_WHY= and others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from types import MappingProxyType
from typing import Any, Final, TypeVar

import structlog
import trio

from xshmd.api import HeldLease, RegionsApi
from xshmd.changes import AddRegion, AttachRegion, Change, DetachRegion, RemoveRegion, Step
from xshmd.errors import XshmError, rules_of
from xshmd.events import Event, EventKind
from xshmd.machine import HostInfo
from xshmd.model import Guest, GuestConfig, Process, Prot, Snapshot
from xshmd.units import address_of, bytes_of

log = structlog.get_logger()
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """A kind of audit entry."""

    message_id: str
    text: str
    failed: bool = False
    """Whether it is something an admin must see to: then its priority is err, not info."""


KINDS: Final[Mapping[EventKind, Kind]] = MappingProxyType(
    {
        EventKind.REGION_CREATED: Kind("5e36a9969ab34d4b9ec21c70287f0539", "region created"),
        EventKind.REGION_REMOVED: Kind("16eb9dfc18664482be10a98042a59ad9", "region freed"),
        EventKind.PEER_JOINED: Kind("4c72f4e1fc0a431c937307411b05416c", "memory granted"),
        EventKind.PEER_LEFT: Kind("eec7e4ded95946ee8869d59429f518c0", "memory withdrawn"),
        EventKind.GUEST_REFUSED: Kind(
            "37f41f2b32c44a9aaaf9c1c7ade3ddad", "guest refused", failed=True
        ),
        EventKind.GUEST_AWAITED: Kind("a8bc233849a048bda220bbeae93d123b", "guest awaited"),
        EventKind.HOLDER_CREATED: Kind("fc4f8839f160416d804dbb3b5d496426", "holder created"),
        EventKind.HOLDER_DESTROYED: Kind("0c4613f0b8c04e3a9d708e12dcae5f8a", "holder destroyed"),
        EventKind.HOLDER_LOST: Kind("d5c05fd7870843e29f4194fd2370f246", "holder lost", failed=True),
        EventKind.HOLDER_SUSPECT: Kind(
            "5657025f8cbc407194d554393603fa38", "holder suspect", failed=True
        ),
        EventKind.GROUP_PAUSED: Kind("29aad2cf340a47218bef8cb0a4b4bdd9", "group paused"),
        EventKind.RELOADED: Kind("549377b9b7324a12a3fd177c99252b63", "reloaded"),
        EventKind.LEASE_BEGAN: Kind("280b6fe042ae468688226e9c9610bfc2", "memory leased"),
        EventKind.LEASE_ENDED: Kind("8eb8b3bc436548ecb4cdb9c883d75a73", "lease ended"),
    }
)
ASKED: Final = Kind("786540d8fbab466793fc0e848f53c58d", "client asked")
INCOMPLETE: Final = Kind("cb1d2e1f31ee49d4a118fecc6148e6cb", "audit incomplete")


def record(event: Event) -> None:
    """Write one event down."""
    kind = KINDS[event.kind]
    facts: dict[str, Any] = {"guest": event.guest, "domid": event.domid, "region": event.region}
    if event.request is not None:
        facts |= {
            "address": hex(address_of(event.request.first_gfn)),
            "offset_bytes": bytes_of(event.request.offset_frames),
            "role": event.request.role.value,
            "prot": event.request.prot.value,
        }
    facts |= {
        "size_bytes": event.size_bytes or None,
        "pause_us": event.pause_us or None,
        "holder": event.holder_uuid,
        "rule": list(event.rules) or None,
        "why": event.reason,
    }
    if event.lease is not None:
        process = event.lease.process
        facts |= {"prot": event.lease.prot.value, "process": process.pid, "user": process.uid}
    said = {key: value for key, value in facts.items() if value not in ("", None)}
    write = log.error if kind.failed else log.info
    write(kind.text, message_id=kind.message_id, **said)


async def run(
    api: RegionsApi, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Write down what happens, until cancelled; started once nothing is missed any more."""
    started = False
    while True:
        async with api.monitor() as events:
            if not started:
                started = True
                task_status.started()
            try:
                async for event in events:
                    record(event)
            except trio.Cancelled:
                _record_the_rest(events)
                raise
        log.error(
            INCOMPLETE.text,
            message_id=INCOMPLETE.message_id,
            reason="more happened at once than could be written down; xshmctl list says what is",
        )


def _record_the_rest(events: trio.MemoryReceiveChannel[Event]) -> None:
    while True:
        try:
            record(events.receive_nowait())
        except (trio.WouldBlock, trio.EndOfChannel):
            return


class AuditedRegions(RegionsApi):
    """A :class:`~xshmd.api.RegionsApi` that writes down what clients ask to be changed.

    Which client it is (uid and pid) is in the context of the task that serves it, from where every
    log line has it.
    """

    def __init__(self, api: RegionsApi) -> None:
        self._api = api

    async def _asked(self, what: str, work: Callable[[], Awaitable[T]], **facts: Any) -> T:
        outcome = "failed"
        try:
            result = await work()
            outcome = "done"
        except XshmError as error:
            outcome = f"refused: {error.one_line()}"
            facts["rule"] = list(rules_of(error))
            raise
        finally:
            log.info(
                ASKED.text, message_id=ASKED.message_id, request=what, outcome=outcome, **facts
            )
        return result

    async def declare(self, config: GuestConfig) -> GuestConfig:
        return await self._asked("declare", lambda: self._api.declare(config), guest=config.name)

    async def withdraw(self, name: str) -> None:
        await self._asked("withdraw", lambda: self._api.withdraw(name), guest=name)

    async def apply(self, changes: Sequence[Change], *, dry_run: bool = False) -> tuple[Step, ...]:
        if dry_run:
            return await self._api.apply(changes, dry_run=True)
        wanted = [change_words(change) for change in changes]
        return await self._asked("change", lambda: self._api.apply(changes), change=wanted)

    async def reload(self, *, dry_run: bool = False) -> tuple[Step, ...]:
        if dry_run:
            return await self._api.reload(dry_run=True)
        return await self._asked("reload", self._api.reload)

    async def read_region(self, region_id: str, offset_bytes: int, nr_bytes: int) -> bytes:
        return await self._api.read_region(region_id, offset_bytes, nr_bytes)

    async def write_region(
        self, region_id: str, offset_bytes: int, data: bytes, *, dry_run: bool = False
    ) -> None:
        await self._api.write_region(region_id, offset_bytes, data, dry_run=dry_run)

    @asynccontextmanager
    async def lease(self, region_id: str, prot: Prot, process: Process) -> AsyncIterator[HeldLease]:
        async with AsyncExitStack() as stack:
            lease = self._api.lease(region_id, prot, process)
            yield await self._asked(
                "lease", lambda: stack.enter_async_context(lease), region=region_id, prot=prot.value
            )

    async def trigger(self, region_id: str, offset_bytes: int) -> int:
        return await self._api.trigger(region_id, offset_bytes)

    def watch(
        self, region_id: str, offset_bytes: int, counter_offset_bytes: int | None
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[None]]:
        return self._api.watch(region_id, offset_bytes, counter_offset_bytes)

    def snapshot(self) -> Snapshot:
        return self._api.snapshot()

    async def wait_guest(self, name: str, timeout_s: float) -> Guest:
        return await self._api.wait_guest(name, timeout_s)

    async def host(self) -> HostInfo:
        return await self._api.host()

    def monitor(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Event]]:
        return self._api.monitor()

    def statistics(self) -> Mapping[str, int]:
        return self._api.statistics()


def change_words(change: Change) -> str:
    """Return a change in words, e.g. ``attach r0 to ctl at 0x3a000000``."""
    match change:
        case AddRegion():
            return f"add {change.config.region_id}"
        case RemoveRegion():
            return f"remove {change.region_id}" + (" by force" if change.force else "")
        case AttachRegion():
            at = hex(address_of(change.request.first_gfn)) if change.request.first_gfn >= 0 else ""
            where = f" at {at}" if at else ""
            return f"attach {change.request.region_id} to {change.guest}{where}"
        case DetachRegion():
            return f"detach {change.region_id} from {change.guest}"
