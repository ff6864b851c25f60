# SPDX-License-Identifier: LGPL-2.1-or-later
"""The model's records as the interface ``io.xshmd.Regions`` says them, and back.

Both sides need it: the daemon replies with records and is given some, ``xshmctl`` gives them.
What comes in has the declared types already; what those cannot say is checked here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from xshmd.changes import AddRegion, AttachRegion, Change, DetachRegion, RemoveRegion, Step
from xshmd.errors import UsageError
from xshmd.events import Event
from xshmd.model import (
    MAX_DOORBELLS,
    UNPLACED,
    USUAL_TERMS,
    WHOLE_REGION,
    Backing,
    CachePolicy,
    DoorbellRoute,
    Guest,
    GuestState,
    Isolation,
    Lease,
    Lifetime,
    Peer,
    PeerState,
    Piece,
    Place,
    Prot,
    ProtEnforcement,
    Region,
    RegionConfig,
    RegionRequest,
    RegionTerms,
    Role,
    Snapshot,
    Transport,
)
from xshmd.units import (
    DOMID_0,
    MAX_GUEST_ADDRESS_BITS,
    MAX_GUEST_FRAMES,
    PAGE_SHIFT,
    PAGE_SIZE,
    DomId,
    Gfn,
    frames_of,
)

Fields = dict[str, Any]


# -- what there is ------------------------------------------------------------------------------


def region_fields(region: Region, snapshot: Snapshot) -> Fields:
    """Return a region as the interface's ``Region``."""
    members = [
        member_fields(guest, request, snapshot)
        for guest in sorted(snapshot.guests, key=lambda guest: (guest.name, guest.domid))
        for request in guest.requests
        if request.region_id == region.region_id
    ]
    return {
        "id": region.region_id,
        "sizeBytes": region.size_bytes,
        "frameCount": region.nr_frames,
        "lifetime": region.lifetime.value,
        "owner": region.owner or None,
        "ready": region.ready,
        "holderUuid": region.holder_uuid,
        "holderDomainId": holder_domid(region.holder_uuid, snapshot),
        "holderFirstFrame": region.holder_first_gfn,
        "members": members,
        "terms": terms_fields(region.terms),
        "leases": [
            lease_fields(lease)
            for lease in sorted(snapshot.leases, key=lambda lease: lease.process.pid)
            if lease.region_id == region.region_id
        ],
        "pieces": [piece_fields(piece, snapshot) for piece in region.pieces]
        if len(region.pieces) > 1
        else None,
        "stillMappedBy": [
            guest.name for guest in snapshot.guests if region.region_id in _still_mapped(guest)
        ]
        or None,
        "pauseMicroseconds": region.pause_us or None,
    }


def lease_fields(lease: Lease) -> Fields:
    """Return a lease as the interface's ``Lease``."""
    return {
        "processId": lease.process.pid,
        "userId": lease.process.uid,
        "processName": lease.process.name or None,
        "prot": lease.prot.value,
    }


def mapping_fields(region: Region, holder: DomId) -> Fields:
    """Return what a process needs to map a region as the interface's ``Mapping``."""
    return {
        "holderDomainId": holder,
        "holderUuid": region.holder_uuid,
        "holderFirstFrame": region.holder_first_gfn,
        "frameCount": region.nr_frames,
        "transport": region.terms.transport.value,
    }


def piece_fields(piece: Piece, snapshot: Snapshot) -> Fields:
    """Return a part of a region in a holder as the interface's ``Piece``."""
    return {
        "holderUuid": piece.holder_uuid,
        "holderDomainId": holder_domid(piece.holder_uuid, snapshot),
        "holderFirstFrame": piece.holder_first_gfn,
        "frameCount": piece.nr_frames,
    }


def _still_mapped(guest: Guest) -> list[str]:
    return sorted({grant.region_id for grant in guest.grants if grant.is_ended})


def member_fields(guest: Guest, request: RegionRequest, snapshot: Snapshot) -> Fields:
    """Return a guest's part in a region as the interface's ``Member``."""
    references = [
        {
            "holderDomainId": holder_domid(grant.holder_uuid, snapshot)
            if grant.holder_uuid
            else DOMID_0,
            "first": grant.first_ref,
            "count": grant.nr_frames,
        }
        for grant in sorted(guest.grants, key=lambda one: one.offset_frames)
        if grant.region_id == request.region_id and not grant.is_ended
    ]
    peer = guest.peer(request.region_id)
    return {
        "guest": guest.name,
        "domainId": guest_domid(guest),
        "state": guest.state.value,
        "role": request.role.value,
        "prot": request.prot.value,
        "firstFrame": request.first_gfn,
        "frameCount": request.nr_frames,
        "offsetFrames": request.offset_frames,
        "references": [one for one in references if one["holderDomainId"] is not None] or None,
        "peerId": None if peer is None else peer.peer_id,
        "peerState": _peer_state(guest, peer).value,
        "ports": list(peer.ports) or None if peer else None,
    }


def _peer_state(guest: Guest, peer: Peer | None) -> PeerState:
    if guest.state is not GuestState.ATTACHED:
        return PeerState.ABSENT
    return PeerState.READY if peer is not None and peer.is_ready else PeerState.JOINED


def guest_fields(guest: Guest, snapshot: Snapshot) -> Fields:
    """Return a guest as the interface's ``Guest``."""
    return {
        "name": guest.name,
        "uuid": guest.uuid,
        "domainId": guest_domid(guest),
        "state": guest.state.value,
        "holderDomainId": holder_domid(guest.holder_uuid, snapshot),
        "regions": [request.region_id for request in guest.requests],
        "failure": guest.failure or None,
        "stillMapped": _still_mapped(guest) or None,
    }


def state_fields(snapshot: Snapshot) -> Fields:
    """Return all that exists as the interface's ``State``, each kind in order."""
    regions = sorted(snapshot.regions, key=lambda region: region.region_id)
    guests = sorted(snapshot.guests, key=lambda guest: (guest.name, guest.domid))
    return {
        "regions": [region_fields(region, snapshot) for region in regions],
        "guests": [guest_fields(guest, snapshot) for guest in guests],
    }


def guest_domid(guest: Guest) -> DomId | None:
    """Return the guest's domid unless its domain has ended: Xen may give that one to another."""
    return None if guest.state is GuestState.REBOOTING else guest.domid


def holder_domid(uuid: str, snapshot: Snapshot) -> DomId | None:
    """Return the domid of the holder with this UUID, if it is there."""
    return next((holder.domid for holder in snapshot.holders if holder.uuid == uuid), None)


# -- what happens -------------------------------------------------------------------------------


def step_fields(step: Step) -> Fields:
    """Return one step of a plan as the interface's ``Step``."""
    return {
        "verb": step.verb,
        "region": step.region,
        "guest": step.guest or None,
        "domainId": step.domid,
        "text": step.text,
    }


def steps_fields(steps: Iterable[Step]) -> Fields:
    """Return the reply of every method that changes something."""
    return {"steps": [step_fields(step) for step in steps]}


def event_fields(event: Event) -> Fields:
    """Return an event as the interface's ``Event``."""
    request = event.request
    return {
        # The interface's language has no hyphen in a name.
        "kind": event.kind.value.replace("-", "_"),
        "region": event.region or None,
        "guest": event.guest or None,
        "domainId": event.domid,
        "holderUuid": event.holder_uuid or None,
        "entry": None if request is None else entry_fields(request),
        "sizeBytes": event.size_bytes or None,
        "reason": event.reason or None,
        "rules": list(event.rules) or None,
        "lease": None if event.lease is None else lease_fields(event.lease),
        "pauseMicroseconds": event.pause_us or None,
    }


# -- what is asked for --------------------------------------------------------------------------


def terms_fields(terms: RegionTerms) -> Fields:
    """Return terms as the interface's ``Terms``."""
    return {
        "prot": terms.prot.value,
        "cachePolicy": terms.cache_policy.value if terms.cache_policy else None,
        "lifetime": terms.lifetime.value if terms.lifetime else None,
        "backing": terms.backing.value,
        "hostFirstFrame": terms.host_first_mfn,
        "transport": terms.transport.value,
        "isolation": terms.isolation.value if terms.isolation else None,
        "protEnforcement": terms.prot_enforcement.value,
        "doorbells": terms.doorbells or None,
        "doorbellRoute": terms.doorbell_route.value if terms.doorbells else None,
    }


def terms_from(fields: Fields | None) -> RegionTerms:
    """Return the record of a ``Terms``; what it leaves out is as usual."""
    fields = fields or {}
    cache_policy, lifetime = fields.get("cachePolicy"), fields.get("lifetime")
    isolation = fields.get("isolation")
    host_first_mfn = fields.get("hostFirstFrame")
    if host_first_mfn is not None:
        _check_range("hostFirstFrame", host_first_mfn, 0)
    return RegionTerms(
        prot=Prot(fields.get("prot") or USUAL_TERMS.prot),
        cache_policy=CachePolicy(cache_policy) if cache_policy else None,
        lifetime=Lifetime(lifetime) if lifetime else None,
        backing=Backing(fields.get("backing") or USUAL_TERMS.backing),
        host_first_mfn=host_first_mfn,
        transport=Transport(fields.get("transport") or USUAL_TERMS.transport),
        isolation=Isolation(isolation) if isolation else None,
        prot_enforcement=ProtEnforcement(
            fields.get("protEnforcement") or USUAL_TERMS.prot_enforcement
        ),
        doorbells=_doorbells(fields.get("doorbells")),
        doorbell_route=DoorbellRoute(fields.get("doorbellRoute") or USUAL_TERMS.doorbell_route),
    )


def _doorbells(number: int | None) -> int:
    if number is not None and not 2 <= number <= MAX_DOORBELLS:
        raise UsageError(
            f"doorbells for {number} peers",
            hint=f"say a number of 2 to {MAX_DOORBELLS}, or null",
        )
    return number or 0


def definition_fields(config: RegionConfig) -> Fields:
    """Return a region of the system as the interface's ``Definition``."""
    return {
        "id": config.region_id,
        "sizeBytes": config.nr_frames << PAGE_SHIFT,
        "terms": terms_fields(config.terms),
        "place": str(config.place) or None,
    }


def definition_from(fields: Fields) -> RegionConfig:
    """Return the record of a ``Definition``.

    Raises:
        UsageError: its size is not of whole pages, or out of range.
    """
    size_bytes = fields["sizeBytes"]
    if size_bytes % PAGE_SIZE:
        raise UsageError(
            f"the size of region {fields['id']}, {size_bytes} bytes, is not of whole pages",
            hint=f"say a multiple of {PAGE_SIZE}",
        )
    _check_range("sizeBytes", size_bytes // PAGE_SIZE, 1)
    return RegionConfig(
        region_id=fields["id"],
        nr_frames=frames_of(size_bytes),
        terms=terms_from(fields.get("terms")),
        place=_place(fields.get("place"), "Varlink call"),
    )


def entry_fields(request: RegionRequest) -> Fields:
    """Return a guest's part in a region as the interface's ``Entry``."""
    return {
        "region": request.region_id,
        "firstFrame": None if request.first_gfn == UNPLACED else request.first_gfn,
        "frameCount": None if request.nr_frames == WHOLE_REGION else request.nr_frames,
        "offsetFrames": request.offset_frames,
        "role": request.role.value,
        "prot": request.prot.value,
        "terms": None if request.terms == USUAL_TERMS else terms_fields(request.terms),
        "place": str(request.place) or None,
    }


def entry_from(fields: Fields) -> RegionRequest:
    """Return the record of an ``Entry``.

    Raises:
        UsageError: a number is out of range.
    """
    first_gfn, nr_frames = fields.get("firstFrame"), fields.get("frameCount")
    offset_frames = fields.get("offsetFrames") or 0
    if first_gfn is not None:
        _check_range("firstFrame", first_gfn, 0)
    if nr_frames is not None:
        _check_range("frameCount", nr_frames, 1)
    _check_range("offsetFrames", offset_frames, 0)
    terms = terms_from(fields.get("terms"))
    role = Role(fields.get("role") or Role.BORROWER)
    return RegionRequest(
        region_id=fields["region"],
        first_gfn=UNPLACED if first_gfn is None else Gfn(first_gfn),
        nr_frames=nr_frames or WHOLE_REGION,
        role=role,
        prot=Prot(fields.get("prot") or Prot.RW),
        offset_frames=offset_frames,
        cache_policy=terms.cache_policy if role is Role.OWNER else None,
        terms=terms,
        place=_place(fields.get("place"), f"entry for {fields['region']}"),
    )


def change_from(fields: Fields) -> Change:
    """Return the record of a ``Change``.

    Raises:
        UsageError: it is none of the four, or several.
    """
    said: Mapping[str, Fields] = {
        name: value for name, value in fields.items() if value is not None
    }
    if len(said) != 1:
        raise UsageError(
            f"a change says {len(said)} things to do",
            hint="say one of add, remove, attach and detach in each change",
        )
    ((kind, what),) = said.items()
    match kind:
        case "add":
            return AddRegion(config=definition_from(what))
        case "remove":
            return RemoveRegion(region_id=what["region"], force=bool(what.get("force")))
        case "attach":
            return AttachRegion(guest=what["guest"], request=entry_from(what["entry"]))
        case _:
            return DetachRegion(guest=what["guest"], region_id=what["region"])


def _place(text: str | None, otherwise: str) -> Place:
    return Place(file=text or otherwise)


def _check_range(name: str, value: int, least: int) -> None:
    if not least <= value < MAX_GUEST_FRAMES:
        raise UsageError(
            f"{name} is out of range",
            hint=f"no guest has addresses of more than {MAX_GUEST_ADDRESS_BITS} bits",
        )
