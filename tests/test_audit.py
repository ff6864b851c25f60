# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every event is written down once, with its facts; so is what clients ask for."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs
from varlink_fakes import OWNER, FakeRegions, request

from xshmd.api import RegionsApi
from xshmd.changes import AddRegion, AttachRegion, Change, DetachRegion, RemoveRegion, Step
from xshmd.daemon import audit
from xshmd.engine.events import EventHub
from xshmd.errors import Refused, combined
from xshmd.events import Event, EventKind
from xshmd.model import GuestConfig, Lease, Process, Prot, RegionConfig

CATALOG = Path(audit.__file__).parent.parent / "resources" / "xshmd.catalog"


class Regions(FakeRegions):
    """Has a real hub, and refuses what the test says."""

    def __init__(self, backlog: int = 16) -> None:
        super().__init__()
        self.hub = EventHub(backlog)

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
        async with self.hub.listen() as events:
            yield events

    async def apply(self, changes: Any, *, dry_run: bool = False) -> tuple[Step, ...]:
        if self.refusal is not None:
            raise self.refusal
        return ()


JOINED = Event(
    kind=EventKind.PEER_JOINED, region="r0", guest="ctl", domid=OWNER.domid,
    holder_uuid=OWNER.holder_uuid, request=request(), size_bytes=1 << 20, reason="guest created",
)  # fmt: skip


@pytest.mark.parametrize("kind", EventKind, ids=str)
async def test_every_kind_has_an_entry_of_its_own(kind: EventKind) -> None:
    with capture_logs() as entries:
        audit.record(Event(kind=kind, region="r0", guest="ctl", reason="why not"))
    entry = audit.KINDS[kind]
    assert entries == [
        {
            "event": entry.text, "log_level": "error" if entry.failed else "info",
            "message_id": entry.message_id, "region": "r0", "guest": "ctl", "why": "why not",
        }
    ]  # fmt: skip


def test_a_grant_says_everything() -> None:
    with capture_logs() as entries:
        audit.record(JOINED)
    assert entries == [
        {
            "event": "memory granted", "log_level": "info",
            "message_id": "4c72f4e1fc0a431c937307411b05416c", "region": "r0", "guest": "ctl",
            "domid": 5, "address": "0x38000000", "offset_bytes": 0, "role": "owner", "prot": "rw",
            "size_bytes": 1 << 20, "holder": OWNER.holder_uuid, "why": "guest created",
        }
    ]  # fmt: skip


def test_a_lease_says_whose_it_is() -> None:
    process = Process(pid=77, uid=5, started=9, name="viewer")
    lease = Lease(lease_id="x", region_id="r0", prot=Prot.RO, process=process)
    with capture_logs() as entries:
        audit.record(Event(kind=EventKind.LEASE_BEGAN, region="r0", lease=lease))
    assert entries == [
        {
            "event": "memory leased", "log_level": "info", "region": "r0", "prot": "ro",
            "message_id": audit.KINDS[EventKind.LEASE_BEGAN].message_id, "process": 77, "user": 5,
        }
    ]  # fmt: skip


async def test_a_lease_is_written_down_when_it_is_asked_for() -> None:
    api = Regions()
    audited = audit.AuditedRegions(api)
    with capture_logs() as entries:
        async with audited.lease("r0", Prot.RW, Process(pid=1, uid=0)):
            assert [entry["outcome"] for entry in entries] == ["done"]
        api.refusal = Refused("no")
        with pytest.raises(Refused):
            async with audited.lease("r0", Prot.RW, Process(pid=1, uid=0)):
                pass
    assert [(e["request"], e["region"], e["prot"], e["outcome"]) for e in entries] == [
        ("lease", "r0", "rw", "done"), ("lease", "r0", "rw", "refused: no"),
    ]  # fmt: skip


def test_message_ids_are_ids_and_the_catalog_explains_each() -> None:
    entries = [*audit.KINDS.values(), audit.ASKED, audit.INCOMPLETE]
    ids = [entry.message_id for entry in entries]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}", each) for each in ids)
    explained = re.findall(r"^-- ([0-9a-f]{32})$", CATALOG.read_text(), re.M)
    assert len(set(explained)) == len(explained)
    assert set(ids) <= set(explained)


def test_the_catalog_names_fields_that_there_are() -> None:
    """A misspelt @FIELD@ would be shown to the admin as it is."""
    with capture_logs() as entries:
        audit.record(JOINED)
        audit.record(Event(kind=EventKind.GROUP_PAUSED, pause_us=1))
    written = {f"XSHM_{key.upper()}" for entry in entries for key in entry}
    written |= {"XSHM_REQUEST", "XSHM_OUTCOME", "XSHM_CLIENT_UID", "XSHM_CLIENT_PID", "XSHM_LOST"}
    written |= {"XSHM_PROCESS", "XSHM_USER"}
    assert set(re.findall(r"@(\w+)@", CATALOG.read_text())) <= written


async def test_events_are_written_down_in_order() -> None:
    api = Regions()
    with capture_logs() as entries:
        async with trio.open_nursery() as nursery:
            await nursery.start(audit.run, api)
            for kind in (EventKind.REGION_CREATED, EventKind.PEER_JOINED, EventKind.PEER_LEFT):
                api.hub.emit(Event(kind=kind, region="r0"))
            await trio.testing.wait_all_tasks_blocked()
            assert [e["event"] for e in entries] == [
                "region created", "memory granted", "memory withdrawn",
            ]  # fmt: skip
            # What happens in the very moment of the end is not lost either.
            api.hub.emit(Event(kind=EventKind.REGION_REMOVED, region="r0"))
            api.hub.emit(Event(kind=EventKind.HOLDER_DESTROYED))
            nursery.cancel_scope.cancel()
    assert [entry["event"] for entry in entries[3:]] == ["region freed", "holder destroyed"]


async def test_a_gap_is_owned_up_to() -> None:
    api = Regions(backlog=2)
    with capture_logs() as entries:
        async with trio.open_nursery() as nursery:
            await nursery.start(audit.run, api)
            for _ in range(4):  # one goes to who waits, two into the backlog, one is too many
                api.hub.emit(JOINED)
            await trio.testing.wait_all_tasks_blocked()
            api.hub.emit(Event(kind=EventKind.PEER_LEFT, region="r0"))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    said = [entry["event"] for entry in entries]
    assert said == [*["memory granted"] * 3, "audit incomplete", "memory withdrawn"]
    assert entries[3]["log_level"] == "error"


CHANGES: tuple[tuple[Change, str], ...] = (
    (AddRegion(config=RegionConfig(region_id="r0", nr_frames=1)), "add r0"),
    (RemoveRegion(region_id="r0"), "remove r0"),
    (RemoveRegion(region_id="r0", force=True), "remove r0 by force"),
    (AttachRegion(guest="ctl", request=request()), "attach r0 to ctl at 0x38000000"),
    (AttachRegion(guest="7", request=request(first_gfn=-1)), "attach r0 to 7"),
    (DetachRegion(guest="ctl", region_id="r0"), "detach r0 from ctl"),
)


async def test_what_clients_ask_is_written_down() -> None:
    api = Regions()
    audited = audit.AuditedRegions(api)
    with capture_logs() as entries:
        await audited.declare(GuestConfig(name="ctl"))
        await audited.withdraw("ctl")
        await audited.apply([change for change, _ in CHANGES])
    assert [(e["request"], e["outcome"]) for e in entries] == [
        ("declare", "done"), ("withdraw", "done"), ("change", "done"),
    ]  # fmt: skip
    assert {e["message_id"] for e in entries} == {audit.ASKED.message_id}
    assert entries[2]["change"] == [words for _, words in CHANGES]


async def test_what_was_refused_is_written_down_with_its_reason() -> None:
    api = Regions()
    api.refusal = Refused("no", hint="ask nicely")
    audited = audit.AuditedRegions(api)
    with capture_logs() as entries, pytest.raises(Refused):
        await audited.apply([RemoveRegion(region_id="r0")])
    assert entries[0]["outcome"].startswith("refused: no")
    assert entries[0]["rule"] == ["Refused"]
    api.refusal = combined([Refused("no", rule="one"), Refused("nor", rule="two")])
    with capture_logs() as entries, pytest.raises(Refused):
        await audited.apply([RemoveRegion(region_id="r0")])
    assert entries[0]["rule"] == ["one", "two"]


def test_nothing_of_the_interface_is_left_out() -> None:
    """A method that a Protocol's subclass lacks would quietly return None."""
    wanted = {name for name in vars(RegionsApi) if not name.startswith("_")}
    assert wanted <= vars(audit.AuditedRegions).keys()


async def test_questions_are_not_written_down() -> None:
    audited = audit.AuditedRegions(Regions())
    with capture_logs() as entries:
        await audited.apply([RemoveRegion(region_id="r0")], dry_run=True)
        await audited.host()
        audited.snapshot()
    assert entries == []


def test_the_documentation_lists_every_kind() -> None:
    page = (Path(__file__).parent.parent / "docs" / "hooks.md").read_text()
    rows = dict(re.findall(r"^\| `([0-9a-f]{32})` \| ([^|]+) \|", page, re.M))
    kinds = [*audit.KINDS.values(), audit.ASKED, audit.INCOMPLETE]
    assert {kind.message_id: kind.text for kind in kinds}.items() <= rows.items()
