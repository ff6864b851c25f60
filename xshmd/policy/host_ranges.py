# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether host memory that a configuration names may be given to guests.

A wrong answer would hand out the memory of Xen or of another domain, so only what is known to be
kept apart is let through: what nothing is known of is refused, too.

Host memory is never cached, whatever a guest does.  x86: p2m_mmio_direct is UC in the second-stage
tables, of which a guest's PAT can make write-combining and no more (``epte_get_entry_emt()`` in
xen/arch/x86/mm/p2m-ept.c, ``p2m_type_to_flags()`` in p2m-pt.c); by the first of these a guest with
any right to host memory has, on Intel, its ordinary RAM cached as its MTRRs say and no longer
always write-back, and its WBINVD reaches the machine's caches.  Arm: p2m_mmio_direct_dev is
Device-nGnRE (``map_mmio_regions()`` in xen/arch/arm/p2m.c): accesses have to be aligned, and
exclusive ones need not work.
"""

from __future__ import annotations

from collections.abc import Iterable

from xshmd.errors import Refused
from xshmd.machine import HostRange
from xshmd.model import Place
from xshmd.units import PAGE_SHIFT, Mfn


def why_not_shareable(
    ranges: Iterable[HostRange], first_mfn: Mfn, nr_frames: int
) -> tuple[str, str]:
    """Return why these machine frames may not be given to guests, and what can be done about it.

    Both are empty if they may.
    """
    end_mfn = first_mfn + nr_frames
    covered = False
    for known in ranges:
        if known.first_mfn >= end_mfn or first_mfn >= known.end_mfn:
            continue
        if known.refusal:
            return f"{known.name} is there, and {known.refusal}", known.hint
        covered = covered or (known.first_mfn <= first_mfn and end_mfn <= known.end_mfn)
    if covered:
        return "", ""
    return (
        "nothing there is known to be memory that is kept apart for this",
        "name a PCI device's prefetchable memory, or on x86 a reserved range of the machine",
    )


def check_shareable(
    ranges: Iterable[HostRange], region_id: str, first_mfn: Mfn, nr_frames: int, place: Place
) -> None:
    """Refuse a host-backed region whose memory is not kept apart for it."""
    reason, hint = why_not_shareable(ranges, first_mfn, nr_frames)
    if reason:
        start, end = first_mfn << PAGE_SHIFT, (first_mfn + nr_frames << PAGE_SHIFT) - 1
        where = f"{place}: " if place.file else ""
        raise Refused(
            f"{where}the host memory {start:#x}-{end:#x} of region {region_id} cannot be given "
            f"to guests: {reason}",
            hint=hint,
            region=region_id,
        )
