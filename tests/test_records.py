# SPDX-License-Identifier: LGPL-2.1-or-later
"""A record read back is the record that was written; anything else is said, and never believed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xshmd.engine import intents, records, saving
from xshmd.engine.intents import Intent, Part
from xshmd.errors import Refused, StoreError
from xshmd.model import (
    Backing,
    CachePolicy,
    DoorbellRoute,
    Grant,
    Guest,
    GuestState,
    Holder,
    Isolation,
    Lifetime,
    Peer,
    Piece,
    Place,
    Prot,
    ProtEnforcement,
    Region,
    RegionRequest,
    RegionTerms,
    Role,
    Snapshot,
    Transport,
)
from xshmd.units import DomId, Gfn

NEW_IN_GUESTS = {"reserve", "reserved", "grants", "peers"}
"""Fields that the first xshmd did not write."""
WORD = st.text("abcdefghijklmnopqrstuvwxyzABC0123456789_-", min_size=1, max_size=20)
TEXT = st.text(max_size=30)
GFN = st.integers(0, 1 << 40).map(Gfn)
COUNT = st.integers(1, 1 << 30)
HOLDERS = st.builds(
    Holder, uuid=WORD, domid=st.integers(-1, 0x7FEF).map(DomId), next_gfn=GFN,
    nr_grant_frames=st.integers(1, 64),
)  # fmt: skip
PIECES = st.builds(
    Piece, holder_uuid=WORD, holder_first_gfn=GFN, offset_frames=COUNT, nr_frames=COUNT
)
GRANTS = st.builds(
    Grant, region_id=WORD, holder_uuid=WORD, first_ref=COUNT, nr_frames=COUNT,
    offset_frames=COUNT, is_ended=st.booleans(),
)  # fmt: skip
TERMS = st.builds(
    RegionTerms, prot=st.sampled_from(Prot),
    cache_policy=st.none() | st.sampled_from(CachePolicy),
    lifetime=st.none() | st.sampled_from(Lifetime), backing=st.sampled_from(Backing),
    host_first_mfn=st.none() | st.integers(0, 1 << 40), transport=st.sampled_from(Transport),
    isolation=st.none() | st.sampled_from(Isolation),
    prot_enforcement=st.sampled_from(ProtEnforcement), doorbells=st.integers(0, 15),
    doorbell_route=st.sampled_from(DoorbellRoute),
)  # fmt: skip
REGIONS = st.builds(
    Region, region_id=WORD, nr_frames=COUNT, holder_uuid=WORD, holder_first_gfn=GFN,
    lifetime=st.sampled_from(Lifetime), owner=TEXT, owner_came=st.booleans(), terms=TERMS,
    from_file=st.booleans(), ready=st.booleans(),
    pieces=st.lists(PIECES, max_size=3).map(tuple),
)  # fmt: skip
REQUESTS = st.builds(
    RegionRequest, region_id=WORD, first_gfn=GFN, nr_frames=COUNT, role=st.sampled_from(Role),
    prot=st.sampled_from(Prot), offset_frames=st.integers(0, 1 << 30),
    cache_policy=st.none() | st.sampled_from(CachePolicy),
    terms=TERMS, place=st.builds(Place, file=TEXT, key=TEXT, line=st.integers(0, 10**6)),
)  # fmt: skip
PEERS = st.builds(
    Peer, region_id=WORD, peer_id=st.integers(-1, 14),
    ports=st.lists(st.integers(1, 131071), max_size=15).map(tuple),
)  # fmt: skip
GUESTS = st.builds(
    Guest, domid=st.integers(1, 0x7FEF).map(DomId), uuid=WORD, name=TEXT, generation=WORD,
    state=st.sampled_from(GuestState), holder_uuid=WORD | st.just(""),
    requests=st.lists(REQUESTS, max_size=4).map(tuple),
    peers=st.lists(PEERS, max_size=3).map(tuple),
    reserve=st.booleans(), reserved=st.lists(st.tuples(GFN, COUNT), max_size=2).map(tuple),
    grants=st.lists(GRANTS, max_size=3).map(tuple), ended_at=st.floats(0, 2e9), failure=TEXT,
)  # fmt: skip
PARTS = st.builds(
    Part, generation=WORD, attach=st.lists(REQUESTS, max_size=3).map(tuple),
    detach=st.lists(REQUESTS, max_size=3).map(tuple), is_late=st.booleans(),
    pauses=st.none() | st.integers(0, 255), is_counting=st.booleans(), is_mapping=st.booleans(),
)  # fmt: skip
NAMES = st.lists(WORD, max_size=3, unique=True).map(tuple)
INTENTS = st.builds(
    Intent, id=WORD, reason=TEXT, is_committed=st.booleans(), creates=NAMES, removes=NAMES,
    lifetimes=st.dictionaries(WORD, st.sampled_from(Lifetime), max_size=3).map(
        lambda found: tuple(found.items())
    ),
    parts=st.lists(PARTS, max_size=3, unique_by=lambda part: part.generation).map(tuple),
)  # fmt: skip
DECODERS: list[Callable[[str, str], object]] = [
    records.decode_holder, records.decode_region, records.decode_guest,
]  # fmt: skip


@settings(deadline=None)
@given(HOLDERS)
def test_holders_come_back(holder: Holder) -> None:
    assert records.decode_holder("p", records.encode(holder)) == holder


@settings(deadline=None)
@given(REGIONS)
def test_regions_come_back(region: Region) -> None:
    assert records.decode_region("p", records.encode(region)) == region


@settings(deadline=None)
@given(GUESTS)
def test_guests_come_back(guest: Guest) -> None:
    assert records.decode_guest("p", records.encode(guest)) == guest


@settings(deadline=None)
@given(INTENTS)
def test_sets_of_changes_come_back(intent: Intent) -> None:
    *before, (at, head) = intents.nodes(intent)
    assert at == intents.intent_path(intent.id)
    below = {path.removeprefix(f"{at}/"): text for path, text in before}
    assert intents.decode(intent.id, head, below) == intent
    # Without its own node, which is written last, nothing of it was begun.
    assert intents.decode(intent.id, "", below) is None


@pytest.mark.parametrize("head", ["nonsense", "{}", '{"v":1}', '{"v":2,"committed":true}'])
def test_a_set_that_is_not_one_is_said(head: str) -> None:
    with pytest.raises(StoreError, match="/xshmd/changes/x"):
        intents.decode("x", head, {})


@settings(deadline=None)
@given(REGIONS, GUESTS)
def test_records_of_earlier_versions_are_read(region: Region, guest: Guest) -> None:
    """What 0.1 wrote: without the fields that came since, and all regions were their members'."""
    document = json.loads(records.encode(region))
    for field in ("came", "terms", "file"):
        del document[field]
    assert records.decode_region("p", json.dumps(document)) == dataclasses.replace(
        region, owner_came=False, terms=RegionTerms(), from_file=False
    )
    document = json.loads(records.encode(guest))
    for request in document["requests"]:
        del request["terms"]
    assert records.decode_guest("p", json.dumps(document)) == dataclasses.replace(
        guest,
        requests=tuple(dataclasses.replace(one, terms=RegionTerms()) for one in guest.requests),
    )


@settings(deadline=None)
@given(REGIONS)
def test_fields_of_later_versions_are_passed_over(region: Region) -> None:
    document = json.loads(records.encode(region)) | {"new": {"a": 1}}
    document["terms"]["newer"] = "b"
    assert records.decode_region("p", json.dumps(document)) == region


@settings(deadline=None)
@given(HOLDERS | REGIONS | GUESTS)
def test_records_are_one_line_of_ascii(record: Holder | Region | Guest) -> None:
    """xenstore values are bytes, and an admin reads them with xenstore-ls."""
    text = records.encode(record)
    assert text.isascii()
    assert "\n" not in text


def guest_with(nr_regions: int, failure: str = "") -> Guest:
    requests = tuple(
        RegionRequest(
            region_id=f"region_{index * 7919}", first_gfn=Gfn((1 << 24) + 4096 * index),
            nr_frames=1 << 8, role=Role.BORROWER,
            place=Place(file="/etc/xen/a-guest.cfg", key=f"static_shm[{index}]", line=12 + index),
        )
        for index in range(nr_regions)
    )  # fmt: skip
    return Guest(
        domid=DomId(1), uuid="0" * 36, name="a-guest", generation="0" * 16,
        state=GuestState.ATTACHED, holder_uuid="0" * 36, requests=requests, failure=failure,
    )  # fmt: skip


def test_a_guest_with_few_regions_can_be_read_with_xenstore_ls() -> None:
    assert json.loads(records.encode(guest_with(12)))["name"] == "a-guest"


def test_a_guest_with_many_regions_fits_in_a_message() -> None:
    """Why it is destroyed has room too, whatever that says."""
    guest = guest_with(100)
    records.check_fits(guest)
    worst = "".join(chr(33 + index * index % 89) for index in range(records.FAILURE_MAX))
    text = records.encode(guest_with(100, worst))
    assert len(text) < 4000
    assert text.isascii()
    assert records.decode_guest("p", text) == guest_with(100, worst)


def test_a_guest_with_too_many_regions_is_refused() -> None:
    with pytest.raises(Refused, match="10000 regions"):
        records.check_fits(guest_with(10_000))


@pytest.mark.parametrize("text", ["z:", "z:!", "z:AAAA", "z:" + "A" * 400])
def test_what_was_not_packed_is_not_unpacked(text: str) -> None:
    with pytest.raises(StoreError):
        records.decode_guest("/xshmd/x", text)


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "[1]", "{}", "1", '"v"', '{"v":2}', '{"v":"1"}', '{"v":1}', "{", "\\xff"],
)
def test_nonsense_is_said(decode: Callable[[str, str], object], text: str) -> None:
    with pytest.raises(StoreError, match="/xshmd/x") as caught:
        decode("/xshmd/x", text)
    assert caught.value.facts["path"] == "/xshmd/x"
    assert caught.value.hint


@settings(deadline=None)
@given(st.sampled_from(DECODERS), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORD, inner, max_size=5),
))  # fmt: skip
def test_no_json_breaks_a_decoder(decode: Callable[[str, str], object], value: Any) -> None:
    if isinstance(value, dict):
        value["v"] = 1
    with pytest.raises(StoreError):
        decode("p", json.dumps(value))


@settings(deadline=None)
@given(GUESTS, st.data())
def test_a_field_that_is_missing(guest: Guest, data: st.DataObject) -> None:
    document = json.loads(records.encode(guest))
    field = data.draw(st.sampled_from(sorted(document.keys() - NEW_IN_GUESTS)))
    del document[field]
    with pytest.raises(StoreError):
        records.decode_guest("p", json.dumps(document))


@given(GUESTS)
def test_a_guest_that_an_earlier_xshmd_wrote_down(guest: Guest) -> None:
    document = json.loads(records.encode(guest))
    for field in NEW_IN_GUESTS:
        document.pop(field, None)
    as_it_was = dataclasses.replace(guest, reserve=True, reserved=(), grants=(), peers=())
    assert records.decode_guest("p", json.dumps(document)) == as_it_was


@settings(deadline=None)
@given(GUESTS, st.sampled_from(["domid", "uuid", "name", "generation", "state", "requests"]))
def test_a_field_of_another_type(guest: Guest, field: str) -> None:
    document = json.loads(records.encode(guest))
    document[field] = 1.5 if not isinstance(document[field], int) else "1"
    with pytest.raises(StoreError):
        records.decode_guest("p", json.dumps(document))


@settings(deadline=None)
@given(GUESTS)
def test_another_versions_record_is_not_read(guest: Guest) -> None:
    document = json.loads(records.encode(guest)) | {"v": records.SCHEMA + 1}
    with pytest.raises(StoreError, match="schema"):
        records.decode_guest("p", json.dumps(document))


def test_what_a_guest_is_told() -> None:
    request = RegionRequest(
        region_id="r", first_gfn=Gfn(0x3A000), nr_frames=2, role=Role.BORROWER, prot=Prot.RW
    )
    guest = Guest(
        domid=DomId(7), uuid="u", name="n", generation="g", state=GuestState.ATTACHING,
        requests=(request,),
    )  # fmt: skip
    told = dict(records.published(guest, Snapshot()))
    assert told.pop("/local/domain/7/xshm", "g") == "g"
    assert dict([saving.forbidden(guest.domid)]).items() <= told.items()
    del told[saving.forbidden(guest.domid)[0]]
    assert told == {
        "/local/domain/7/xshm/r": (
            "begin=0x3a000000 size=0x2000 role=borrower prot=rw transport=physmap offset=0x0 "
            "backing=holder cache=write-back memory_map=unchanged"
        )
    }
    assert records.mark_path(DomId(7)) == "/local/domain/7/xshm"


def test_what_a_guest_is_told_of_host_memory_in_its_map() -> None:
    requests = tuple(
        RegionRequest(
            region_id=region_id, first_gfn=Gfn(0x1000 + 16 * number), nr_frames=1,
            role=Role.BORROWER, offset_frames=number,
        )
        for number, region_id in enumerate(("plain", "bar"))
    )  # fmt: skip
    guest = Guest(
        domid=DomId(7), uuid="u", name="n", generation="g", state=GuestState.MAPPING,
        requests=requests, reserved=((requests[1].first_gfn, 1),),
    )  # fmt: skip
    terms = RegionTerms(backing=Backing.HOST, host_first_mfn=0xC000000)
    bar = Region(
        region_id="bar", nr_frames=4, holder_uuid="h", holder_first_gfn=Gfn(0), terms=terms
    )
    told = dict(records.published(guest, Snapshot(regions=(bar,))))
    assert told["/local/domain/7/xshm/plain"].endswith(
        "offset=0x0 backing=holder cache=write-back memory_map=unchanged"
    )
    assert told["/local/domain/7/xshm/bar"].endswith(
        "offset=0x1000 backing=host cache=none memory_map=reserved"
    )


def test_nobody_but_dom0_reads_the_records() -> None:
    assert records.ROOT_PERMISSIONS == ("n0",)
    for path in (records.holder_path("h"), records.region_path("r"), records.guest_path("g")):
        assert path.startswith(f"{records.ROOT}/")
