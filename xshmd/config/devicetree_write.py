# SPDX-License-Identifier: LGPL-2.1-or-later
"""Declarations as the device tree that today's Xen boots from, and what such a tree cannot say.

The form is the merged one of ``docs/misc/arm/device-tree/booting.txt``.  Nothing is written weaker
than it was said: what would give a guest more than that is left out, and listed among the losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

from xshmd.config import dts_text
from xshmd.config.devicetree import DOM0, ID, MAX_ID_LENGTH, NODE_NAME
from xshmd.config.devicetree_blob import DOMAIN, EVENT_CHANNEL, SHARED_MEMORY
from xshmd.config.devicetree_channels import PORT_LIMIT
from xshmd.config.devicetree_rules import MAX_REGIONS
from xshmd.config.xlcfg import shown
from xshmd.declarations import Declarations, EventChannel
from xshmd.machine import Arch
from xshmd.model import (
    UNPLACED,
    WHOLE_REGION,
    CachePolicy,
    DoorbellRoute,
    GuestConfig,
    GuestType,
    Prot,
    ProtEnforcement,
    RegionConfig,
    RegionRequest,
    RegionTerms,
    Role,
    Transport,
)
from xshmd.units import address_of, bytes_of

_CELLS: Final = ("#address-cells = <2>;", "#size-cells = <2>;")
_HEAD: Final = (
    "Static shared memory for Xen domains that are built at boot: Xen's",
    "docs/misc/arm/device-tree/booting.txt. Merge it into the host's device tree; each domain",
    "also needs its cpus, its memory and its modules.",
)


def render_dts(declarations: Declarations, *, arch: Arch) -> tuple[str, tuple[str, ...]]:
    """Write a device tree source.

    Args:
        declarations: What to write; placed, as a tree has no word for "anywhere".
        arch: What the guests run on.

    Returns:
        The source, which :func:`xshmd.config.devicetree.read_devicetree` reads back as
        ``declarations`` less the losses; and the losses, each a sentence that names what the tree
        does not say and why.
    """
    writer = _Writer(declarations, arch)
    text = writer.text()
    return text, tuple(writer.losses)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Definition:
    """Who defines a region: a guest, or the system."""

    nr_frames: int
    terms: RegionTerms
    owner: str = ""


class _Writer:
    """``losses`` has what the text does not say."""

    def __init__(self, declarations: Declarations, arch: Arch) -> None:
        self.losses: list[str] = []
        self._said = declarations
        if arch is not Arch.ARM64:
            self._lose(f"the tree as a whole: Xen has static shared memory on Arm, not on {arch}")
        self._names = {guest.name for guest in declarations.guests}
        self._names |= {channel.guest for channel in declarations.event_channels}
        self._definitions = self._defined()
        self._written: set[str] = set()
        self._ownerless = self._without_owner()
        self._labels = {
            (channel.guest, channel.local_port): f"evtchn_{number}"
            for number, channel in enumerate(self._channels())
        }

    def text(self) -> str:
        chosen: list[str] = list(_CELLS)
        names = [guest.name for guest in self._said.guests]
        names += [guest for guest, _ in self._labels if guest not in names]
        configs = {guest.name: guest for guest in self._said.guests}
        for name in dict.fromkeys(names):
            config = configs.get(name, GuestConfig(name=name))
            if name == DOM0:
                chosen += self._nodes(config)
            elif self._nameable(name):
                chosen += ["", *dts_text.node(name, self._domain(config))]
        for region in self._said.regions:
            if region.region_id not in self._written:
                self._lose(
                    f"{_region(region)}: without a guest that has it there is no node for it"
                )
        body = [*_CELLS, "", *dts_text.node("chosen", chosen)]
        lines = ["/dts-v1/;", "", *dts_text.node("/", body)]
        return dts_text.comment(*_HEAD) + "\n".join(lines) + "\n"

    # --- regions ----------------------------------------------------------------------------------

    def _defined(self) -> dict[str, _Definition]:
        found: dict[str, _Definition] = {}
        for region in self._said.regions:
            if region.region_id in found:
                self._lose(f"{_region(region)}: it is defined twice, and the first one counts")
            else:
                found[region.region_id] = _Definition(
                    nr_frames=region.nr_frames, terms=region.terms
                )
                self._terms(_region(region), region.terms)
        for guest in self._said.guests:
            for request in guest.requests:
                if request.role is not Role.OWNER:
                    continue
                what = f"region '{request.region_id}' of guest '{guest.name}'"
                if request.region_id in found:
                    self._lose(f"{what}: it is defined twice, and the first one counts")
                else:
                    terms = dataclasses.replace(
                        request.terms, prot=request.prot, cache_policy=request.cache_policy
                    )
                    found[request.region_id] = _Definition(
                        nr_frames=request.nr_frames, terms=terms, owner=guest.name
                    )
                    self._terms(what, terms)
        return found

    def _terms(self, what: str, terms: RegionTerms) -> None:
        """Note those of a region's terms whose loss keeps nothing from being written."""
        if terms.cache_policy not in (None, CachePolicy.ARM_NORMAL):
            self._lose(f"{what}: cache_policy={terms.cache_policy}; Xen has one, ARM_normal")
        elif terms.cache_policy is not None:
            self._lose(f"{what}: the word cache_policy; it is ARM_normal in any case")
        if terms.lifetime is not None:
            self._lose(
                f"{what}: lifetime={terms.lifetime}; such a region lasts until the host ends"
            )
        if terms.isolation is not None:
            self._lose(f"{what}: isolation={terms.isolation}; Xen itself keeps such regions apart")
        if terms.prot_enforcement is not ProtEnforcement.REQUIRED:
            self._lose(f"{what}: prot_enforcement; there is no prot in a device tree")
        if terms.doorbells or terms.doorbell_route is not DoorbellRoute.AUTO:
            self._lose(f"{what}: doorbells; Xen has static event channels instead")

    def _without_owner(self) -> set[str]:
        """Return the regions whose owner cannot be written: Xen would map memory of nobody's."""
        return {
            request.region_id
            for guest in self._said.guests
            for request in guest.requests
            if request.role is Role.OWNER
            and self._definitions[request.region_id].owner == guest.name
            and (
                not (guest.name == DOM0 or NODE_NAME.fullmatch(guest.name))
                or self._unsayable(guest, request, self._definitions[request.region_id])
            )
        }

    def _member(self, guest: GuestConfig, request: RegionRequest) -> list[str] | None:
        definition = self._definitions.get(request.region_id)
        why = self._unsayable(guest, request, definition)
        if not why and request.region_id in self._ownerless:
            why = "its owner cannot be written"
        if why:
            self._lose(f"region '{shown(request.region_id)}' of guest '{guest.name}': {why}")
            return None
        if request.prot is Prot.RO:
            what = f"region '{request.region_id}' of guest '{guest.name}'"
            self._lose(f"{what}: prot=ro, which is advisory; it is read and write")
        nr_frames = request.nr_frames
        if nr_frames == WHOLE_REGION and definition is not None:
            nr_frames = definition.nr_frames
        numbers = [address_of(request.first_gfn), bytes_of(nr_frames)]
        if definition is not None and definition.terms.host_first_mfn is not None:
            numbers.insert(0, bytes_of(definition.terms.host_first_mfn))
        self._written.add(request.region_id)
        lines = [
            f"compatible = {dts_text.string(SHARED_MEMORY)};",
            f"xen,shm-id = {dts_text.string(request.region_id)};",
            f"xen,shared-mem = {dts_text.cells(*numbers)};",
        ]
        if definition is None or definition.owner:
            lines.append(f"role = {dts_text.string(request.role)};")
        return lines

    def _unsayable(
        self, guest: GuestConfig, request: RegionRequest, definition: _Definition | None
    ) -> str:
        """Return why a member cannot be written as it was said, or nothing."""
        terms = RegionTerms() if definition is None else definition.terms
        host, owner = terms.host_first_mfn, "" if definition is None else definition.owner
        prot = Prot.RO if Prot.RO in (request.prot, terms.prot) else Prot.RW
        if len(request.region_id) > MAX_ID_LENGTH:
            return f"its id has {len(request.region_id)} characters, more than {MAX_ID_LENGTH}"
        if not ID.fullmatch(request.region_id):
            return "its id has other than a-z A-Z 0-9 _ - @"
        if request.region_id not in self._written and len(self._written) >= MAX_REGIONS:
            return f"Xen takes {MAX_REGIONS} regions from a device tree"
        if request.role is Role.OWNER and owner != guest.name:
            return "somebody else owns it"
        if request.first_gfn == UNPLACED:
            return "it has no guest address yet, and Xen chooses none"
        if definition is None and request.nr_frames == WHOLE_REGION:
            return "nobody says how large it is"
        if definition is not None and request.nr_frames not in (WHOLE_REGION, definition.nr_frames):
            return "a part of a region cannot be shared, only all of it"
        if request.offset_frames:
            return "an offset cannot be said, the whole region is shared"
        if prot is Prot.RO and terms.prot_enforcement is ProtEnforcement.REQUIRED:
            return "prot=ro cannot be said, and would be read and write"
        if terms.transport is Transport.GRANT:
            return "transport=grant cannot be said, Xen maps the memory into the guest"
        if guest.name == DOM0 and host is None:
            return "Dom0 is direct-mapped, so it needs a host address"
        if guest.name == DOM0 and host != request.first_gfn:
            return "Dom0 is direct-mapped, so its guest address must be the host's"
        return ""

    # --- guests and channels ----------------------------------------------------------------------

    def _nameable(self, name: str) -> bool:
        if NODE_NAME.fullmatch(name):
            return True
        self._lose(f"guest '{shown(name)}': its name cannot be that of a node")
        return False

    def _domain(self, guest: GuestConfig) -> Iterator[str]:
        for what, said in (
            ("its uuid", guest.uuid),
            (f"type={guest.guest_type}", guest.guest_type is not GuestType.PVH),
            ("maxmem", guest.maxmem_mib),
            ("hap=0", not guest.hap),
            ("altp2m", guest.altp2m),
            ("nestedhvm", guest.nestedhvm),
        ):
            if said:
                self._lose(f"guest '{guest.name}': {what} has no counterpart in a device tree")
        yield f"compatible = {dts_text.string(DOMAIN)};"
        yield from _CELLS
        if guest.memory_mib:
            yield f"memory = {dts_text.cells(guest.memory_mib * 1024)};"
        if any(name == guest.name for name, _ in self._labels):
            yield 'xen,enhanced = "no-xenstore";'
        yield from self._nodes(guest)

    def _nodes(self, guest: GuestConfig) -> Iterator[str]:
        number = 0
        for request in guest.requests:
            lines = self._member(guest, request)
            if lines is not None:
                yield from ["", *dts_text.node(self._unused(f"shared-memory-{number}"), lines)]
                number += 1
        for channel in self._said.event_channels:
            label = self._labels.get((channel.guest, channel.local_port))
            if channel.guest == guest.name and label:
                peer = self._labels[channel.peer_guest, channel.peer_port]
                lines = [
                    f"compatible = {dts_text.string(EVENT_CHANNEL)};",
                    f"xen,evtchn = <{channel.local_port:#x} &{peer}>;",
                ]
                name = self._unused(f"evtchn-{channel.local_port}")
                yield from ["", *dts_text.node(name, lines, label=label)]

    def _channels(self) -> Iterator[EventChannel]:
        """Yield those ends of channels whose other end is there too and names them."""
        ends: dict[tuple[str, int], EventChannel] = {}
        for channel in self._said.event_channels:
            ends.setdefault((channel.guest, channel.local_port), channel)
        for channel in self._said.event_channels:
            here = (channel.guest, channel.local_port)
            there = (channel.peer_guest, channel.peer_port)
            peer = ends.get(there)
            if (
                ends[here] is channel
                and peer is not None
                and here != there
                and (peer.peer_guest, peer.peer_port) == here
                and all(name == DOM0 or NODE_NAME.fullmatch(name) for name, _ in (here, there))
                and all(0 < port < PORT_LIMIT for _, port in (here, there))
            ):
                yield channel
            else:
                self._lose(
                    f"event channel {channel.local_port:#x} of guest '{shown(channel.guest)}':"
                    " its two ends do not name each other, or cannot be written"
                )

    def _unused(self, name: str) -> str:
        """Return the name, changed if a domain has it: Dom0's nodes stand among the domains."""
        while name in self._names:
            name += "_"
        return name

    def _lose(self, what: str) -> None:
        self.losses.append(what)


def _region(region: RegionConfig) -> str:
    return f"region '{shown(region.region_id)}'"
