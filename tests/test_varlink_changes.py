# SPDX-License-Identifier: LGPL-2.1-or-later
"""The methods that change something, and those that read and write a region's bytes."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from test_varlink_service import CONTRACT, call
from varlink_fakes import OWNER, SNAPSHOT, FakeRegions

from xshmd.changes import AddRegion, AttachRegion, DetachRegion, RemoveRegion, Step
from xshmd.errors import Conflict
from xshmd.model import (
    UNPLACED,
    WHOLE_REGION,
    Backing,
    CachePolicy,
    Isolation,
    Lifetime,
    Place,
    Prot,
    ProtEnforcement,
    RegionConfig,
    RegionRequest,
    RegionTerms,
    Role,
    Transport,
)
from xshmd.units import DomId, Gfn
from xshmd.varlink import records

STEP = Step(verb="attach", region="r0", guest="ctl", domid=DomId(5), text="map it")
FULL_TERMS = RegionTerms(
    prot=Prot.RO,
    cache_policy=CachePolicy.ARM_NORMAL,
    lifetime=Lifetime.MEMBERS,
    backing=Backing.HOST,
    host_first_mfn=0x80000,
    transport=Transport.GRANT,
    isolation=Isolation.REGION,
    prot_enforcement=ProtEnforcement.ADVISORY,
)


@pytest.fixture
def api() -> FakeRegions:
    api = FakeRegions()
    api.steps = (STEP,)
    return api


DEFINITION = {"id": "r9", "sizeBytes": 8192, "terms": {"lifetime": "system"}, "place": "a.toml:3"}
ENTRY = {"region": "r9", "firstFrame": 0x40000, "frameCount": 1, "offsetFrames": 1}
ADD = AddRegion(
    config=RegionConfig(
        region_id="r9",
        nr_frames=2,
        terms=RegionTerms(lifetime=Lifetime.SYSTEM),
        place=Place(file="a.toml:3"),
    )
)
ATTACH = AttachRegion(
    guest="5",
    request=RegionRequest(
        region_id="r9",
        first_gfn=Gfn(0x40000),
        nr_frames=1,
        offset_frames=1,
        role=Role.BORROWER,
        place=Place(file="entry for r9"),
    ),
)
REMOVE = RemoveRegion(region_id="r9", force=True)
DETACH = DetachRegion(guest="ctl", region_id="r9")


@pytest.mark.parametrize(
    ("method", "parameters", "changes"),
    [
        ("AddRegion", {"region": DEFINITION}, (ADD,)),
        ("RemoveRegion", {"id": "r9", "force": True}, (REMOVE,)),
        ("RemoveRegion", {"id": "r9"}, (RemoveRegion(region_id="r9"),)),
        ("Attach", {"guest": "5", "entries": [ENTRY]}, (ATTACH,)),
        ("Detach", {"guest": "ctl", "regions": ["r9"]}, (DETACH,)),
        (
            "Apply",
            {
                "changes": [
                    {"detach": {"guest": "ctl", "region": "r9"}},
                    {"remove": {"region": "r9", "force": True}},
                    {"attach": {"guest": "5", "entry": ENTRY}},
                    {"add": DEFINITION, "remove": None},
                ]
            },
            (DETACH, REMOVE, ATTACH, ADD),
        ),
    ],
)
@pytest.mark.parametrize(("given", "dry_run"), [({}, False), ({"dryRun": True}, True)])
async def test_a_change_reaches_the_engine_and_its_steps_come_back(
    api: FakeRegions,
    method: str,
    parameters: dict[str, Any],
    changes: tuple[object, ...],
    given: dict[str, bool],
    dry_run: bool,
) -> None:
    reply = await call(api, method, **parameters, **given)
    assert api.applied == [(changes, dry_run)]
    assert reply.parameters == {
        "steps": [
            {"verb": "attach", "region": "r0", "guest": "ctl", "domainId": 5, "text": "map it"}
        ]
    }


async def test_reload(api: FakeRegions) -> None:
    assert (await call(api, "Reload")).parameters["steps"][0]["text"] == "map it"
    await call(api, "Reload", dryRun=True)
    assert api.reloaded == [False, True]


@pytest.mark.parametrize("method", ["RemoveRegion", "Reload", "ReadRegion"])
async def test_a_refusal_comes_back_as_it_is(api: FakeRegions, method: str) -> None:
    api.refusal = Conflict("ctl has it", hint="detach it", guest="ctl")
    parameters: dict[str, Any] = {} if method == "Reload" else {"id": "r0"}
    if method == "ReadRegion":
        parameters |= {"offsetBytes": 0, "byteCount": 1}
    reply = await call(api, method, **parameters)
    assert reply.error == "io.xshmd.Regions.Conflict"
    assert reply.parameters["facts"] == {"guest": "ctl"}


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({}, "say one of"),
        ({"add": DEFINITION, "remove": {"region": "r9"}}, "say one of"),
        ({"add": {"id": "r9", "sizeBytes": 4097}}, "multiple of 4096"),
        ({"add": {"id": "r9", "sizeBytes": 0}}, "bits"),
        ({"add": {"id": "r9", "sizeBytes": -4096}}, "bits"),
        ({"add": {"id": "r9", "sizeBytes": (1 << 63) - 4096}}, "bits"),
        ({"attach": {"guest": "a", "entry": {"region": "r9", "firstFrame": -1}}}, "bits"),
        ({"attach": {"guest": "a", "entry": {"region": "r9", "frameCount": 0}}}, "bits"),
        ({"attach": {"guest": "a", "entry": {"region": "r9", "offsetFrames": 1 << 40}}}, "bits"),
        ({"add": {"id": "r9", "sizeBytes": 4096, "terms": {"hostFirstFrame": -1}}}, "bits"),
    ],
)
async def test_numbers_that_cannot_be_are_refused(
    api: FakeRegions, change: dict[str, Any], hint: str
) -> None:
    reply = await call(api, "Apply", changes=[change])
    assert reply.error == "io.xshmd.Regions.InvalidArgument"
    assert hint in reply.parameters["hint"]
    assert api.applied == []


def test_what_is_not_said_is_as_usual() -> None:
    request = records.entry_from({"region": "r9"})
    assert (request.first_gfn, request.nr_frames) == (UNPLACED, WHOLE_REGION)
    assert (request.role, request.prot, request.offset_frames) == (Role.BORROWER, Prot.RW, 0)
    assert records.terms_from(None) == RegionTerms()


@pytest.mark.parametrize("terms", [RegionTerms(), FULL_TERMS])
def test_records_come_back_as_they_went(terms: RegionTerms) -> None:
    request = RegionRequest(
        region_id="r9",
        first_gfn=Gfn(7),
        nr_frames=2,
        role=Role.OWNER,
        prot=Prot.RO,
        offset_frames=0,
        cache_policy=terms.cache_policy,
        terms=terms,
        place=Place(file="a.cfg"),
    )
    fields = records.entry_fields(request)
    entry = CONTRACT.types["Entry"]
    definition = CONTRACT.types["Definition"]
    CONTRACT.check(entry, fields)  # type: ignore[arg-type]  # it is a structure
    assert records.entry_from(fields) == request
    config = RegionConfig(region_id="r9", nr_frames=2, terms=terms, place=Place(file="b"))
    fields = records.definition_fields(config)
    CONTRACT.check(definition, fields)  # type: ignore[arg-type]  # it is a structure
    assert records.definition_from(fields) == config


async def test_bytes_are_read_and_written_as_they_are(api: FakeRegions) -> None:
    data = bytes(range(256)) * 256
    text = base64.b64encode(data).decode()
    await call(api, "WriteRegion", id="r0", offsetBytes=3, data=text, dryRun=True)
    assert not any(api.memory)
    await call(api, "WriteRegion", id="r0", offsetBytes=3, data=text)
    assert api.written == [("r0", 3, data, True), ("r0", 3, data, False)]
    reply = await call(api, "ReadRegion", id="r0", offsetBytes=3, byteCount=len(data))
    assert base64.b64decode(reply.parameters["data"]) == data


@pytest.mark.parametrize("data", ["", "=", "YQ", "Y Q==", "é", "YQ==\n"])
async def test_what_is_no_base64_is_no_data(api: FakeRegions, data: str) -> None:
    reply = await call(api, "WriteRegion", id="r0", offsetBytes=0, data=data)
    if data:
        assert reply.parameters == {"parameter": "data"}
        assert api.written == []
    else:
        assert api.written == [("r0", 0, b"", False)]


async def test_status(api: FakeRegions) -> None:
    api.figures = {
        "last_reload_at": 1_700_000_000,
        "attaches": 3,
        "uptime_seconds": 8,
        "regions": 1,
    }
    status = (await call(api, "Status")).parameters["status"]
    assert (status["regionCount"], status["guestCount"], status["holderCount"]) == (1, 2, 1)
    assert status["sharedBytes"] == 1 << 20
    assert status["memoryBytes"] > 1 << 20
    assert status["lastReloadAt"] == 1_700_000_000
    assert status["uptimeSeconds"] == 8
    assert status["counters"] == {"attaches": 3}
    api.figures = {}
    assert (await call(api, "Status")).parameters["status"]["lastReloadAt"] is None


@pytest.mark.parametrize("word", ["ctl", str(OWNER.domid)])
async def test_a_guest_may_be_named_by_its_domid(api: FakeRegions, word: str) -> None:
    await call(api, "WaitGuest", name=word)
    assert api.waited == [("ctl", 60.0)]


async def test_the_domid_of_a_domain_that_is_gone_names_nobody(api: FakeRegions) -> None:
    assert SNAPSHOT.guests[0].domid == 6
    await call(api, "WaitGuest", name="6")
    assert api.waited == [("6", 60.0)]
