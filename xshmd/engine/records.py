# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal's form: one xenstore node an object, JSON inside, under a root only dom0 can read.

xenstore is the right place for it: it is lost exactly when the domains are.  One node an object
because a round trip to xenstored costs as much as mapping hundreds of frames.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Container, Mapping
from typing import Any, Final

from xshmd.engine import saving
from xshmd.engine.packing import PACKED_MAX, pack, unpack
from xshmd.errors import Refused, StoreError
from xshmd.model import (
    USUAL_TERMS,
    Backing,
    CachePolicy,
    DoorbellRoute,
    Grant,
    Guest,
    GuestState,
    Holder,
    Isolation,
    Lease,
    Lifetime,
    MapChange,
    Peer,
    Piece,
    Place,
    Process,
    Prot,
    ProtEnforcement,
    Region,
    RegionRequest,
    RegionTerms,
    Role,
    Snapshot,
    Transport,
)
from xshmd.policy import grants
from xshmd.units import DOMID_0, DomId, Gfn, address_of, bytes_of

ROOT: Final = "/xshmd"
SCHEMA: Final = 1
FAILURE_MAX: Final = 800
"""How many characters of the reason why a guest is destroyed are kept."""
ROOT_PERMISSIONS: Final = ("n0",)
"""dom0 owns it, nobody else may read or write: guests' records are nobody's business."""

Document = dict[str, Any]


def holder_path(uuid: str) -> str:
    """Return the node of the holder with this UUID."""
    return f"{ROOT}/holders/{uuid}"


def region_path(region_id: str) -> str:
    """Return the node of the region with this id."""
    return f"{ROOT}/regions/{region_id}"


def guest_path(generation: str) -> str:
    """Return the node of one life of a guest; domids come again, generations do not."""
    return f"{ROOT}/guests/{generation}"


def lease_path(lease_id: str) -> str:
    """Return the node of a lease."""
    return f"{ROOT}/leases/{lease_id}"


def encode(record: Holder | Region | Guest | Lease) -> str:
    """Return the text of a record."""
    if isinstance(record, Holder):
        document: Document = {"uuid": record.uuid, "domid": record.domid, "next": record.next_gfn}
        if record.serves_grants:
            document["tables"] = record.nr_grant_frames
    elif isinstance(record, Region):
        document = {
            "id": record.region_id,
            "frames": record.nr_frames,
            "holder": record.holder_uuid,
            "first": record.holder_first_gfn,
            "lifetime": record.lifetime.value,
            "owner": record.owner,
            "came": record.owner_came,
            "terms": _terms_document(record.terms),
            "file": record.from_file,
            "ready": record.ready,
            "kept": record.kept,
            "pause": record.pause_us,
        }
        if record.pieces:
            document["pieces"] = [dataclasses.astuple(piece) for piece in record.pieces]
    elif isinstance(record, Lease):
        document = {
            "id": record.lease_id,
            "region": record.region_id,
            "prot": record.prot.value,
            "pid": record.process.pid,
            "uid": record.process.uid,
            "started": record.process.started,
            "name": record.process.name,
        }
    else:
        document = {
            "domid": record.domid,
            "uuid": record.uuid,
            "name": record.name,
            "generation": record.generation,
            "state": record.state.value,
            "holder": record.holder_uuid,
            "requests": [request_document(request) for request in record.requests],
            "reserve": record.reserve,
            "reserved": record.reserved,
            "peers": [[one.region_id, one.peer_id, *one.ports] for one in record.peers],
            "ended": record.ended_at,
            "failure": record.failure,
        }
        if record.grants:
            document["grants"] = [dataclasses.astuple(grant) for grant in record.grants]
    return pack({"v": SCHEMA} | document)


def check_fits(guest: Guest) -> None:
    """Raise Refused if the guest has more regions than a record of it can name."""
    # Why a guest is destroyed has to fit in its record too.
    if len(encode(guest)) > PACKED_MAX - FAILURE_MAX:
        raise Refused(
            f"guest {guest.name} would have {len(guest.requests)} regions, more than xshmd can "
            "keep a record of",
            hint="have fewer, larger regions, and give out parts of them with offset= and size=",
            guest=guest.name,
        )


def request_document(request: RegionRequest) -> Document:
    """Return a request as part of a record."""
    return {
        "id": request.region_id,
        "gfn": request.first_gfn,
        "frames": request.nr_frames,
        "role": request.role.value,
        "prot": request.prot.value,
        "offset": request.offset_frames,
        "cache": request.cache_policy.value if request.cache_policy else "",
        "terms": _terms_document(request.terms),
        "at": [request.place.file, request.place.key, request.place.line],
    }


def read_request(document: Document) -> RegionRequest:
    """Read a request back; KeyError, ValueError or TypeError if it is none."""
    file, key, line = document["at"]
    return RegionRequest(
        region_id=_text(document, "id"),
        first_gfn=Gfn(_number(document, "gfn")),
        nr_frames=_number(document, "frames"),
        role=Role(document["role"]),
        prot=Prot(document["prot"]),
        offset_frames=_number(document, "offset"),
        cache_policy=CachePolicy(document["cache"]) if document["cache"] else None,
        terms=_terms(document),
        place=Place(file=file, key=key, line=line),
    )


def _terms_document(terms: RegionTerms) -> Document:
    """Only what is unusual is written: a record has to fit in one message."""
    said = {
        field.name: getattr(terms, field.name)
        for field in dataclasses.fields(terms)
        if getattr(terms, field.name) != getattr(USUAL_TERMS, field.name)
    }
    return {
        name: value.value if isinstance(value, enum.Enum) else value for name, value in said.items()
    }


def _mfn(value: object) -> int:
    return _number({"host_first_mfn": value}, "host_first_mfn")


def _doorbells(value: object) -> int:
    return _number({"doorbells": value}, "doorbells")


_TERMS: Final[dict[str, Callable[[Any], Any]]] = {
    "prot": Prot,
    "cache_policy": CachePolicy,
    "lifetime": Lifetime,
    "backing": Backing,
    "host_first_mfn": _mfn,
    "transport": Transport,
    "isolation": Isolation,
    "prot_enforcement": ProtEnforcement,
    "doorbells": _doorbells,
    "doorbell_route": DoorbellRoute,
}


def _terms(document: Document) -> RegionTerms:
    said = document.get("terms", {})
    return RegionTerms(**{name: read(said[name]) for name, read in _TERMS.items() if name in said})


def _piece(holder_uuid: str, first_gfn: int, offset_frames: int, nr_frames: int) -> Piece:
    return Piece(
        holder_uuid=str(holder_uuid), holder_first_gfn=Gfn(int(first_gfn)),
        offset_frames=int(offset_frames), nr_frames=int(nr_frames),
    )  # fmt: skip


def _grant(
    region_id: str, holder_uuid: str, first_ref: int, nr_frames: int, offset: int, is_ended: bool
) -> Grant:
    return Grant(
        region_id=str(region_id), holder_uuid=str(holder_uuid), first_ref=int(first_ref),
        nr_frames=int(nr_frames), offset_frames=int(offset), is_ended=is_ended is True,
    )  # fmt: skip


def _text(document: Document, key: str) -> str:
    value = document[key]
    if not isinstance(value, str):
        raise TypeError(f"{key} is {value!r}, not a text")
    return value


def _number(document: Document, key: str) -> int:
    value = document[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{key} is {value!r}, not a number")
    return value


def read_document(path: str, text: str) -> Document:
    """Read a record of any kind; StoreError if it is not one of ours."""
    try:
        document = unpack(text)
        schema = document["v"]
    except (ValueError, KeyError, TypeError) as broken:
        raise unreadable(path, f"{broken}") from broken
    if schema != SCHEMA:
        raise unreadable(path, f"its schema is {schema}, this xshmd writes {SCHEMA}")
    return dict(document)


def unreadable(path: str, why: str) -> StoreError:
    """Return the error that says so of a record."""
    return StoreError(
        f"the record {path} in xenstore cannot be read: {why}",
        hint="run the xshmd that wrote it, or end its guests and remove the node with xenstore-rm",
        path=path,
    )


def decode_holder(path: str, text: str) -> Holder:
    """Read a holder's record; StoreError if it is not one of ours."""
    document = read_document(path, text)
    try:
        return Holder(
            uuid=_text(document, "uuid"),
            domid=DomId(_number(document, "domid")),
            next_gfn=Gfn(_number(document, "next")),
            nr_grant_frames=_number({"tables": 1} | document, "tables"),
        )
    except (KeyError, ValueError, TypeError) as broken:
        raise unreadable(path, repr(broken)) from broken


def decode_region(path: str, text: str) -> Region:
    """Read a region's record; StoreError if it is not one of ours."""
    document = read_document(path, text)
    try:
        return Region(
            region_id=_text(document, "id"),
            nr_frames=_number(document, "frames"),
            holder_uuid=_text(document, "holder"),
            holder_first_gfn=Gfn(_number(document, "first")),
            lifetime=Lifetime(document["lifetime"]),
            owner=_text(document, "owner"),
            owner_came=document.get("came") is True,
            terms=_terms(document),
            from_file=document.get("file") is True,
            ready=document["ready"] is True,
            pieces=tuple(_piece(*fields) for fields in document.get("pieces", ())),
            kept=str(document.get("kept", "")),
            pause_us=int(document.get("pause", 0)),
        )
    except (KeyError, ValueError, TypeError) as broken:
        raise unreadable(path, repr(broken)) from broken


def decode_guest(path: str, text: str) -> Guest:
    """Read a guest's record; StoreError if it is not one of ours."""
    document = read_document(path, text)
    try:
        return Guest(
            domid=DomId(_number(document, "domid")),
            uuid=_text(document, "uuid"),
            name=_text(document, "name"),
            generation=_text(document, "generation"),
            state=GuestState(document["state"]),
            holder_uuid=_text(document, "holder"),
            requests=tuple(read_request(one) for one in document["requests"]),
            reserve=document.get("reserve") is not False,
            reserved=tuple((Gfn(int(at)), int(nr)) for at, nr in document.get("reserved", ())),
            grants=tuple(_grant(*fields) for fields in document.get("grants", ())),
            peers=tuple(
                Peer(region_id=str(one), peer_id=int(peer_id), ports=tuple(map(int, ports)))
                for one, peer_id, *ports in document.get("peers", ())
            ),
            ended_at=float(document["ended"]),
            failure=_text(document, "failure"),
        )
    except (KeyError, ValueError, TypeError) as broken:
        raise unreadable(path, repr(broken)) from broken


def decode_lease(path: str, text: str) -> Lease:
    """Read a lease's record; StoreError if it is not one of ours."""
    document = read_document(path, text)
    try:
        return Lease(
            lease_id=_text(document, "id"),
            region_id=_text(document, "region"),
            prot=Prot(document["prot"]),
            process=Process(
                pid=_number(document, "pid"),
                uid=_number(document, "uid"),
                started=_number(document, "started"),
                name=_text(document, "name"),
            ),
        )
    except (KeyError, ValueError, TypeError) as broken:
        raise unreadable(path, repr(broken)) from broken


def mark_path(domid: DomId) -> str:
    """Return the node with our generation mark in a domain's own directory, which dies with it."""
    return f"/local/domain/{domid}/xshm"


def published(guest: Guest, there: Snapshot) -> tuple[tuple[str, str], ...]:
    """Return our mark, and the nodes by which a guest that can read xenstore finds its regions.

    They inherit ``n0,r<domid>`` from the domain's directory: it may read them and not write them.
    Plain ``key=value`` words, numbers in bytes, as the guest's configuration says them; what is
    added to them later comes at the end.

    Args:
        guest: The guest.
        there: All that exists, its own regions and their holders among it.
    """
    mark = (mark_path(guest.domid), guest.generation)
    terms = {region.region_id: region.terms for region in there.regions}
    domids = {"": int(DOMID_0)} | {one.uuid: int(one.domid) for one in there.holders}
    return (
        mark,
        saving.forbidden(guest.domid),
        *(
            (
                f"{mark_path(guest.domid)}/{request.region_id}",
                _told(request, terms.get(request.region_id, USUAL_TERMS), guest.reserved)
                + _granted(request, guest, domids)
                + _told_of_peers(guest.peer(request.region_id)),
            )
            for request in guest.requests
        ),
    )


def _granted(request: RegionRequest, guest: Guest, domids: Mapping[str, int]) -> str:
    there = [one for one in guest.grants if one.region_id == request.region_id and not one.is_ended]
    return f" grants={grants.published(there, domids)}" if there else ""


def _told(request: RegionRequest, terms: RegionTerms, reserved: Container[tuple[Gfn, int]]) -> str:
    # Host memory is never cached, whatever the guest does: see policy/host_ranges.py.
    cache = "none" if terms.backing is Backing.HOST else "write-back"
    memory_map = (
        MapChange.RESERVED
        if (request.first_gfn, request.nr_frames) in reserved
        else MapChange.UNCHANGED
    )
    return (
        f"begin={address_of(request.first_gfn):#x} size={request.size_bytes:#x} "
        f"role={request.role} prot={request.prot} transport={terms.transport} "
        f"offset={bytes_of(request.offset_frames):#x} backing={terms.backing} cache={cache} "
        f"memory_map={memory_map}"
    )


def _told_of_peers(peer: Peer | None) -> str:
    if peer is None:
        return ""
    ports = f" doorbells={','.join(map(str, peer.ports))}" if peer.ports else ""
    return f" peer={peer.peer_id}{ports}"
