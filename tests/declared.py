# SPDX-License-Identifier: LGPL-2.1-or-later
"""Declarations that make sense, for tests of the forms they are written in."""

import dataclasses

from hypothesis import strategies as st

from xshmd.declarations import Declarations
from xshmd.model import (
    MAX_DOORBELLS,
    NOWHERE,
    UNPLACED,
    USUAL_TERMS,
    WHOLE_REGION,
    Backing,
    CachePolicy,
    DoorbellRoute,
    GuestConfig,
    GuestType,
    Isolation,
    Lifetime,
    Prot,
    ProtEnforcement,
    RegionConfig,
    RegionRequest,
    RegionTerms,
    Role,
    Transport,
)
from xshmd.units import Gfn

IDS = st.text("abcXYZ019_", min_size=1, max_size=8)
NAMES = st.text("abcXYZ019_-. é\"'\\", min_size=1, max_size=8)
FRAMES = st.one_of(st.integers(1, 1 << 20), st.sampled_from([256, 512, 1 << 18, 3 << 9]))
GFNS = st.integers(0, (1 << 40) - 1).map(Gfn)
UUIDS = st.uuids().map(str)


@st.composite
def region_terms(draw: st.DrawFn, *, owned: bool) -> RegionTerms:
    backing = draw(st.sampled_from(Backing))
    lifetimes = [None, Lifetime.MEMBERS, Lifetime.SYSTEM] + [Lifetime.OWNER] * owned
    return RegionTerms(
        prot=draw(st.sampled_from(Prot)),
        cache_policy=draw(st.sampled_from([None, *CachePolicy])),
        lifetime=draw(st.sampled_from(lifetimes)),
        backing=backing,
        host_first_mfn=draw(GFNS) if backing is Backing.HOST else None,
        transport=draw(st.sampled_from(Transport)),
        isolation=draw(st.sampled_from([None, *Isolation])),
        prot_enforcement=draw(st.sampled_from(ProtEnforcement)),
        doorbells=draw(st.sampled_from([0, 2, MAX_DOORBELLS])),
        doorbell_route=draw(st.sampled_from(DoorbellRoute)),
    )


def owners_request(region: RegionConfig, first_gfn: Gfn) -> RegionRequest:
    return RegionRequest(
        region_id=region.region_id,
        first_gfn=first_gfn,
        nr_frames=region.nr_frames,
        role=Role.OWNER,
        prot=region.terms.prot,
        cache_policy=region.terms.cache_policy,
        terms=region.terms,
    )


@st.composite
def declarations(draw: st.DrawFn, names: st.SearchStrategy[str] = NAMES) -> Declarations:
    """Draw some regions, the system's, owned and defined elsewhere, with members in their order."""
    guests = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    requests: dict[str, list[RegionRequest]] = {name: [] for name in guests}
    regions = []
    for region_id in draw(st.lists(IDS, max_size=5, unique=True)):
        members = draw(st.lists(st.sampled_from(guests), unique=True))
        kinds = ["system"] + ["owned", "external"] * bool(members)
        kind = draw(st.sampled_from(kinds))
        region = RegionConfig(
            region_id=region_id,
            nr_frames=draw(FRAMES),
            terms=draw(region_terms(owned=kind == "owned")),
        )
        if kind == "system":
            regions.append(region)
        for index, name in enumerate(members):
            first_gfn = draw(st.one_of(st.just(UNPLACED), GFNS))
            if kind == "owned" and index == 0:
                requests[name].append(owners_request(region, first_gfn))
                continue
            requests[name].append(
                RegionRequest(
                    region_id=region_id,
                    first_gfn=first_gfn,
                    nr_frames=draw(st.one_of(st.just(WHOLE_REGION), FRAMES)),
                    role=Role.BORROWER,
                    prot=draw(st.sampled_from(Prot)),
                    offset_frames=draw(st.one_of(st.just(0), FRAMES)),
                    terms=USUAL_TERMS,
                )
            )
    return Declarations(
        regions=tuple(regions),
        guests=tuple(
            GuestConfig(
                name=name,
                uuid=draw(st.one_of(st.just(""), UUIDS)),
                guest_type=draw(st.sampled_from(GuestType)),
                memory_mib=draw(st.integers(0, 4096)),
                maxmem_mib=draw(st.integers(0, 4096)),
                hap=draw(st.booleans()),
                altp2m=draw(st.booleans()),
                nestedhvm=draw(st.booleans()),
                extended_regions=draw(st.booleans()),
                reserve=draw(st.booleans()),
                requests=tuple(requests[name]),
            )
            for name in guests
        ),
    )


def plain(said: Declarations) -> Declarations:
    """Return what is said, without where, and in an order that does not depend on the form."""
    return dataclasses.replace(
        said,
        regions=tuple(
            sorted(
                (dataclasses.replace(region, place=NOWHERE) for region in said.regions),
                key=lambda region: region.region_id,
            )
        ),
        guests=tuple(
            sorted(
                (
                    dataclasses.replace(guest, place=NOWHERE, requests=_without_places(guest))
                    for guest in said.guests
                ),
                key=lambda guest: guest.name,
            )
        ),
    )


def _without_places(guest: GuestConfig) -> tuple[RegionRequest, ...]:
    return tuple(dataclasses.replace(request, place=NOWHERE) for request in guest.requests)
