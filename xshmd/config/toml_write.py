# SPDX-License-Identifier: LGPL-2.1-or-later
"""Declarations as the TOML that says the same, and what TOML cannot say of them."""

from __future__ import annotations

import contextlib
import dataclasses
import graphlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Final

from xshmd.config.joining import is_same
from xshmd.config.toml_tree import dotted, quoted
from xshmd.config.xlcfg import shown
from xshmd.declarations import Declarations
from xshmd.model import (
    UNPLACED,
    USUAL_TERMS,
    WHOLE_REGION,
    Backing,
    GuestConfig,
    RegionConfig,
    RegionRequest,
    RegionTerms,
    Role,
)
from xshmd.units import Gfn, address_of, bytes_of

_UNITS: Final = (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10))


def render_toml(declarations: Declarations) -> tuple[str, tuple[str, ...]]:
    """Write the regions, their members and the guests.

    Args:
        declarations: What to write; it need not be placed.

    Returns:
        The text, which :func:`xshmd.config.toml.read_toml` reads back as ``declarations`` less the
        losses; and the losses, each a sentence that names what the text does not say and why.
    """
    writer = _Writer(declarations)
    tables = [*writer.regions(), *writer.guests()]
    writer.note_order()
    return "\n".join(tables), tuple(writer.losses)


@dataclasses.dataclass(slots=True)
class _Region:
    """All that is said about one region."""

    definition: RegionConfig | None = None
    owner: str = ""
    owners_request: RegionRequest | None = None
    members: dict[str, RegionRequest] = dataclasses.field(default_factory=dict)


class _Writer:
    def __init__(self, declarations: Declarations) -> None:
        self.losses: list[str] = []
        self._guests = declarations.guests
        self._regions = {region_id: _Region() for region_id in _order(declarations)}
        for config in declarations.regions:
            self._define(config)
        for guest in declarations.guests:
            for request in guest.requests:
                self._add_member(guest.name, request)
        for channel in declarations.event_channels:
            self.losses.append(
                f"event channel {channel.local_port} of '{shown(channel.guest)}' is left out:"
                " TOML declares memory alone"
            )

    def regions(self) -> Iterator[str]:
        """Yield a text for each region."""
        for region_id, region in self._regions.items():
            path = ("region", region_id)
            yield _table(path, _definition(region))
            for guest, request in region.members.items():
                yield _table((*path, "guest", guest), _member(request, region))

    def guests(self) -> Iterator[str]:
        """Yield a text for each guest of which there is more to say than its regions."""
        seen: dict[str, GuestConfig] = {}
        for guest in self._guests:
            lines = list(_traits(guest))
            first = seen.setdefault(guest.name, guest)
            if first is not guest:
                if lines != list(_traits(first)):
                    self.losses.append(
                        f"guest '{shown(guest.name)}' is described twice: only {first.place} counts"
                    )
            elif lines or not guest.requests:
                yield _table(("guest", guest.name), lines)

    def note_order(self) -> None:
        """Note each guest whose regions are in another order in the text, where that matters."""
        order = {region_id: index for index, region_id in enumerate(self._regions)}
        for guest in self._guests:
            indices = [order[request.region_id] for request in guest.requests]
            placeless = any(request.first_gfn == UNPLACED for request in guest.requests)
            if placeless and indices != sorted(indices):
                self.losses.append(
                    f"the order of the regions of guest '{shown(guest.name)}' is lost: those"
                    " without begin may get other places"
                )

    def _define(self, config: RegionConfig) -> None:
        region = self._regions[config.region_id]
        if region.definition is None:
            region.definition = config
        else:
            self._left_out(f"the definition at {config.place}", config.region_id, "it has another")

    def _add_member(self, guest: str, request: RegionRequest) -> None:
        region = self._regions[request.region_id]
        entry = f"guest '{shown(guest)}'"
        known = region.members.get(guest)
        if known is not None:
            if not is_same(known, request):
                self._left_out(f"{entry} ({request.place})", request.region_id, "it is there twice")
            return
        if request.role is Role.OWNER:
            if region.owner or region.definition:
                whose = f"guest '{shown(region.owner)}'" if region.owner else "the system"
                self._left_out(f"{entry}, an owner", request.region_id, f"it belongs to {whose}")
                return
            region.owner, region.owners_request = guest, request
        region.members[guest] = request

    def _left_out(self, what: str, region_id: str, why: str) -> None:
        self.losses.append(f"{what} is left out of region '{shown(region_id)}': {why}")


def _order(declarations: Declarations) -> list[str]:
    """Return the regions so that each guest's are in the guest's order, if there is such an order.

    It decides where those without begin are placed.
    """
    orders = [[request.region_id for request in guest.requests] for guest in declarations.guests]
    sorter = graphlib.TopologicalSorter[str]()
    for order in orders:
        for before, after in itertools.pairwise(dict.fromkeys(order)):
            sorter.add(after, before)
    ids = [*itertools.chain(*orders), *(region.region_id for region in declarations.regions)]
    with contextlib.suppress(graphlib.CycleError):
        ids = [*sorter.static_order(), *ids]
    return list(dict.fromkeys(ids))


def _definition(region: _Region) -> Iterator[str]:
    if region.owners_request is not None:
        request = region.owners_request
        terms = dataclasses.replace(
            request.terms, prot=request.prot, cache_policy=request.cache_policy
        )
        yield f"size = {_size(request.nr_frames)}"
        yield f"owner = {quoted(region.owner)}"
        yield from _terms(terms)
    elif region.definition is not None:
        yield f"size = {_size(region.definition.nr_frames)}"
        yield from _terms(region.definition.terms)
    else:
        yield "external = true"


def _terms(terms: RegionTerms) -> Iterator[str]:
    for key in (
        "lifetime", "prot", "cache_policy", "transport", "isolation", "prot_enforcement", "backing",
        "doorbell_route",
    ):  # fmt: skip
        word = getattr(terms, key)
        if word != getattr(USUAL_TERMS, key):
            yield f"{key} = {quoted(word)}"
    if terms.doorbells:
        yield f"doorbells = {terms.doorbells}"
    if terms.backing is Backing.HOST and terms.host_first_mfn is not None:
        yield f"host_address = {_address(terms.host_first_mfn)}"


def _member(request: RegionRequest, region: _Region) -> Iterator[str]:
    if request.first_gfn != UNPLACED:
        yield f"begin = {_address(request.first_gfn)}"
    if request.role is Role.OWNER:
        return
    if request.nr_frames != WHOLE_REGION:
        yield f"size = {_size(request.nr_frames)}"
    if request.offset_frames:
        yield f"offset = {_size(request.offset_frames)}"
    if request.prot is not _ceiling(region):
        yield f"prot = {quoted(request.prot)}"


def _ceiling(region: _Region) -> str:
    if region.owners_request is not None:
        return region.owners_request.prot
    return (region.definition.terms if region.definition else USUAL_TERMS).prot


def _traits(guest: GuestConfig) -> Iterator[str]:
    usual = GuestConfig(name=guest.name)
    if guest.uuid:
        yield f"uuid = {quoted(guest.uuid)}"
    if guest.guest_type is not usual.guest_type:
        yield f"type = {quoted(guest.guest_type)}"
    for key, mebibytes in (("memory", guest.memory_mib), ("maxmem", guest.maxmem_mib)):
        if mebibytes:
            yield f'{key} = "{mebibytes} MiB"'
    for key in ("hap", "altp2m", "nestedhvm"):
        if getattr(guest, key) != getattr(usual, key):
            yield f"{key} = {str(getattr(guest, key)).lower()}"
    if not guest.reserve:
        yield 'memory_map = "leave"'
    if not guest.extended_regions:
        yield 'extended_regions = "unused"'


def _table(path: tuple[str, ...], lines: Iterable[str]) -> str:
    return "\n".join((f"[{dotted(path)}]", *lines, ""))


def _size(nr_frames: int) -> str:
    size_bytes = bytes_of(nr_frames)
    for unit, shift in _UNITS:
        if size_bytes and size_bytes % (1 << shift) == 0:
            return f'"{size_bytes >> shift} {unit}"'
    return str(size_bytes)


def _address(frame: int) -> str:
    return f"{address_of(Gfn(frame)):#x}"
