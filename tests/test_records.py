# SPDX-License-Identifier: LGPL-2.1-or-later
"""A record read back is the record that was written; anything else is said, and never believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xshmd.engine import records
from xshmd.errors import StoreError
from xshmd.model import (
    CachePolicy,
    Guest,
    GuestState,
    Holder,
    Lifetime,
    Place,
    Prot,
    Region,
    RegionRequest,
    Role,
)
from xshmd.units import DomId, Gfn

WORD = st.text("abcdefghijklmnopqrstuvwxyzABC0123456789_-", min_size=1, max_size=20)
TEXT = st.text(max_size=30)
GFN = st.integers(0, 1 << 40).map(Gfn)
COUNT = st.integers(1, 1 << 30)
HOLDERS = st.builds(Holder, uuid=WORD, domid=st.integers(-1, 0x7FEF).map(DomId), next_gfn=GFN)
REGIONS = st.builds(
    Region, region_id=WORD, nr_frames=COUNT, holder_uuid=WORD, holder_first_gfn=GFN,
    lifetime=st.sampled_from(Lifetime), owner=TEXT, ready=st.booleans(),
)  # fmt: skip
REQUESTS = st.builds(
    RegionRequest, region_id=WORD, first_gfn=GFN, nr_frames=COUNT, role=st.sampled_from(Role),
    prot=st.sampled_from(Prot), offset_frames=st.integers(0, 1 << 30),
    cache_policy=st.none() | st.sampled_from(CachePolicy),
    place=st.builds(Place, file=TEXT, key=TEXT, line=st.integers(0, 10**6)),
)  # fmt: skip
GUESTS = st.builds(
    Guest, domid=st.integers(1, 0x7FEF).map(DomId), uuid=WORD, name=TEXT, generation=WORD,
    state=st.sampled_from(GuestState), holder_uuid=WORD | st.just(""),
    requests=st.lists(REQUESTS, max_size=4).map(tuple),
    ended_at=st.floats(0, 2e9), failure=TEXT,
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
@given(HOLDERS | REGIONS | GUESTS)
def test_records_are_one_line_of_ascii(record: Holder | Region | Guest) -> None:
    """xenstore values are bytes, and an admin reads them with xenstore-ls."""
    text = records.encode(record)
    assert text.isascii()
    assert "\n" not in text


def test_a_guest_with_many_regions_fits_in_a_message() -> None:
    request = RegionRequest(
        region_id="r" * 20, first_gfn=Gfn(1 << 24), nr_frames=1 << 18, role=Role.BORROWER,
        place=Place(file="/etc/xen/a-guest.cfg", key="static_shm[1]", line=12),
    )  # fmt: skip
    guest = Guest(
        domid=DomId(1), uuid="0" * 36, name="a-guest", generation="0" * 16,
        state=GuestState.ATTACHED, holder_uuid="0" * 36, requests=(request,) * 16,
    )  # fmt: skip
    assert len(records.encode(guest)) < 4000


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
    field = data.draw(st.sampled_from(sorted(document)))
    del document[field]
    with pytest.raises(StoreError):
        records.decode_guest("p", json.dumps(document))


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
    told = dict(records.published(guest))
    assert told.pop("/local/domain/7/xshm", "g") == "g"
    assert told == {
        "/local/domain/7/xshm/r": (
            "begin=0x3a000000 size=0x2000 role=borrower prot=rw transport=physmap"
        )
    }
    assert records.mark_path(DomId(7)) == "/local/domain/7/xshm"


def test_nobody_but_dom0_reads_the_records() -> None:
    assert records.ROOT_PERMISSIONS == ("n0",)
    for path in (records.holder_path("h"), records.region_path("r"), records.guest_path("g")):
        assert path.startswith(f"{records.ROOT}/")
