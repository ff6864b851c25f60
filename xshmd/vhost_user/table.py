# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which memory tables can be meant: everything about region descriptions that is wrong by itself.

A description that passes has no range that wraps, fits the way it is to be mapped, and shares no
address with another.  Whether the memory is there only mapping it shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from xshmd.units import (
    ADDRESS_LIMIT,
    DOMID_FIRST_RESERVED,
    MAX_GUEST_FRAMES,
    PAGE_SHIFT,
    PAGE_SIZE,
    is_within,
)
from xshmd.vhost_user.payloads import KNOWN_XEN_FLAGS, MemoryRegion, XenFlag
from xshmd.vhost_user.wire import ProtocolViolation

FILE_LIMIT: Final = 1 << 63
GRANT_ADDRESS_BIT: Final = 1 << 63
"""Set in the guest address of granted memory (xen/include/public/io, virtio's Xen grant DMA)."""
GRANT_LIMIT: Final = 1 << 32
"""Grant references are 32 bits wide (xen/include/public/grant_table.h, grant_ref_t)."""


def check(region: MemoryRegion, others: Iterable[MemoryRegion] = (), *, xen: bool = True) -> None:
    """Raise if a region description cannot be meant beside those there are.

    Args:
        region: The description.
        others: Those that are there already.
        xen: Whether XEN_MMAP is negotiated.

    Raises:
        ProtocolViolation: It cannot; the message says why.
    """
    where = f"a region at {region.guest_address:#x}"
    if not region.size_bytes:
        raise ProtocolViolation(f"{where} is empty")
    for start, limit in (
        (region.guest_address, ADDRESS_LIMIT),
        (region.user_address, ADDRESS_LIMIT),
        (region.mmap_offset, FILE_LIMIT),
    ):
        if not is_within(start, region.size_bytes, limit):
            raise ProtocolViolation(f"{where} of {region.size_bytes} bytes ends past all addresses")
    if xen:
        _check_xen(region, where)
    for other in others:
        if _overlap(region.guest_address, other.guest_address, region, other) or _overlap(
            region.user_address, other.user_address, region, other
        ):
            raise ProtocolViolation(f"{where} overlaps that at {other.guest_address:#x}")


def check_table(regions: Sequence[MemoryRegion], *, xen: bool = True) -> None:
    """Raise if these cannot be a memory table.

    Raises:
        ProtocolViolation: One of them is wrong by itself, or two overlap.
    """
    for count, region in enumerate(regions):
        check(region, regions[:count], xen=xen)


def first_frame(region: MemoryRegion) -> int:
    """Return the first frame, of the domain it names, of a foreign region.

    Where no offset is said the guest address is the domain's own, as in every other
    implementation.  An offset is where in that domain's memory the region begins: so the guest
    address can be another's, who has the same memory elsewhere.
    """
    return (region.mmap_offset or region.guest_address) >> PAGE_SHIFT


def first_grant(region: MemoryRegion) -> int:
    """Return the first grant reference of a granted region; the others follow it."""
    return (region.guest_address & ~GRANT_ADDRESS_BIT) >> PAGE_SHIFT


def _check_xen(region: MemoryRegion, where: str) -> None:
    flags = region.xen_flags
    if flags & ~KNOWN_XEN_FLAGS or flags & (XenFlag.FOREIGN | XenFlag.GRANT) == (
        XenFlag.FOREIGN | XenFlag.GRANT
    ):
        raise ProtocolViolation(f"{where} has the Xen flags {int(flags):#x}")
    if not flags & (XenFlag.FOREIGN | XenFlag.GRANT):
        if not region.in_advance:
            raise ProtocolViolation(f"{where} is plain memory that is not to be mapped in advance")
        return
    # Pseudo-domains own memory that is nobody's to share.
    if region.domid >= DOMID_FIRST_RESERVED:
        raise ProtocolViolation(f"{where} is of domain {region.domid}, which is none")
    for number in (region.guest_address, region.size_bytes, region.mmap_offset):
        if number % PAGE_SIZE:
            raise ProtocolViolation(f"{where} is not of whole frames")
    nr_frames = region.size_bytes >> PAGE_SHIFT
    if flags & XenFlag.FOREIGN:
        if not is_within(first_frame(region), nr_frames, MAX_GUEST_FRAMES):
            raise ProtocolViolation(f"{where} ends where no domain has memory")
    elif region.mmap_offset or not is_within(first_grant(region), nr_frames, GRANT_LIMIT):
        raise ProtocolViolation(f"{where} has grant references that there cannot be")


def _overlap(start: int, other_start: int, region: MemoryRegion, other: MemoryRegion) -> bool:
    return start < other_start + other.size_bytes and other_start < start + region.size_bytes
