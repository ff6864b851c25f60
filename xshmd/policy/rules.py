# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a configuration may ask for, rule by rule, before anything is done.

Each rule is one function that returns what is wrong or None and says why it is a rule.  They are
pure: what exists on the host comes in as records.  "facts" in the sources below is
reference/xen-and-libxl-facts.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Final

from xshmd.errors import ConfigError, Conflict, Fact, Refused, XshmError
from xshmd.model import (
    Arch,
    CachePolicy,
    Guest,
    GuestConfig,
    GuestState,
    GuestType,
    HostInfo,
    Place,
    Prot,
    Region,
    RegionRequest,
    Role,
)
from xshmd.policy import layout
from xshmd.units import address_of, bytes_of, human_size

XEN_FLOOR: Final = {Arch.X86_64: (4, 19), Arch.ARM64: (4, 18)}
"""The first Xen with which this works at all (facts, section 0.1; DESIGN section 2, rule 4)."""
CACHE_POLICY: Final = {Arch.X86_64: CachePolicy.X86_NORMAL, Arch.ARM64: CachePolicy.ARM_NORMAL}
"""The one cache policy of each architecture."""

USUAL_PLACES: Final = "/etc/xen, /etc/xshmd/guests.d or /etc/xshmd/regions.d"


def check_guest(
    config: GuestConfig, host: HostInfo, *, gpaddr_bits: int = 0
) -> tuple[XshmError, ...]:
    """Return every broken rule that concerns this guest alone, on this host.

    Args:
        config: What the guest's configuration says; without requests nothing is wrong with it.
        host: The machine it is to run on.
        gpaddr_bits: The domain's width of addresses if it exists already.
    """
    if not config.requests:
        return ()
    found = (xen_too_old(config, host), no_hap_here(config, host))
    return tuple(error for error in found if error) + check_config(
        config, host.arch, gpaddr_bits=gpaddr_bits
    )


def check_config(config: GuestConfig, arch: Arch, *, gpaddr_bits: int = 0) -> tuple[XshmError, ...]:
    """Return what :func:`check_guest` does without the rules that need a running Xen."""
    if not config.requests:
        return ()
    found: list[XshmError | None] = [
        pv_guest(config),
        shadow_paging(config, arch),
        altp2m(config),
        nested_hvm(config),
    ]
    for request in config.requests:
        found += [
            inside_ram(request, config, arch, gpaddr_bits),
            on_reserved_range(request, config, arch, gpaddr_bits),
            beyond_address_width(request, config, arch, gpaddr_bits),
            read_only(request),
            other_cache_policy(request, arch),
        ]
    found += overlapping(config.requests)
    return tuple(error for error in found if error)


# --- one guest on one host ------------------------------------------------------------------------


def xen_too_old(config: GuestConfig, host: HostInfo) -> Refused | None:
    """Xen must let dom0 map foreign pages into a guest.

    x86 before 4.19: arch_acquire_resource_check() answers EPERM for every domU (facts 0.1).  Arm
    before 4.18: a guest's paging pool is not what we expect (facts, section 1, step 3).
    """
    floor = XEN_FLOOR[host.arch]
    if host.xen_version >= floor:
        return None
    return _refused(
        _place(config),
        f"Xen {host.xen_text} cannot share memory with a guest on {host.arch}",
        f"run Xen {floor[0]}.{floor[1]} or later",
        xen=host.xen_text,
    )


def no_hap_here(config: GuestConfig, host: HostInfo) -> Refused | None:
    """Without hardware-assisted paging every guest has shadow paging: see :func:`shadow_paging`."""
    if host.has_hvm and host.has_hap:
        return None
    return _refused(
        _place(config),
        "this machine has no hardware-assisted paging, without which no memory can be shared",
        "enable VT-x with EPT, or AMD-V with NPT, in the machine's firmware",
    )


def pv_guest(config: GuestConfig) -> Refused | None:
    """A PV guest has no second-stage table to map anything into.

    xatp_permission_check answers EACCES for domains that are not translated (facts, section 4).
    """
    if config.guest_type is not GuestType.PV:
        return None
    return _refused(
        _place(config),
        f"guest '{config.name}' is a PV guest, whose memory xshmd cannot map anything into",
        'say type="pvh" or type="hvm"; on x86 xl makes a guest without a type a PV guest',
    )


def shadow_paging(config: GuestConfig, arch: Arch) -> Refused | None:
    """Shadow paging takes foreign frames for bad ones (mm/shadow/multi.c; facts 0.7)."""
    if config.hap:
        return None
    remedy = "remove hap=0" if arch is Arch.X86_64 else "remove hap=0: Arm has nothing else"
    return _refused(
        _place(config), f"guest '{config.name}' has hap=0: shadow paging cannot use shared memory",
        remedy,
    )  # fmt: skip


def altp2m(config: GuestConfig) -> Refused | None:
    """p2m_add_foreign answers EPERM while altp2m is active (mm/p2m-basic.c; facts, section 4)."""
    if not config.altp2m:
        return None
    return _refused(
        _place(config),
        f"guest '{config.name}' has altp2m, with which Xen maps no shared memory",
        "remove altp2m (and altp2mhvm)",
    )


def nested_hvm(config: GuestConfig) -> Refused | None:
    """p2m_add_foreign answers EPERM for guests with nested HVM (mm/p2m-basic.c; facts, 4)."""
    if not config.nestedhvm:
        return None
    return _refused(
        _place(config),
        f"guest '{config.name}' has nestedhvm=1, with which Xen maps no shared memory",
        "remove nestedhvm",
    )


# --- one entry of one guest -----------------------------------------------------------------------


def inside_ram(
    request: RegionRequest, config: GuestConfig, arch: Arch, gpaddr_bits: int = 0
) -> ConfigError | None:
    """A region in the guest's RAM would cost it the frames there.

    x86 frees the RAM page, Arm loses it until the guest ends, and the memory map still calls it RAM
    (facts, section 1, "Inside guest RAM"; DESIGN section 2, rule 4).
    """
    for window in layout.ram(arch, config):
        if window.overlaps(request.first_gfn, request.end_gfn):
            size = max(config.memory_mib, config.maxmem_mib)
            said = f"{size} MiB" if size else f"xl's default of {layout.DEFAULT_MEMORY_MIB} MiB"
            return _config_error(
                request.place,
                f"{_region(request)} is inside the guest's RAM at {window} ({said})",
                _elsewhere(config, arch, gpaddr_bits),
            )
    return None


def on_reserved_range(
    request: RegionRequest, config: GuestConfig, arch: Arch, gpaddr_bits: int = 0
) -> ConfigError | None:
    """Something else is at that address, or will be (facts, section 5, both maps).

    Over special pages Xen answers EILSEQ or kills the guest; over an emulated device it succeeds
    and breaks the device.
    """
    if inside_ram(request, config, arch) is not None:
        return None
    for window in layout.reserved(arch, config):
        if window.overlaps(request.first_gfn, request.end_gfn):
            return _config_error(
                request.place,
                f"{_region(request)} is on {window.name}, at {window}",
                _elsewhere(config, arch, gpaddr_bits),
            )
    return None


def beyond_address_width(
    request: RegionRequest, config: GuestConfig, arch: Arch, gpaddr_bits: int = 0
) -> Refused | None:
    """A guest's second-stage tables have only so many bits (facts, section 5, "Width")."""
    limit = layout.address_limit_gfn(arch, gpaddr_bits)
    if request.end_gfn <= limit:
        return None
    bits = address_of(limit).bit_length() - 1
    whose = "this guest's addresses have" if gpaddr_bits else f"addresses on {arch} have at most"
    return _refused(
        request.place,
        f"{_region(request)} is beyond the address space: {whose} {bits} bits",
        _elsewhere(config, arch, gpaddr_bits),
    )


def read_only(request: RegionRequest) -> Refused | None:
    """Stock Xen cannot keep a guest from writing to a page mapped into it (security.md, 6).

    p2m_map_foreign is always writable on x86, p2m_map_foreign_ro is never reached on Arm, and a
    guest with the holder as its target could map the page again.
    """
    if request.prot is Prot.RW:
        return None
    return _refused(
        request.place,
        f"{_region(request)} asks for prot=ro, which Xen cannot enforce: memory mapped into a guest"
        " is always writable",
        "say prot=rw, or share it by grants, where Xen does enforce it",
    )


def other_cache_policy(request: RegionRequest, arch: Arch) -> ConfigError | None:
    """Each architecture has one cache policy (seeds A14); the other's is a mistaken file."""
    right = CACHE_POLICY[arch]
    if request.cache_policy in (None, right):
        return None
    return _config_error(
        request.place,
        f"{_region(request)} has cache_policy={request.cache_policy}, which is not for {arch}",
        f"say cache_policy={right} or leave it out",
    )


def overlapping(requests: Sequence[RegionRequest]) -> Iterator[ConfigError]:
    """Two regions cannot be at one frame: the second map would fail or replace the first.

    Xen answers ENXIO on x86 and silently replaces on Arm (facts 0.5).
    """
    by_start = sorted(requests, key=lambda request: (request.first_gfn, request.place.key))
    furthest: RegionRequest | None = None
    for request in by_start:
        if furthest is not None and request.first_gfn < furthest.end_gfn:
            yield _config_error(
                request.place,
                f"{_region(request)} overlaps {_region(furthest)} of {furthest.place}",
                f"begin at {address_of(furthest.end_gfn):#x} or later, or make one smaller",
            )
        if furthest is None or request.end_gfn > furthest.end_gfn:
            furthest = request


# --- a guest among the others ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What some guest says about a region, and which guest it is."""

    guest: str
    request: RegionRequest

    def __str__(self) -> str:
        where = f" ({self.request.place})" if self.request.place.file else ""
        return f"guest '{self.guest}'{where}"


def claims(guests: Sequence[Guest], configs: Sequence[GuestConfig]) -> tuple[Claim, ...]:
    """Gather who says what: the guests there are, and the configurations of those there are not.

    A guest that exists counts as it was made, not as its file reads now.  One that has only just
    been seen is not made yet, so its file counts; one that is being destroyed for want of its
    regions does not exist.
    """
    unmade = (GuestState.HELD, GuestState.DOOMED)
    there = [guest for guest in guests if guest.state not in unmade]
    names = {guest.name for guest in there}
    uuids = {guest.uuid for guest in there}
    found = [Claim(guest=guest.name, request=one) for guest in there for one in guest.requests]
    for config in configs:
        if config.name not in names and config.uuid not in uuids:
            found += [Claim(guest=config.name, request=one) for one in config.requests]
    return tuple(found)


def check_region(
    claim: Claim, *, region: Region | None, others: Sequence[Claim]
) -> tuple[XshmError, ...]:
    """Return every broken rule between one entry and what else is said about its region.

    Args:
        claim: The entry, and whose it is.
        region: The region if it exists.
        others: What is said elsewhere, e.g. by :func:`claims`; about which region does not matter,
            and the guest's own are left out.
    """
    owners = tuple(
        other
        for other in others
        if other.request.region_id == claim.request.region_id
        and other.request.role is Role.OWNER
        and other.guest != claim.guest
    )
    found = (
        no_owner(claim, region, owners),
        two_owners(claim, region, owners),
        beyond_end(claim, region, owners),
        other_size(claim, region),
    )
    return tuple(error for error in found if error)


def no_owner(claim: Claim, region: Region | None, owners: Sequence[Claim]) -> ConfigError | None:
    """A borrower takes the region's size from its owner, so somebody has to define it."""
    if claim.request.role is Role.OWNER or region is not None or owners:
        return None
    region_id = claim.request.region_id
    return _config_error(
        claim.request.place,
        f"guest '{claim.guest}' borrows region '{region_id}', which nobody defines",
        f"give another guest an entry with id={region_id} and role=owner, in a file in"
        f" {USUAL_PLACES}",
        region=region_id,
    )


def two_owners(claim: Claim, region: Region | None, owners: Sequence[Claim]) -> Conflict | None:
    """A region has one definition (seeds A7, A19: the published code let the second one win)."""
    region_id = claim.request.region_id
    if claim.request.role is Role.OWNER:
        if owners:
            first, second = str(owners[0]), str(claim)
        elif region is not None and region.owner not in ("", claim.guest):
            first, second = f"guest '{region.owner}'", str(claim)
        else:
            return None
    elif region is None and len({owner.guest for owner in owners}) > 1:
        first, second = str(owners[0]), str(owners[1])
    else:
        return None
    return Conflict(
        f"{claim.request.place}: region '{region_id}' has two owners: {first} and {second}",
        hint="make all but one of them role=borrower",
        region=region_id,
        **_at(claim.request.place),
    )


def beyond_end(claim: Claim, region: Region | None, owners: Sequence[Claim]) -> ConfigError | None:
    """A borrower can only have frames that the region has (seeds A9, A14)."""
    request = claim.request
    if request.role is Role.OWNER:
        return None
    if region is not None:
        nr_frames, whose = region.nr_frames, f"region '{region.region_id}' has"
    elif owners:
        nr_frames = owners[0].request.nr_frames
        whose = f"its owner {owners[0]} gives it"
    else:
        return None
    if request.offset_frames + request.nr_frames <= nr_frames:
        return None
    offset, size = bytes_of(request.offset_frames), request.size_bytes
    total = bytes_of(nr_frames)
    return _config_error(
        request.place,
        f"{_region(request)} ends at offset {offset + size:#x} of the region, but {whose} only"
        f" {human_size(total)} ({total:#x})",
        f"make offset + size at most {total:#x}",
    )


def other_size(claim: Claim, region: Region | None) -> Conflict | None:
    """A region keeps its size for as long as it exists: its members have it mapped."""
    request = claim.request
    if request.role is Role.BORROWER or region is None or region.nr_frames == request.nr_frames:
        return None
    return Conflict(
        f"{request.place}: region '{region.region_id}' is to have {human_size(request.size_bytes)},"
        f" but it exists with {human_size(region.size_bytes)}",
        hint=f"say size={region.size_bytes:#x}, or end all of its guests so that it is made anew",
        region=region.region_id,
        **_at(request.place),
    )


# --- words ----------------------------------------------------------------------------------------


def _region(request: RegionRequest) -> str:
    span = layout.span_text(request.first_gfn, request.end_gfn)
    return f"region '{request.region_id}' at {span}"


def _elsewhere(config: GuestConfig, arch: Arch, gpaddr_bits: int) -> str:
    return f"put it elsewhere: {layout.free_text(arch, config, gpaddr_bits)}"


def _place(config: GuestConfig) -> Place:
    # What concerns a whole guest matters for its first entry's sake: without any, all is well.
    return config.requests[0].place


def _at(place: Place) -> dict[str, Fact]:
    return {"file": place.file, "place": place.key, "line": place.line}


def _message(place: Place, what: str) -> str:
    return f"{place}: {what}" if place.file else what


def _config_error(place: Place, what: str, hint: str, **facts: Fact) -> ConfigError:
    return ConfigError(_message(place, what), hint=hint, **_at(place), **facts)


def _refused(place: Place, what: str, hint: str, **facts: Fact) -> Refused:
    return Refused(_message(place, what), hint=hint, **_at(place), **facts)
