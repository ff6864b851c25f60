# SPDX-License-Identifier: LGPL-2.1-or-later
"""One guest's entry among all that is said about its region elsewhere, and what exists of it.

"seeds" in the sources below is reference/seeds-and-peers.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final

from xshmd.model import (
    DOMAIN_0,
    Lifetime,
    Prot,
    ProtEnforcement,
    Region,
    RegionRequest,
    RegionTerms,
    Role,
    Transport,
)
from xshmd.policy import sealing
from xshmd.policy.definitions import Claim, Definition, Said
from xshmd.policy.findings import Findings, config_error, conflict, refused, region_at
from xshmd.policy.kept_terms import differences
from xshmd.units import Gfn, address_of, bytes_of, human_size, is_within

USUAL_PLACES: Final = "/etc/xen, /etc/xshmd/guests.d or /etc/xshmd/regions.d"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One guest's entry, and what else there is about its region."""

    claim: Claim
    region: Region | None
    """What exists of it."""
    own: tuple[Definition, ...]
    """The definition that the entry is, if it is one."""
    elsewhere: tuple[Definition, ...]
    """The region's definitions but for the guest's own."""
    counts: Definition | None
    """What counts for the entry: the region that exists before any that is defined."""

    @classmethod
    def of(cls, claim: Claim, region: Region | None, said: Said) -> Case:
        """Gather what there is about an entry."""
        is_owner = claim.request.role is Role.OWNER
        own = (Definition.of_claim(claim),) if is_owner else ()
        definitions = said.definitions(claim.request.region_id)
        elsewhere = tuple(one for one in definitions if one.owner != claim.guest)
        counts = next(iter(own + elsewhere), None)
        if region is not None:
            counts = Definition.of_region(region)
        return cls(claim=claim, region=region, own=own, elsewhere=elsewhere, counts=counts)

    @property
    def request(self) -> RegionRequest:
        return self.claim.request

    @property
    def is_owner(self) -> bool:
        return bool(self.own)

    @property
    def definitions(self) -> tuple[Definition, ...]:
        """All of the region's definitions, the entry's own first."""
        return self.own + self.elsewhere


# --- who defines it -------------------------------------------------------------------------------


def undefined_region(case: Case) -> Findings:
    """A borrower takes the region's size from its definition, so there has to be one (seeds A8).

    That the owner's guest is made first is not needed, as it was for the published series.
    """
    if case.counts is None:
        region_id = case.request.region_id
        yield config_error(
            "undefined-region",
            case.request.place,
            f"guest '{case.claim.guest}' borrows region '{region_id}', which nobody defines",
            f"give another guest an entry with id={region_id} and role=owner, or define the region"
            f" for the system, in a file in {USUAL_PLACES}",
            region=region_id,
        )


def two_owners(case: Case) -> Findings:
    """A region has one owner (seeds A7, A19: the published code let the second one win)."""
    region, others = case.region, [one for one in case.elsewhere if one.owner]
    if case.is_owner:
        second = str(case.claim)
        if others:
            first = others[0].who
        elif region is not None and region.owner not in ("", case.claim.guest):
            first = f"guest '{region.owner}'"
        else:
            return
    else:
        rivals = [one for one in others if one.owner != others[0].owner]
        if region is not None or not rivals:
            return
        first, second = others[0].who, rivals[0].who
    yield conflict(
        "two-owners",
        case.request.place,
        f"region '{case.request.region_id}' has two owners: {first} and {second}",
        "make all but one of them role=borrower",
        region=case.request.region_id,
    )


def owner_of_systems(case: Case) -> Findings:
    """A region is either a guest's or the system's, as that decides when it ends (seeds B4, B7)."""
    region_id = case.request.region_id
    systems = [one for one in case.definitions if not one.owner]
    owners = [one for one in case.definitions if one.owner]
    who = ""
    if owners and systems and (case.region is None or case.is_owner):
        who = systems[0].who
    elif case.is_owner and case.region is not None and not case.region.owner:
        who = "the system, for which it exists"
    if who:
        yield conflict(
            "owner-of-systems",
            case.request.place,
            f"region '{region_id}' is defined by {who}, and by its owner {owners[0].who}",
            "say role=borrower in the guest, or remove the other definition",
            region=region_id,
        )


def different_sizes(case: Case) -> Findings:
    """One id is one piece of memory, so it has one size (seeds B11)."""
    if case.region is not None or not case.definitions:
        return
    first = case.definitions[0]
    for other in case.definitions[1:]:
        if other.nr_frames != first.nr_frames:
            yield conflict(
                "different-sizes",
                case.request.place,
                f"region '{first.region_id}' has two sizes: {_size(first.nr_frames)} by {first.who}"
                f" and {_size(other.nr_frames)} by {other.who}",
                "define it once",
                region=first.region_id,
            )
            return


def other_size(case: Case) -> Findings:
    """A region keeps its size for as long as it exists: its members have it mapped."""
    request, region = case.request, case.region
    if case.is_owner and region is not None and region.nr_frames != request.nr_frames:
        yield conflict(
            "other-size",
            request.place,
            f"region '{region.region_id}' is to have {human_size(request.size_bytes)}, but it"
            f" exists with {human_size(region.size_bytes)}",
            f"say size={region.size_bytes:#x}, or end all of its guests so that it is made anew",
            region=region.region_id,
        )


def other_terms(case: Case) -> Findings:
    """A region keeps its terms for as long as it exists: its members have it by them (seeds B15).

    So an owner that comes back has to say what it said when the region was made.
    """
    region = case.region
    if not case.is_owner or region is None or region.owner != case.claim.guest:
        return
    differ = differences(case.own[0].terms, region, lifetime=Lifetime.OWNER)
    if differ:
        kept = " and ".join(one.kept for one in differ)
        yield conflict(
            "other-terms",
            case.request.place,
            f"region '{region.region_id}' is to have {' and '.join(one.said for one in differ)},"
            f" but it exists with {kept}",
            f"say {kept}, or end all of its guests so that it is made anew",
            region=region.region_id,
        )


# --- what a member may have of it -----------------------------------------------------------------


def beyond_end(case: Case) -> Findings:
    """A borrower can only have frames that the region has (seeds A9, A14).

    Fewer than all it may have, unlike in the first proposal: its reviewer asked why not.
    """
    request, definition = case.request, case.counts
    if case.is_owner or definition is None:
        return
    total = bytes_of(definition.nr_frames)
    # Whoever wants all there is from an offset on wants one frame at least.
    nr_frames = request.nr_frames or 1
    if not is_within(request.offset_frames, nr_frames, definition.nr_frames):
        end = request.offset_frames + nr_frames
        if case.region is not None:
            whose = f"{definition.who} has"
        else:
            whose = f"{'its owner ' if definition.owner else ''}{definition.who} gives it"
        yield config_error(
            "beyond-end",
            request.place,
            f"{region_at(request)} ends at offset {bytes_of(end):#x} of the region, but {whose}"
            f" only {human_size(total)} ({total:#x})",
            f"make offset + size at most {total:#x}",
        )


def part_of_2017(case: Case) -> Findings:
    """In the proposal of 2017 a slave's area is as large as its master's, or wrong (seeds A9)."""
    request, definition = case.request, case.counts
    if case.is_owner or definition is None or not request.is_whole:
        return
    if request.nr_frames < definition.nr_frames:
        yield config_error(
            "part-of-2017",
            request.place,
            f"{region_at(request)} has {_size(request.nr_frames)}, and the region"
            f" {_size(definition.nr_frames)}: the proposal of 2017 knew no parts of regions",
            "give both the same size; or write the entry in the final form, with size= and offset=",
        )


def prot_above_owner(case: Case) -> Findings:
    """The definition says the most that any member may have (seeds A6, A14)."""
    definition = case.counts
    if definition is None or case.is_owner:
        return
    if definition.terms.prot is Prot.RO and case.request.prot is Prot.RW:
        yield config_error(
            "prot-above-owner",
            case.request.place,
            f"{region_at(case.request)} asks for prot=rw, but {definition.who} allows at most"
            " prot=ro",
            "say prot=ro, or prot=rw where the region is defined",
        )


def read_only(case: Case) -> Findings:
    """Stock Xen cannot keep a guest from writing to a page mapped into it (security.md, 6).

    p2m_map_foreign is always writable on x86, p2m_map_foreign_ro is never reached on Arm, and a
    guest with the holder as its target could map the page again.  This is the answer to the first
    proposal's reviewer, who asked how the attributes are audited (seeds A6): they are refused,
    unless the definition says that they bind nobody; then :func:`unenforced` says so again.
    """
    definition = case.counts
    if definition is None or not _is_unenforceable(case.request, definition.terms):
        return
    if definition.terms.prot_enforcement is ProtEnforcement.REQUIRED:
        yield refused(
            "read-only",
            case.request.place,
            f"{region_at(case.request)} asks for prot=ro, which Xen cannot enforce: memory mapped"
            " into a guest is always writable",
            "where the region is defined, say transport=grant if its guests can map grants; or, if"
            " prot=ro is to bind nobody, prot_enforcement=advisory; else say prot=rw",
        )


def unenforced(case: Case) -> str:
    """Return what has to be said of an entry though it breaks no rule; empty if nothing has."""
    definition = case.counts
    if definition is None or not _is_unenforceable(case.request, definition.terms):
        return ""
    return (
        f"{case.claim}: prot=ro of {region_at(case.request)} is advisory and binds nobody: the"
        " guest can write to it"
    )


def mixed_kinds(cases: Sequence[Case]) -> Findings:
    """A guest has one target, so all its regions are in one holder: sealed ones or others.

    The members of a sealed region could do with the others what they like, whoever's those are.
    """
    known = {one.request.region_id: one for one in cases if one.counts is not None}
    terms = [(name, one.counts.terms) for name, one in known.items() if one.counts is not None]
    if (pair := sealing.mixed(terms)) is None:
        return
    sealed, plain = known[pair[0]], known[pair[1]]
    yield conflict(
        "mixed-kinds",
        sealed.request.place,
        f"guest '{sealed.claim.guest}' has {region_at(sealed.request)}, which is sealed, and"
        f" {region_at(plain.request)}, which is not",
        "say isolation=sealed where the second is defined, or leave it out at both",
        region=pair[0],
    )


def _is_unenforceable(request: RegionRequest, terms: RegionTerms) -> bool:
    return request.prot is Prot.RO and terms.transport is Transport.PHYSMAP


def direct_map(case: Case) -> Findings:
    """The control domain's addresses are the machine's (seeds B14).

    So it can only have machine frames that are known beforehand, and have them where they are.  We
    make no other guest of that kind.
    """
    definition = case.counts
    if case.claim.guest != DOMAIN_0 or definition is None:
        return
    span = definition.host_span
    if span is None:
        yield refused(
            "direct-map",
            case.request.place,
            f"{region_at(case.request)} is for {DOMAIN_0}, whose addresses are the machine's, and"
            " has none of its own there",
            "say the region's host address where it is defined",
        )
    elif case.request.first_gfn != span[0] + case.request.offset_frames:
        right = address_of(Gfn(span[0] + case.request.offset_frames))
        yield config_error(
            "direct-map",
            case.request.place,
            f"{region_at(case.request)} is for {DOMAIN_0}, whose addresses are the machine's, but"
            f" the region is at {right:#x} there",
            f"begin at {right:#x}",
        )


REGION_RULES: tuple[Callable[[Case], Findings], ...] = (
    undefined_region,
    two_owners,
    owner_of_systems,
    different_sizes,
    other_size,
    other_terms,
    beyond_end,
    part_of_2017,
    prot_above_owner,
    read_only,
    direct_map,
)
"""Those for each entry among all others."""
BESIDE_RULES: tuple[Callable[[Sequence[Case]], Findings], ...] = (mixed_kinds,)
"""Those for all entries of one guest."""


def _size(nr_frames: int) -> str:
    return human_size(bytes_of(nr_frames))
