# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interface over the engine's records: every reply is what the contract declares."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from fakes.hypercalls import SimulatedCalls
from varlink_fakes import BORROWER, OWNER, SNAPSHOT, FakeRegions, NoCopier

from xshmd.daemon import service
from xshmd.daemon.buffer_methods import BufferMethods
from xshmd.daemon.list_methods import ListMethods
from xshmd.errors import Refused
from xshmd.model import Grant, GuestState, GuestType, Peer, RegionTerms
from xshmd.share.mediator import Mediator
from xshmd.share.scatter import Scatter
from xshmd.units import Gfn
from xshmd.varlink import idl
from xshmd.varlink.wire import Call, Reply

CONTRACT = idl.load(service.INTERFACE)
CFG = """
name = "ctl"
type = "pvh"
memory = 16
static_shm = [ "id=r0, begin=0x38000000, size=0x100000, role=owner" ]
"""


@pytest.fixture
def api() -> FakeRegions:
    return FakeRegions()


async def call(api: FakeRegions, method: str, **parameters: Any) -> Reply:
    """Call a method and check its reply against the contract."""
    sent: list[Reply] = []

    async def send(reply: Reply) -> None:
        sent.append(reply)

    await service.dispatcher(api).handle(Call(f"{CONTRACT.name}.{method}", parameters), send)
    (reply,) = sent
    error = reply.error.removeprefix(f"{CONTRACT.name}.")
    if not reply.error:
        CONTRACT.check(CONTRACT.methods[method].gives, reply.parameters)
    elif error in CONTRACT.errors:
        CONTRACT.check(CONTRACT.errors[error], reply.parameters)
    return reply


def test_every_method_of_the_contract_is_answered(api: FakeRegions) -> None:
    scatter = Scatter(api, NoCopier())
    tables = (
        service.RegionsService(api),
        ListMethods(scatter, Mediator(scatter, NoCopier())),
        BufferMethods(SimulatedCalls()),
    )
    answered = [name for table in tables for name in table.methods()]
    assert sorted(answered) == sorted(CONTRACT.methods)


async def test_a_region_says_where_everything_is(api: FakeRegions) -> None:
    owner = dataclasses.replace(OWNER, peers=(Peer(region_id="r0", peer_id=0, ports=(3, 4)),))
    region = dataclasses.replace(SNAPSHOT.regions[0], terms=RegionTerms(doorbells=2))
    api.now = dataclasses.replace(SNAPSHOT, regions=(region,), guests=(BORROWER, owner))
    assert (await call(api, "ShowRegion", id="r0")).parameters["region"] == {
        "id": "r0",
        "sizeBytes": 1 << 20,
        "frameCount": 256,
        "lifetime": "members",
        "owner": "ctl",
        "ready": True,
        "holderUuid": OWNER.holder_uuid,
        "holderDomainId": 3,
        "holderFirstFrame": 0x100,
        "members": [
            {
                "guest": "ctl",
                "domainId": 5,
                "state": "attached",
                "role": "owner",
                "prot": "rw",
                "firstFrame": 0x38000,
                "frameCount": 256,
                "offsetFrames": 0,
                "references": None,
                "peerId": 0,
                "peerState": "joined",
                "ports": [3, 4],
            },
            {
                "guest": "log",
                "domainId": None,
                "state": "rebooting",
                "role": "borrower",
                "prot": "ro",
                "firstFrame": 0x40000,
                "frameCount": 2,
                "offsetFrames": 1,
                "references": None,
                "peerId": None,
                "peerState": "absent",
                "ports": None,
            },
        ],
        "terms": {
            "prot": "rw",
            "cachePolicy": None,
            "lifetime": None,
            "backing": "holder",
            "hostFirstFrame": None,
            "transport": "physmap",
            "isolation": None,
            "protEnforcement": "required",
            "doorbells": 2,
            "doorbellRoute": "auto",
        },
        "leases": [],
        "pieces": None,
        "stillMappedBy": None,
        "pauseMicroseconds": None,
    }


async def test_regions_are_sorted_and_may_be_nobodys(api: FakeRegions) -> None:
    first = dataclasses.replace(SNAPSHOT.regions[0], region_id="a", owner="", holder_uuid="gone")
    api.now = dataclasses.replace(SNAPSHOT, regions=(*SNAPSHOT.regions, first))
    regions = (await call(api, "ListRegions")).parameters["regions"]
    assert [region["id"] for region in regions] == ["a", "r0"]
    assert (regions[0]["owner"], regions[0]["holderDomainId"], regions[0]["members"]) == (
        None,
        None,
        [],
    )


async def test_nothing_is_an_empty_list(api: FakeRegions) -> None:
    api.now = type(SNAPSHOT)()
    assert (await call(api, "ListRegions")).parameters == {"regions": []}
    assert (await call(api, "ListGuests")).parameters == {"guests": []}


@pytest.mark.parametrize(("asked", "hint"), [("r1", "did you mean r0?"), ("zzz", "xshmctl list")])
async def test_no_such_region(api: FakeRegions, asked: str, hint: str) -> None:
    reply = await call(api, "ShowRegion", id=asked)
    assert reply.error == "io.xshmd.Regions.NoSuchRegion"
    assert hint in reply.parameters["hint"]


async def test_guests(api: FakeRegions) -> None:
    doomed = dataclasses.replace(
        OWNER, name="bad", state=GuestState.DOOMED, holder_uuid="", failure="no memory"
    )
    api.now = dataclasses.replace(SNAPSHOT, guests=(OWNER, BORROWER, doomed))
    guests = (await call(api, "ListGuests")).parameters["guests"]
    assert [guest["name"] for guest in guests] == ["bad", "ctl", "log"]
    assert guests[0]["failure"] == "no memory"
    assert guests[0]["holderDomainId"] is None
    assert guests[1] == {
        "name": "ctl",
        "uuid": OWNER.uuid,
        "domainId": 5,
        "state": "attached",
        "holderDomainId": 3,
        "regions": ["r0"],
        "failure": None,
        "stillMapped": None,
    }
    assert guests[2]["domainId"] is None


async def test_references_and_what_is_still_mapped(api: FakeRegions) -> None:
    def grant(first_ref: int, offset: int, *, ended: bool = False) -> Grant:
        return Grant(
            region_id="r0", holder_uuid=OWNER.holder_uuid, first_ref=first_ref, nr_frames=4,
            offset_frames=offset, is_ended=ended,
        )  # fmt: skip

    owner = dataclasses.replace(OWNER, grants=(grant(20, 4), grant(8, 0), grant(30, 0, ended=True)))
    api.now = dataclasses.replace(SNAPSHOT, guests=(owner, BORROWER))
    region = (await call(api, "ShowRegion", id="r0")).parameters["region"]
    assert region["members"][0]["references"] == [
        {"holderDomainId": 3, "first": 8, "count": 4},
        {"holderDomainId": 3, "first": 20, "count": 4},
    ]
    assert region["stillMappedBy"] == ["ctl"]
    assert region["pieces"] is None
    guests = (await call(api, "ListGuests")).parameters["guests"]
    assert [guest["stillMapped"] for guest in guests] == [["r0"], None]


async def test_a_declaration_is_parsed_here(api: FakeRegions) -> None:
    reply = await call(api, "DeclareGuest", file="/etc/xen/ctl.cfg", text=CFG)
    assert reply.parameters == {"name": "ctl", "regions": ["r0"]}
    (config,) = api.declared
    assert (config.name, config.guest_type) == ("ctl", GuestType.PVH)
    assert config.requests[0].first_gfn == Gfn(0x38000)


async def test_xls_own_default_type_counts(api: FakeRegions) -> None:
    text = CFG.replace('type = "pvh"', "")
    await call(api, "DeclareGuest", file="a.cfg", text=text)
    assert [config.guest_type for config in api.declared] in ([], [GuestType.PV])


async def test_a_configuration_that_is_none(api: FakeRegions) -> None:
    reply = await call(api, "DeclareGuest", file="a.cfg", text="name = \n = 5")
    assert reply.error == "io.xshmd.Regions.UnreadableConfiguration"
    assert "a.cfg:" in reply.parameters["message"]


async def test_a_refusal_has_its_reason(api: FakeRegions) -> None:
    api.refusal = Refused("not here", hint="go there")
    reply = await call(api, "DeclareGuest", file="a.cfg", text=CFG)
    assert reply == Reply({"message": "not here", "hint": "go there"}, "io.xshmd.Regions.Refused")


async def test_withdraw(api: FakeRegions) -> None:
    assert await call(api, "WithdrawGuest", name="ctl") == Reply({})
    assert api.withdrawn == ["ctl"]


@pytest.mark.parametrize(
    ("given", "waited"),
    [({}, 60.0), ({"timeoutSeconds": None}, 60.0), ({"timeoutSeconds": 0}, 0.0)],
)
async def test_wait(api: FakeRegions, given: dict[str, Any], waited: float) -> None:
    reply = await call(api, "WaitGuest", name="ctl", **given)
    assert reply.parameters["guest"]["name"] == "ctl"
    assert api.waited == [("ctl", waited)]


@pytest.mark.parametrize("timeout_s", [-1, 3601])
async def test_nobody_waits_for_ever(api: FakeRegions, timeout_s: int) -> None:
    reply = await call(api, "WaitGuest", name="ctl", timeoutSeconds=timeout_s)
    assert reply.error == "org.varlink.service.InvalidParameter"
    assert reply.parameters == {"parameter": "timeoutSeconds"}
    assert api.waited == []


async def test_host(api: FakeRegions) -> None:
    host = (await call(api, "GetHost")).parameters["host"]
    assert (host["arch"], host["xenVersion"], host["pageSize"]) == ("x86_64", "4.20.4", 4096)
    assert {finding["verdict"] for finding in host["findings"]} == {"ok"}
