# SPDX-License-Identifier: LGPL-2.1-or-later
"""The quantities Xen speaks in, so that no number in the code is ever a bare page or size.

Terms are those of Xen's ``xen/include/xen/mm.h``: a *gfn* is what a guest's second-stage tables are
indexed by, an *mfn* is a machine frame.  Only this module converts between bytes and frames, and
only :func:`is_within` says whether a range of either is inside what it is to be inside of.
"""

from __future__ import annotations

# xshmctl starts in the time that importing typing would take.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, NewType
else:

    def NewType(_name: str, kind: type) -> type:
        """Return the type itself: only those who check types tell the two apart."""
        return kind


DomId = NewType("DomId", int)
"""A domain's number; Xen uses it again after the domain is gone, so it is never an identity."""
Gfn = NewType("Gfn", int)
"""Guest frame number: index of a 4 KiB frame in a domain's physical address space."""
Mfn = NewType("Mfn", int)
"""Machine frame number: index of a 4 KiB frame of the machine's own physical address space."""

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
"""XEN_PAGE_SIZE: what every region, offset and frame is a multiple of, on x86 and Arm."""
SUPERPAGE_FRAMES: Final = 512
"""Frames in one order-9 (2 MiB) extent, the largest Xen hands out to any domain by default."""
SUPERPAGE_ORDER: Final = 9

DOMID_0: Final = DomId(0)
DOMID_FIRST_RESERVED: Final = 0x7FF0
"""Domids from here on name pseudo-domains and are never a guest (xen/include/public/xen.h)."""
DOMID_ANY: Final = DomId(0x7FF5)
"""Asks XEN_DOMCTL_createdomain for any free domid; works in 4.17 to 4.22, where 0 does not."""

MAX_GUEST_ADDRESS_BITS: Final = 52
"""No architecture Xen runs on has guest-physical addresses wider than this."""
MAX_GUEST_FRAMES: Final = 1 << (MAX_GUEST_ADDRESS_BITS - PAGE_SHIFT)
"""So no frame of a guest has this number or a higher one."""
ADDRESS_LIMIT: Final = 1 << 64
"""No address in bytes, and no size that anybody writes down, is as high as this."""


def frames_of(size_bytes: int) -> int:
    """Return how many frames hold ``size_bytes``, which must be a multiple of the frame size."""
    if size_bytes % PAGE_SIZE:
        raise ValueError(f"{size_bytes} bytes are not whole {PAGE_SIZE}-byte frames")
    return size_bytes >> PAGE_SHIFT


def bytes_of(nr_frames: int) -> int:
    """Return the size in bytes of ``nr_frames`` frames."""
    return nr_frames << PAGE_SHIFT


def gfn_of(address_bytes: int) -> Gfn:
    """Return the frame that a frame-aligned guest-physical address names."""
    if address_bytes % PAGE_SIZE:
        raise ValueError(f"{address_bytes:#x} is not the start of a {PAGE_SIZE}-byte frame")
    return Gfn(address_bytes >> PAGE_SHIFT)


def address_of(gfn: Gfn) -> int:
    """Return the guest-physical address in bytes at which frame ``gfn`` starts."""
    return gfn << PAGE_SHIFT


def is_within(start: int, count: int, limit: int) -> bool:
    """Return whether ``count`` bytes or frames from ``start`` on all lie from 0 to below ``limit``.

    All three are in the same unit.  No sum is made of what a stranger said, so that this is right
    in C too, where numbers wrap; none at all (``count`` 0) may also be at the very end.
    """
    return start >= 0 and 0 <= count <= limit and start <= limit - count


def human_size(size_bytes: int) -> str:
    """Say a size the way people read it, exactly: ``4 KiB``, ``256 MiB + 4 KiB``, ``17 B``."""
    parts = []
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0)):
        count, size_bytes = size_bytes >> shift, size_bytes & ((1 << shift) - 1)
        if count:
            parts.append(f"{count} {unit}")
    return " + ".join(parts) or "0 B"
