# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one place that puts frames into a guest: checks, target, maps, all or nothing.

Everything here is synchronous hypercalls on a guest that stands still, in one thread, so that no
other part of the daemon can come between a check and what it allows.

A region's frames are its holder's or, with the host backing, the machine's own: those have no owner
and no reference count, need no target, are mapped uncached, and nobody zeroes or wipes them, since
they may be a device's.  Xen drops either kind with the guest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence

from xshmd.engine.holders import enlarge_paging_pool
from xshmd.engine.identity import verify
from xshmd.errors import Conflict, DomainGone, HypercallFailed, Refused, XshmError
from xshmd.model import Backing, Guest, Holder, Region, RegionRequest
from xshmd.policy.host_ranges import check_shareable
from xshmd.ports import Hypervisor
from xshmd.units import PAGE_SHIFT, SUPERPAGE_FRAMES, Gfn, Mfn, address_of, is_within


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """Frames and where a guest is to have them."""

    request: RegionRequest
    holder_gfn: Gfn
    """The first of them in the holder; with the host backing it says nothing, and a sealed region
    is in the holder, at frames of its own, only while a window is open."""
    host_mfn: Mfn | None = None
    """The first of them on the machine, with the host backing; otherwise None."""
    is_sealed: bool = False
    """Whether the region is sealed: :mod:`xshmd.engine.windows` maps it."""


def mappings(guest: Guest, regions: dict[str, Region]) -> tuple[Mapping, ...]:
    """Return what is to be mapped for ``guest``.

    Raises:
        Conflict: a region it asks for is not there, not ready, or in another holder than its own.
    """
    wanted = []
    for request in guest.requests:
        region = regions.get(request.region_id)
        if region is None or not region.ready or region.holder_uuid != guest.holder_uuid:
            raise Conflict(
                f"region {request.region_id} went away while guest {guest.name} was made",
                hint="start the guest again",
                region=request.region_id,
            )
        if not is_within(request.offset_frames, request.nr_frames, region.nr_frames):
            # The rules said so before; this is where it would hand out somebody else's frames.
            raise Conflict(
                f"{request.place}: region {request.region_id} is smaller than what guest "
                f"{guest.name} wants of it",
                hint="start the guest again",
                region=request.region_id,
            )
        wanted.append(_mapping(request, region))
    return tuple(wanted)


def _mapping(request: RegionRequest, region: Region) -> Mapping:
    holder_gfn = Gfn(region.holder_first_gfn + request.offset_frames)
    if region.terms.backing is Backing.HOLDER:
        sealed = region.terms.is_sealed
        return Mapping(request=request, holder_gfn=holder_gfn, is_sealed=sealed)
    if region.terms.host_first_mfn is None:
        raise AssertionError(f"region {region.region_id} is the host's and nowhere there")
    host_mfn = Mfn(region.terms.host_first_mfn + request.offset_frames)
    return Mapping(request=request, holder_gfn=holder_gfn, host_mfn=host_mfn)


def of_sealed(guest: Guest, regions: Iterable[Region]) -> tuple[Mapping, ...]:
    """Return what a guest has or is to have of sealed regions of its holder."""
    sealed = {
        region.region_id: region
        for region in regions
        if region.terms.is_sealed and region.holder_uuid == guest.holder_uuid
    }
    return tuple(
        _mapping(request, sealed[request.region_id])
        for request in guest.requests
        if request.region_id in sealed
    )


Span = tuple[Gfn, int]
"""Frames of a guest: the first, and how many."""


def span_of(request: RegionRequest) -> Span:
    """Return where a guest has what it requests."""
    return request.first_gfn, request.nr_frames


def check(xen: Hypervisor, guest: Guest, wanted: Sequence[Mapping]) -> None:
    """Prove that everything can be mapped; change nothing.

    To be done, and written down as done, before :func:`attach` is first called: afterwards nobody
    can tell what we mapped from what was there before.

    Raises:
        DomainGone: the guest ended meanwhile.
        Refused, Conflict: why it cannot be.
    """
    _verify_guest(xen, guest, wanted)
    for mapping in wanted:
        _check_empty(xen, guest, mapping.request)
    host_ranges = xen.host_ranges() if any(one.host_mfn is not None for one in wanted) else ()
    for mapping in wanted:
        if mapping.host_mfn is not None:
            request = mapping.request
            check_shareable(
                host_ranges, request.region_id, mapping.host_mfn, request.nr_frames, request.place
            )


def attach(
    xen: Hypervisor,
    guest: Guest,
    holder: Holder,
    wanted: Sequence[Mapping],
    *,
    again: bool,
    with_tables: Collection[Span] = (),
) -> None:
    """Map everything a guest is to have, or leave it as it was found.

    Args:
        xen: The hypervisor.
        guest: The guest, held still by a pause of ours; :func:`check` found nothing against it.
        holder: Its holder, anchored and verified a moment ago.
        wanted: What to map.
        again: True if an earlier attempt may have done some of it: then what is there is removed
            first.  Mapping the same page twice at one frame is an error on x86, and on Arm leaks
            the page for the life of the host (xen/arch/arm/mmu/p2m.c, ``__p2m_set_entry``).
        with_tables: Where the guest had regions before: the tables for them are still there, as
            neither architecture frees a table that has become empty.

    Raises:
        DomainGone: the guest ended meanwhile.
        Refused, Conflict, HypercallFailed: why it cannot be; nothing is mapped.
    """
    _verify_guest(xen, guest, wanted)
    if again:
        for mapping in wanted:
            _unmap(xen, guest, mapping)
    new = [one for one in map(span_of, (m.request for m in wanted)) if one not in with_tables]
    if new:
        _verify_guest(xen, guest, wanted)
        enlarge_paging_pool(xen, guest.domid, [nr_frames for _, nr_frames in new])
    _verify_holder(xen, holder)
    done: list[Mapping] = []
    try:
        # Who has nothing of the holder's gets no power over it.
        if any(mapping.host_mfn is None for mapping in wanted):
            _verify_guest(xen, guest, wanted)  # it cannot be undone on either side
            _set_target(xen, guest, holder, again=again)
        for mapping in wanted:
            _map(xen, guest, holder, mapping)
            done.append(mapping)
    except XshmError as error:
        verify(xen, guest)  # else what was mapped went with it, and its domid may be another's
        for mapping in done:
            _unmap(xen, guest, mapping)
        if isinstance(error, DomainGone):
            raise _holder_gone(holder) from error  # ESRCH does not say which of the two
        raise


def _map(xen: Hypervisor, guest: Guest, holder: Holder, mapping: Mapping) -> None:
    first_gfn, nr_frames = mapping.request.first_gfn, mapping.request.nr_frames
    if mapping.host_mfn is None:
        xen.map_foreign(guest.domid, first_gfn, holder.domid, mapping.holder_gfn, nr_frames)
    else:
        xen.map_host_range(guest.domid, first_gfn, mapping.host_mfn, nr_frames)


def _unmap(xen: Hypervisor, guest: Guest, mapping: Mapping) -> None:
    first_gfn, nr_frames = mapping.request.first_gfn, mapping.request.nr_frames
    if mapping.host_mfn is None:
        xen.unmap(guest.domid, first_gfn, nr_frames)
    else:
        xen.unmap_host_range(guest.domid, first_gfn, mapping.host_mfn, nr_frames)


def _verify_guest(xen: Hypervisor, guest: Guest, wanted: Sequence[Mapping]) -> None:
    info = xen.domain_info(guest.domid)
    if info is None or info.uuid != guest.uuid or info.dying:
        raise DomainGone(
            f"guest {guest.name} ended before it had its regions",
            hint="start it again",
            domid=guest.domid,
        )
    if not info.paused:
        raise Conflict(
            f"guest {guest.name}, domain {guest.domid}, was unpaused by somebody else before it "
            "had its regions",
            hint="do not `xl unpause` a guest that xshmd is still preparing",
            domid=guest.domid,
        )
    if not info.hvm or not info.hap:
        raise Refused(
            f"guest {guest.name} is {'shadow-paged (hap=0)' if info.hvm else 'a PV guest'}, and "
            "only hardware-paged HVM and PVH guests can have regions",
            hint='say type="pvh" and leave hap alone',
            domid=guest.domid,
        )
    limit_gfn = 1 << (info.gpaddr_bits - PAGE_SHIFT)
    for request in (mapping.request for mapping in wanted):
        if not is_within(request.first_gfn, request.nr_frames, limit_gfn):
            raise Refused(
                f"{request.place}: region {request.region_id} ends at "
                f"{address_of(request.end_gfn):#x}, beyond the {info.gpaddr_bits} address "
                "bits Xen can map for a guest on this machine",
                hint="say a lower begin",
                domid=guest.domid,
            )


def _verify_holder(xen: Hypervisor, holder: Holder) -> None:
    # The last look before the one step that cannot be undone: a wrong target would hand this guest
    # all the memory of whoever has the holder's number.
    info = xen.domain_info(holder.domid)
    if info is None or info.uuid != holder.uuid or info.dying or not info.hvm:
        raise _holder_gone(holder)


def _holder_gone(holder: Holder) -> Conflict:
    return Conflict(
        f"domain {holder.domid} is not the holder {holder.uuid} any more",
        hint="end the guests of this share group and start them anew",
        holder=holder.uuid,
    )


def _check_empty(xen: Hypervisor, guest: Guest, request: RegionRequest) -> None:
    """Refuse to map over anything present.

    x86 would free the guest's page, Arm orphan it.  One frame in each 2 MiB is looked at, and the
    first and last: what a toolstack populates beside the tables of ``policy.layout`` is RAM, which
    comes in aligned 2 MiB pieces wherever it is that large.
    """
    first, last = request.first_gfn, request.end_gfn - 1
    aligned = range(-(-first // SUPERPAGE_FRAMES) * SUPERPAGE_FRAMES, last + 1, SUPERPAGE_FRAMES)
    look_at = sorted({first, last, *aligned})
    present = xen.populated_frames(guest.domid, [Gfn(gfn) for gfn in look_at])
    if present:
        raise Refused(
            f"{request.place}: region {request.region_id} would lie over memory that guest "
            f"{guest.name} has already at {address_of(present[0]):#x}",
            hint="say a begin outside the guest's RAM and devices",
            domid=guest.domid,
            region=request.region_id,
        )


def _set_target(xen: Hypervisor, guest: Guest, holder: Holder, *, again: bool) -> None:
    if holder.serves_grants:
        # Its table is as large as Xen allows, and would be the guest's to write.
        raise AssertionError(f"holder {holder.uuid} serves grants and is nobody's target")
    try:
        xen.set_target(guest.domid, holder.domid)
    except DomainGone:
        raise
    except HypercallFailed as error:
        # Set already: by the attempt this one repeats, whose record named this very holder before
        # it acted.  If it was not, the maps that follow fail with EPERM and nothing is exposed.
        if not again:
            error.add_note(f"guest {guest.name} was to have the target {holder.uuid}")
            raise


def detach(
    xen: Hypervisor, guest: Guest, requests: Iterable[RegionRequest], regions: Iterable[Region]
) -> None:
    """Unmap these requests' frames from a guest that is held still by a pause of ours.

    Args:
        xen: The hypervisor.
        guest: The guest.
        requests: What is to be taken from it.
        regions: The regions that are known; they say whose the frames are.

    Raises:
        DomainGone: the guest ended meanwhile, and its mappings with it.
        Conflict: somebody else unpaused it; nothing is done.
    """
    _verify_guest(xen, guest, ())
    by_id = {region.region_id: region for region in regions}
    for request in requests:
        region = by_id.get(request.region_id)
        if region is None:  # no host memory: those are known for as long as a guest has them
            xen.unmap(guest.domid, request.first_gfn, request.nr_frames)
        else:
            _unmap(xen, guest, _mapping(request, region))


def remap(xen: Hypervisor, guest: Guest, holder: Holder, wanted: Iterable[Mapping]) -> None:
    """Give a guest that stands still other pages where it has these requests; may be done again.

    Raises:
        DomainGone: the guest ended meanwhile.
        HypercallFailed: it is not done, or not all of it.
    """
    for mapping in wanted:
        _verify_guest(xen, guest, (mapping,))
        _unmap(xen, guest, mapping)
        _map(xen, guest, holder, mapping)


def clear(xen: Hypervisor, guest: Guest, spans: Iterable[Span]) -> None:
    """Unmap whatever a guest that stands still has at these frames.

    Raises:
        DomainGone: the guest ended meanwhile.
    """
    for first_gfn, nr_frames in spans:
        _verify_guest(xen, guest, ())
        xen.unmap(guest.domid, first_gfn, nr_frames)
