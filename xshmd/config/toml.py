# SPDX-License-Identifier: LGPL-2.1-or-later
"""Regions and their members in TOML: the form for files in ``xshmd/regions.d``.

A file has one table a region, and in it one a member::

    [region.telemetry]              # belongs to the system unless it has an owner
    size = "1 MiB"                  # bytes as a number, or text with B, KiB, MiB, GiB or TiB
    owner = "ctl"                   # the guest with role owner; it needs a table below
    lifetime = "members"            # owner, members or system
    prot = "rw"                     # the most that any member may have: rw or ro
    cache_policy = "ARM_normal"     # ARM_normal or x86_normal
    transport = "physmap"           # physmap or grant
    isolation = "group"             # group, sealed or region
    prot_enforcement = "required"   # required or advisory
    doorbells = 4                   # how many peers can ring each other, 2 to 15
    doorbell_route = "auto"         # auto or relayed
    backing = "holder"              # holder, dom0 or host; host needs
    host_address = 0x50000000       # where in the machine's memory it is
    external = true                 # in place of all these: it is defined elsewhere

    [region.telemetry.guest.ctl]    # one table a member
    begin = 0x3a000000              # where it appears; left out: a safe place is chosen
    size = "1 MiB"                  # left out: all of it, or what follows the offset
    offset = 0                      # first byte of the region that a borrower sees
    prot = "rw"                     # left out: the region's
    role = "owner"                  # only to say again what ``owner`` says

and, for guests of which no xl configuration tells it, what they are::

    [guest.ctl]
    uuid = "01234567-89ab-cdef-0123-456789abcdef"
    type = "pvh"                    # pvh, hvm or pv
    memory = "256 MiB"
    maxmem = "512 MiB"
    hap = true
    altp2m = false
    nestedhvm = false
    memory_map = "reserve"          # or leave: whether an x86 guest's own map has the regions
    extended_regions = "used"       # or unused: an Arm guest that maps no grants in free RAM banks

Meanings are those of :mod:`xshmd.model`; only ``size`` of a region is needed.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterator, Sequence
from typing import Final

from xshmd.config.findings import raise_all
from xshmd.config.guest import normalised_uuid
from xshmd.config.toml_tree import Source, Table, dotted, read_tree
from xshmd.config.toml_values import Keys
from xshmd.config.xlcfg import shown
from xshmd.declarations import Declarations
from xshmd.errors import ConfigError
from xshmd.model import (
    MAX_REGION_ID_LENGTH,
    UNPLACED,
    USUAL_TERMS,
    WHOLE_REGION,
    Backing,
    CachePolicy,
    DoorbellRoute,
    GuestConfig,
    GuestType,
    Isolation,
    Lifetime,
    Prot,
    ProtEnforcement,
    RegionConfig,
    RegionRequest,
    RegionTerms,
    Role,
    Transport,
)
from xshmd.units import ADDRESS_LIMIT, PAGE_SIZE, Gfn, bytes_of, human_size, is_within

REGION_KEYS: Final = (
    "size", "owner", "external", "lifetime", "prot", "cache_policy", "transport", "isolation",
    "prot_enforcement", "doorbells", "doorbell_route", "backing", "host_address", "guest",
)  # fmt: skip
MEMBER_KEYS: Final = ("begin", "size", "offset", "prot", "role")
GUEST_KEYS: Final = (
    "uuid", "type", "memory", "maxmem", "hap", "altp2m", "nestedhvm", "memory_map",
    "extended_regions",
)  # fmt: skip

_ID: Final = re.compile(r"[a-zA-Z0-9_@-]+")
"""What may be in an id anywhere: xl takes fewer characters, a device tree all of these."""


class ExtendedRegions(enum.StrEnum):
    """Whether an Arm guest uses the free part of its RAM banks for grant mappings."""

    USED = "used"
    UNUSED = "unused"


class MemoryMap(enum.StrEnum):
    """What becomes of an x86 guest's own memory map."""

    RESERVE = "reserve"
    LEAVE = "leave"


def read_toml(data: bytes, *, file: str, drop_ins: Sequence[Source] = ()) -> Declarations:
    """Read a file and what is dropped in to change it.

    Args:
        data: The file's content.
        file: What messages call it.
        drop_ins: Each replaces, key by key, what was said before it.

    Raises:
        ConfigUnreadable: one of them is not TOML.
        ConfigError: all that is wrong with them together, see
            :func:`xshmd.config.findings.errors_of`.
    """
    return _read(read_tree((Source(file, data), *drop_ins)))


def _read(tree: Table) -> Declarations:
    errors: list[ConfigError] = []
    root = Keys(tree, ("region", "guest"), errors)
    regions: list[RegionConfig] = []
    members: dict[str, list[RegionRequest]] = {}
    for region_id, table in root.tables("region"):
        reader = _Region(region_id, table, errors)
        for member, request in reader.members():
            members.setdefault(member, []).append(request)
        config = reader.config()
        if config is not None:
            regions.append(config)
    traits = {name: _traits(name, table, errors) for name, table in root.tables("guest")}
    raise_all(errors)
    guests = []
    for name in dict.fromkeys((*members, *traits)):
        requests = tuple(members.get(name, ()))
        guest = traits.get(name) or GuestConfig(name=name, place=requests[0].place)
        guests.append(dataclasses.replace(guest, requests=requests))
    return Declarations(regions=tuple(regions), guests=tuple(guests))


def _traits(name: str, table: Table, errors: list[ConfigError]) -> GuestConfig:
    """Return what a ``[guest.NAME]`` says of the guest itself."""
    keys = Keys(table, GUEST_KEYS, errors)
    _check_guest_name(name, keys)
    text = keys.text("uuid")
    uuid = normalised_uuid(text or "")
    if text is not None and not uuid:
        hint = "32 hexadecimal digits as 8-4-4-4-12"
        keys.wrong("uuid", "bad-uuid", f"'{shown(text)}' is no UUID", hint)
    return GuestConfig(
        name=name,
        uuid=uuid,
        guest_type=keys.word("type", GuestType) or GuestType.PVH,
        memory_mib=keys.mebibytes("memory") or 0,
        maxmem_mib=keys.mebibytes("maxmem") or 0,
        hap=keys.flag("hap", default=True),
        altp2m=keys.flag("altp2m", default=False),
        nestedhvm=keys.flag("nestedhvm", default=False),
        reserve=keys.word("memory_map", MemoryMap) is not MemoryMap.LEAVE,
        extended_regions=(
            keys.word("extended_regions", ExtendedRegions) is not ExtendedRegions.UNUSED
        ),
        place=keys.place(),
    )


def _check_guest_name(name: str, keys: Keys) -> None:
    if not name or not name.isprintable():
        what = f"'{shown(name)}' cannot be a guest's name"
        keys.wrong("", "bad-name", what, "say the name that its xl configuration has")


class _Region:
    """One ``[region.ID]`` with its members."""

    def __init__(self, region_id: str, table: Table, errors: list[ConfigError]) -> None:
        self._id = region_id
        self._keys = keys = Keys(table, REGION_KEYS, errors)
        self._errors = errors
        self._check_id()
        self._members = dict(keys.tables("guest"))
        self._external = keys.flag("external", default=False)
        self._owner = keys.text("owner")
        self._nr_frames = self._size()
        self._terms = self._read_terms()
        if self._external:
            self._only_members()

    def config(self) -> RegionConfig | None:
        """Return the definition of a region that belongs to the system; None for any other."""
        keys = self._keys
        if self._owner is not None:
            if self._owner not in self._members:
                what = f"its owner '{shown(self._owner)}' is none of its members"
                member = dotted(("region", self._id, "guest", self._owner))
                keys.wrong("owner", "owner-no-member", what, f"add a table [{member}]")
            return None
        if self._terms.lifetime is Lifetime.OWNER:
            hint = 'say owner = "NAME", or another lifetime'
            keys.wrong("lifetime", "lifetime-contradiction", "it has no owner to end with", hint)
        if self._external:
            return None
        return RegionConfig(
            region_id=self._id,
            nr_frames=self._nr_frames,
            terms=self._terms,
            place=keys.place(),
        )

    def members(self) -> Iterator[tuple[str, RegionRequest]]:
        """Yield each member's name with its part in the region."""
        for guest, table in self._members.items():
            keys = Keys(table, MEMBER_KEYS, self._errors)
            _check_guest_name(guest, keys)
            yield guest, self._member(guest, keys)

    def _member(self, guest: str, keys: Keys) -> RegionRequest:
        is_owner = guest == self._owner
        begin = keys.frames("begin")
        size = keys.frames("size")
        offset = keys.frames("offset") or 0
        prot = keys.word("prot", Prot) or self._terms.prot
        self._check_role(guest, keys, is_owner=is_owner)
        if size == 0:
            hint = "leave it out to have all of the region, or say how much"
            keys.wrong("size", "size-zero", "a member has at least one page", hint)
        nr_frames = size or (self._nr_frames if is_owner else WHOLE_REGION)
        if is_owner:
            self._check_owner(keys, nr_frames, prot)
        for start, key in ((begin, "begin"), (offset, "offset")):
            if not is_within(bytes_of(start or 0), bytes_of(nr_frames), ADDRESS_LIMIT):
                what = f"{key} + size is beyond 64 bits"
                keys.wrong(key, "beyond-64-bits", what, "choose smaller numbers")
        return RegionRequest(
            region_id=self._id,
            first_gfn=UNPLACED if begin is None else Gfn(begin),
            nr_frames=nr_frames,
            role=Role.OWNER if is_owner else Role.BORROWER,
            prot=prot,
            offset_frames=offset,
            cache_policy=self._terms.cache_policy if is_owner else None,
            terms=self._terms if is_owner else USUAL_TERMS,
            place=keys.place(),
        )

    def _check_role(self, guest: str, keys: Keys, *, is_owner: bool) -> None:
        role = keys.word("role", Role)
        if role is Role.OWNER and not is_owner:
            region = dotted(("region", self._id))
            other = f"the region's owner is '{shown(self._owner)}'" if self._owner else ""
            what = other or "the region has no owner"
            hint = f'say owner = "{shown(guest)}" in [{region}]'
            keys.wrong("role", "role-not-owner", what, hint)
        elif role is Role.BORROWER and is_owner:
            what = "the region names this guest as its owner"
            keys.wrong("role", "role-not-owner", what, 'leave role out, or say "owner"')

    def _check_owner(self, keys: Keys, nr_frames: int, prot: Prot) -> None:
        if "offset" in keys:
            what = "an owner has no offset: the region is its own from the start"
            keys.wrong("offset", "owner-offset", what, "leave offset out")
        if nr_frames != self._nr_frames and self._nr_frames:
            what = f"the owner has {_bytes_text(nr_frames)}, the region {self._size_text()}"
            keys.wrong(
                "size", "owner-size", what, "leave size out: the owner has all of the region"
            )
        if prot is not self._terms.prot:
            what = f"the owner has prot {prot}, the region {self._terms.prot}"
            keys.wrong("prot", "owner-prot", what, "leave prot out: the owner has the region's")

    def _size(self) -> int:
        keys = self._keys
        if "size" not in keys and "external" not in keys:
            hint = 'say how large the region is, as in size = "1 MiB"; or external = true if an'
            what, hint = "'size' is missing", f"{hint} xl configuration defines it"
            keys.wrong("", "missing-key", what, hint)
        nr_frames = keys.frames("size")
        if nr_frames == 0:
            hint = f"say size = {PAGE_SIZE:#x} or more"
            keys.wrong("size", "size-zero", "a region has at least one page", hint)
        return nr_frames or 0

    def _read_terms(self) -> RegionTerms:
        keys = self._keys
        backing = keys.word("backing", Backing) or Backing.HOLDER
        host = keys.frames("host_address")
        if backing is Backing.HOST and "host_address" not in keys:
            hint = "say host_address, the first byte of the range in the machine's memory"
            keys.wrong("backing", "missing-key", "'host_address' is missing", hint)
        if backing is not Backing.HOST and "host_address" in keys:
            what = "only memory of the host has a host_address"
            keys.wrong(
                "host_address", "host-address", what, 'say backing = "host", or leave it out'
            )
        if host is not None and not is_within(
            bytes_of(host), bytes_of(self._nr_frames), ADDRESS_LIMIT
        ):
            what = "host_address + size is beyond 64 bits"
            keys.wrong("host_address", "beyond-64-bits", what, "choose smaller numbers")
        return RegionTerms(
            prot=keys.word("prot", Prot) or Prot.RW,
            cache_policy=keys.word("cache_policy", CachePolicy),
            lifetime=keys.word("lifetime", Lifetime),
            backing=backing,
            host_first_mfn=host,
            transport=keys.word("transport", Transport) or Transport.PHYSMAP,
            isolation=keys.word("isolation", Isolation),
            prot_enforcement=keys.word("prot_enforcement", ProtEnforcement)
            or ProtEnforcement.REQUIRED,
            doorbell_route=keys.word("doorbell_route", DoorbellRoute) or DoorbellRoute.AUTO,
            doorbells=keys.count("doorbells") or 0,
        )

    def _only_members(self) -> None:
        for key in REGION_KEYS:
            if key in self._keys and key not in ("external", "guest"):
                what = f"a region that is defined elsewhere has no {key} here"
                self._keys.wrong(key, "external", what, f"leave out {key}, or external")

    def _check_id(self) -> None:
        if not _ID.fullmatch(self._id):
            what = f"id '{shown(self._id)}' has other than a-z A-Z 0-9 _ - @"
            self._keys.wrong("", "bad-id", what, "rename the region")
        elif len(self._id) > MAX_REGION_ID_LENGTH:
            what = f"id '{shown(self._id)}' has {len(self._id)} characters"
            self._keys.wrong("", "bad-id", what, f"at most {MAX_REGION_ID_LENGTH} are possible")

    def _size_text(self) -> str:
        return _bytes_text(self._nr_frames)


def _bytes_text(nr_frames: int) -> str:
    return human_size(bytes_of(nr_frames))
