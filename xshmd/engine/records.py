# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal's form: one xenstore node an object, JSON inside, under a root only dom0 can read.

xenstore is the right place for it: it is lost exactly when the domains are.  One node an object
because a round trip to xenstored costs as much as mapping hundreds of frames.
"""

from __future__ import annotations

import json
from typing import Any, Final

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
from xshmd.units import DomId, Gfn, address_of

ROOT: Final = "/xshmd"
SCHEMA: Final = 1
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


def encode(record: Holder | Region | Guest) -> str:
    """Return the text of a record."""
    if isinstance(record, Holder):
        document: Document = {"uuid": record.uuid, "domid": record.domid, "next": record.next_gfn}
    elif isinstance(record, Region):
        document = {
            "id": record.region_id,
            "frames": record.nr_frames,
            "holder": record.holder_uuid,
            "first": record.holder_first_gfn,
            "lifetime": record.lifetime.value,
            "owner": record.owner,
            "ready": record.ready,
        }
    else:
        document = {
            "domid": record.domid,
            "uuid": record.uuid,
            "name": record.name,
            "generation": record.generation,
            "state": record.state.value,
            "holder": record.holder_uuid,
            "requests": [_request_document(request) for request in record.requests],
            "ended": record.ended_at,
            "failure": record.failure,
        }
    return json.dumps({"v": SCHEMA} | document, separators=(",", ":"))


def _request_document(request: RegionRequest) -> Document:
    return {
        "id": request.region_id,
        "gfn": request.first_gfn,
        "frames": request.nr_frames,
        "role": request.role.value,
        "prot": request.prot.value,
        "offset": request.offset_frames,
        "cache": request.cache_policy.value if request.cache_policy else "",
        "at": [request.place.file, request.place.key, request.place.line],
    }


def _request(document: Document) -> RegionRequest:
    file, key, line = document["at"]
    return RegionRequest(
        region_id=_text(document, "id"),
        first_gfn=Gfn(_number(document, "gfn")),
        nr_frames=_number(document, "frames"),
        role=Role(document["role"]),
        prot=Prot(document["prot"]),
        offset_frames=_number(document, "offset"),
        cache_policy=CachePolicy(document["cache"]) if document["cache"] else None,
        place=Place(file=file, key=key, line=line),
    )


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


def _document(path: str, text: str) -> Document:
    try:
        document = json.loads(text)
        schema = document["v"]
    except (ValueError, KeyError, TypeError) as broken:
        raise _unreadable(path, f"{broken}") from broken
    if schema != SCHEMA:
        raise _unreadable(path, f"its schema is {schema}, this xshmd writes {SCHEMA}")
    return dict(document)


def _unreadable(path: str, why: str) -> StoreError:
    return StoreError(
        f"the record {path} in xenstore cannot be read: {why}",
        hint="run the xshmd that wrote it, or end its guests and remove the node with xenstore-rm",
        path=path,
    )


def decode_holder(path: str, text: str) -> Holder:
    """Read a holder's record; StoreError if it is not one of ours."""
    document = _document(path, text)
    try:
        return Holder(
            uuid=_text(document, "uuid"),
            domid=DomId(_number(document, "domid")),
            next_gfn=Gfn(_number(document, "next")),
        )
    except (KeyError, ValueError, TypeError) as broken:
        raise _unreadable(path, repr(broken)) from broken


def decode_region(path: str, text: str) -> Region:
    """Read a region's record; StoreError if it is not one of ours."""
    document = _document(path, text)
    try:
        return Region(
            region_id=_text(document, "id"),
            nr_frames=_number(document, "frames"),
            holder_uuid=_text(document, "holder"),
            holder_first_gfn=Gfn(_number(document, "first")),
            lifetime=Lifetime(document["lifetime"]),
            owner=_text(document, "owner"),
            ready=document["ready"] is True,
        )
    except (KeyError, ValueError, TypeError) as broken:
        raise _unreadable(path, repr(broken)) from broken


def decode_guest(path: str, text: str) -> Guest:
    """Read a guest's record; StoreError if it is not one of ours."""
    document = _document(path, text)
    try:
        return Guest(
            domid=DomId(_number(document, "domid")),
            uuid=_text(document, "uuid"),
            name=_text(document, "name"),
            generation=_text(document, "generation"),
            state=GuestState(document["state"]),
            holder_uuid=_text(document, "holder"),
            requests=tuple(_request(request) for request in document["requests"]),
            ended_at=float(document["ended"]),
            failure=_text(document, "failure"),
        )
    except (KeyError, ValueError, TypeError) as broken:
        raise _unreadable(path, repr(broken)) from broken


def mark_path(domid: DomId) -> str:
    """Return the node with our generation mark in a domain's own directory, which dies with it."""
    return f"/local/domain/{domid}/xshm"


def published(guest: Guest) -> tuple[tuple[str, str], ...]:
    """Return our mark, and the nodes by which a guest that can read xenstore finds its regions.

    They inherit ``n0,r<domid>`` from the domain's directory: it may read them and not write them.
    Plain ``key=value`` words, numbers in bytes, as the guest's configuration says them.
    """
    mark = (mark_path(guest.domid), guest.generation)
    return mark, *(
        (
            f"{mark_path(guest.domid)}/{request.region_id}",
            f"begin={address_of(request.first_gfn):#x} size={request.size_bytes:#x} "
            f"role={request.role} prot={request.prot} transport=physmap",
        )
        for request in guest.requests
    )
