# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of the regions there are a back-end is to have, and at which addresses it has that.

With XEN_MMAP a description names a domain and an address in it.  dom0 can map a region's frames
from its holder, and on Arm from nowhere else: Xen maps no frame that is another's already
(xen/arch/arm/mm.c, xenmem_add_to_physmap_one()).  But the descriptors of a guest's queues have the
guest's addresses.  So there are two ways to describe what a guest has, see :class:`Addresses`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from xshmd.units import ADDRESS_LIMIT, Gfn, address_of, bytes_of
from xshmd.vhost_user.payloads import PLAIN, MemoryRegion, VringAddress, XenFlag

Fields = Mapping[str, Any]
"""A record as the interface ``io.xshmd.Regions`` says it."""


class Addresses(enum.StrEnum):
    """What a guest address in a description is the address of."""

    HOLDER = "holder"
    """The frame in the holder: what every back-end built for Xen can map."""
    GUEST = "guest"
    """The address at which the guest has it, so that its descriptors mean what they say; where the
    frame is in the holder is then the offset.  Takes a back-end that minds that, as ours does."""


NO_ADVANCE_FLAGS: Final = MappingProxyType(
    {
        "never": PLAIN,
        "specification": XenFlag.NO_ADVANCE_MAP,
        "rust-vmm": XenFlag.NO_ADVANCE_MAP_RUST_VMM,
    }
)
"""Ways to say that a region is not to be mapped in advance."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is offered: one region, or all that a guest has; one of the two is empty."""

    region: str = ""
    guest: str = ""
    """Name or domid."""
    addresses: Addresses = Addresses.HOLDER
    no_advance: XenFlag = PLAIN
    """The flag that says not to map it in advance, as the back-end knows it; none: do."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A region, or a guest's part of one, as it is to be described."""

    region_id: str
    holder_uuid: str
    described: MemoryRegion


@dataclasses.dataclass(frozen=True, slots=True)
class Withheld:
    """A region that cannot be offered, and why."""

    region_id: str
    why: str


def parts(
    regions: Sequence[Fields], target: Target
) -> tuple[tuple[Part, ...], tuple[Withheld, ...]]:
    """Return what is to be offered now, and what cannot be.

    Args:
        regions: All there are, as ListRegions replies.
        target: What is wanted.
    """
    found: list[Part] = []
    withheld: list[Withheld] = []
    for region in regions:
        for user_address, offset_frames, nr_frames in _wanted_of(region, target):
            why = _why_not(region)
            if why:
                withheld.append(Withheld(region["id"], why))
            else:
                found += _described(region, user_address, offset_frames, nr_frames, target)
    return tuple(found), tuple(withheld)


def _described(
    region: Fields, user_address: int, offset_frames: int, nr_frames: int, target: Target
) -> Iterator[Part]:
    """Yield a part for each run of frames that one holder has in a row."""
    begin, end = offset_frames, offset_frames + nr_frames
    piece_begin = 0
    for piece in region.get("pieces") or (region,):
        first, last = max(begin, piece_begin), min(end, piece_begin + piece["frameCount"])
        if first < last:
            at = address_of(Gfn(piece["holderFirstFrame"] + first - piece_begin))
            user = user_address + bytes_of(first - begin)
            by_guest = target.addresses is Addresses.GUEST
            described = MemoryRegion(
                guest_address=user if by_guest else at,
                size_bytes=bytes_of(last - first),
                user_address=user,
                mmap_offset=at if by_guest else 0,
                xen_flags=XenFlag.FOREIGN | target.no_advance,
                domid=piece["holderDomainId"],
            )
            yield Part(region["id"], piece["holderUuid"], described)
        piece_begin += piece["frameCount"]


def _wanted_of(region: Fields, target: Target) -> Iterator[tuple[int, int, int]]:
    """Yield user address, first frame in the region and number of frames of what is wanted."""
    if target.region:
        if region["id"] == target.region:
            yield 0, 0, region["frameCount"]
        return
    for member in region["members"]:
        if member["state"] == "attached" and target.guest in (
            member["guest"], str(member.get("domainId")),
        ):  # fmt: skip
            user_address = address_of(Gfn(member["firstFrame"]))
            yield user_address, member["offsetFrames"], member["frameCount"]


def _why_not(region: Fields) -> str:
    terms: Fields = region.get("terms") or {}
    if terms.get("backing") == "host":
        return "it is memory of the host, which no domain has"
    if terms.get("backing") == "dom0":
        return "it is dom0's own memory, on other pages in each life of its guest"
    pieces = region.get("pieces") or (region,)
    if not region["ready"] or any(piece.get("holderDomainId") is None for piece in pieces):
        return "its memory is not there (any more)"
    return ""


QUEUE_KEYS: Final = ("size", "descriptors", "available", "used")


def parse_queue(text: str, index: int) -> tuple[int, VringAddress]:
    """Read ``size=N,descriptors=A,available=A,used=A``; return the size and where it is.

    Raises:
        ValueError: It says something else; the message says what.
    """
    said: dict[str, int] = {}
    for word in text.split(","):
        key, _, value = word.partition("=")
        if key not in QUEUE_KEYS or key in said:
            raise ValueError(f"{word!r} in {text!r}")
        said[key] = int(value, 0)
    if len(said) != len(QUEUE_KEYS):
        raise ValueError(f"{text!r} does not say all of {', '.join(QUEUE_KEYS)}")
    size = said.pop("size")
    if not 0 < size <= 1 << 15 or size & (size - 1):
        raise ValueError(f"{size} is no size of a queue")
    if said["descriptors"] % 16 or said["available"] % 2 or said["used"] % 4:
        raise ValueError(f"the parts of {text!r} are not aligned to 16, 2 and 4 bytes")
    if not all(0 <= address < ADDRESS_LIMIT for address in said.values()):
        raise ValueError(f"{text!r} has an address that is none")
    return size, VringAddress(index=index, **said)
