# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where in one guest its regions can be, and what an entry can say by itself.

"facts" in the sources below is reference/xen-and-libxl-facts.md, "seeds" is
reference/seeds-and-peers.md.

What it means that regions *overlap* (the question put to the first proposal, seeds A10): memory
never does.  Two ids never name the same memory, so there are no overlapping backing areas to be
defined: a region has pages of its own (:func:`xshmd.policy.region_rules.shared_host_range` is for
those whose pages are said by address).  A guest's *frames* may not either: one frame has one
region.  And a region is in a guest once, with one offset and one size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final

from xshmd.machine import Arch
from xshmd.model import DOMAIN_0, UNPLACED, CachePolicy, GuestConfig, RegionRequest, Role
from xshmd.policy import layout
from xshmd.policy.findings import Findings, config_error, refused, region_at
from xshmd.units import address_of

CACHE_POLICY: Final = {Arch.X86_64: CachePolicy.X86_NORMAL, Arch.ARM64: CachePolicy.ARM_NORMAL}
"""The one cache policy of each architecture."""


@dataclasses.dataclass(frozen=True, slots=True)
class AddressSpace:
    """What else is in a guest's physical address space."""

    config: GuestConfig
    arch: Arch
    gpaddr_bits: int
    """Its width as Xen reports it; 0 where not known."""
    ram: tuple[layout.Window, ...]
    reserved: tuple[layout.Window, ...]

    @classmethod
    def of(cls, config: GuestConfig, arch: Arch, gpaddr_bits: int = 0) -> AddressSpace:
        """Return that of a guest; Domain-0's is the machine's own, of which nothing is known."""
        if config.name == DOMAIN_0:
            return cls(config, arch, gpaddr_bits, (), ())
        ram, reserved = layout.ram(arch, config), layout.reserved(arch, config)
        return cls(config, arch, gpaddr_bits, ram, reserved)

    @property
    def elsewhere(self) -> str:
        """Say where there is room, for a hint."""
        free = layout.free_text(self.arch, self.config, self.gpaddr_bits)
        return f"put it elsewhere: {free}"


def inside_ram(request: RegionRequest, space: AddressSpace) -> Findings:
    """A region in the guest's RAM would cost it the frames there.

    x86 frees the RAM page, Arm loses it until the guest ends, and the memory map still calls it RAM
    (facts, section 1, "Inside guest RAM"; DESIGN section 2, rule 4).  The published series wanted
    an owner's range to be there (seeds A15); a borrower's it refused as well.
    """
    window = _hit(request, space.ram)
    if window is not None:
        size = max(space.config.memory_mib, space.config.maxmem_mib)
        said = f"{size} MiB" if size else f"xl's default of {layout.DEFAULT_MEMORY_MIB} MiB"
        yield config_error(
            "inside-ram",
            request.place,
            f"{region_at(request)} is inside the guest's RAM at {window} ({said})",
            space.elsewhere,
        )


def on_reserved_range(request: RegionRequest, space: AddressSpace) -> Findings:
    """Something else is at that address, or will be (facts, section 5, both maps).

    Over special pages Xen answers EILSEQ or kills the guest; over an emulated device it succeeds
    and breaks the device.
    """
    window = _hit(request, space.reserved)
    # Arm's RAM banks are reserved as a whole: what is in RAM needs to be said once.
    if window is not None and _hit(request, space.ram) is None:
        hint = space.elsewhere
        if window in layout.EXTENDED:
            hint += '; or, if it never maps grants, say static_shm_extended_regions = "unused"'
        yield config_error(
            "on-reserved-range",
            request.place,
            f"{region_at(request)} is on {window.name}, at {window}",
            hint,
        )


def beyond_address_width(request: RegionRequest, space: AddressSpace) -> Findings:
    """A guest's second-stage tables have only so many bits (facts, section 5, "Width")."""
    limit = layout.address_limit_gfn(space.arch, space.gpaddr_bits)
    if request.end_gfn > limit:
        bits = address_of(limit).bit_length() - 1
        whose = (
            "this guest's addresses have"
            if space.gpaddr_bits
            else f"addresses on {space.arch} have at most"
        )
        yield refused(
            "beyond-address-width",
            request.place,
            f"{region_at(request)} is beyond the address space: {whose} {bits} bits",
            space.elsewhere,
        )


def other_cache_policy(request: RegionRequest, space: AddressSpace) -> Findings:
    """Each architecture has one cache policy (seeds A14); the other's is a mistaken file."""
    right = CACHE_POLICY[space.arch]
    if request.cache_policy not in (None, right):
        yield config_error(
            "other-cache-policy",
            request.place,
            f"{region_at(request)} has cache_policy={request.cache_policy}, which is not for"
            f" {space.arch}",
            f"say cache_policy={right} or leave it out",
        )


def borrower_cache_policy(request: RegionRequest, space: AddressSpace) -> Findings:
    """How a region is cached its definition says, for all of its members (seeds A14)."""
    if request.role is Role.BORROWER and request.cache_policy is not None:
        yield config_error(
            "borrower-cache-policy",
            request.place,
            f"{region_at(request)} is borrowed with cache_policy={request.cache_policy}",
            "say it where the region is defined",
        )


def owner_offset(request: RegionRequest, space: AddressSpace) -> Findings:
    """An owner's entry defines the region, so it sees all of it, from its start (seeds A14)."""
    if request.role is Role.OWNER and request.offset_frames:
        yield config_error(
            "owner-offset",
            request.place,
            f"{region_at(request)} has an offset in its owner, which defines it from its start",
            "leave the offset out, or make the guest a borrower",
        )


def overlapping(requests: Sequence[RegionRequest]) -> Findings:
    """Two regions cannot be at one frame: the second map would fail or replace the first.

    Xen answers ENXIO on x86 and silently replaces on Arm (facts 0.5).  The published series
    compared borrowers' ranges only (seeds A15).
    """
    placed = [request for request in requests if request.first_gfn != UNPLACED]
    furthest: RegionRequest | None = None
    for request in sorted(placed, key=lambda one: (one.first_gfn, one.place.line, one.place.key)):
        if furthest is not None and request.first_gfn < furthest.end_gfn:
            yield config_error(
                "overlapping",
                request.place,
                f"{region_at(request)} overlaps {region_at(furthest)} of {furthest.place}",
                f"begin at {address_of(furthest.end_gfn):#x} or later, or make one smaller",
            )
        if furthest is None or request.end_gfn > furthest.end_gfn:
            furthest = request


def region_twice(requests: Sequence[RegionRequest]) -> Findings:
    """A guest has a region once (seeds A14: "each id once per config")."""
    first: dict[str, RegionRequest] = {}
    for request in requests:
        before = first.setdefault(request.region_id, request)
        if before is not request:
            line = f" (line {before.place.line})" if before.place.line else ""
            yield config_error(
                "region-twice",
                request.place,
                f"region '{request.region_id}' is already in {before.place.key}{line}",
                "a guest can have a region once; give the other one another id",
            )


ENTRY_RULES: tuple[Callable[[RegionRequest, AddressSpace], Findings], ...] = (
    inside_ram,
    on_reserved_range,
    beyond_address_width,
    other_cache_policy,
    borrower_cache_policy,
    owner_offset,
)
"""Those for each entry."""
TOGETHER_RULES: tuple[Callable[[Sequence[RegionRequest]], Findings], ...] = (
    overlapping,
    region_twice,
)
"""Those between the entries of one guest."""


def _hit(request: RegionRequest, windows: Sequence[layout.Window]) -> layout.Window | None:
    if request.first_gfn == UNPLACED:
        return None
    # One whose size is yet to be known has a frame at least.
    end = max(request.end_gfn, request.first_gfn + 1)
    for window in windows:
        if window.overlaps(request.first_gfn, end):
            return window
    return None
