# SPDX-License-Identifier: LGPL-2.1-or-later
"""A dom0less device tree as declarations: which domains share which memory, and at which frames.

The binding is that of ``docs/misc/arm/device-tree/booting.txt`` in Xen ("Static Shared Memory",
"Static Event Channel") and of the design that came before it; what is refused here is what
``process_shm_node`` and ``process_shm`` of ``xen/arch/arm/static-shmem.c`` refuse or misread.

Nodes under /chosen are Dom0's; a domain has no name there but that of its node.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Final

from xshmd.config import devicetree_channels
from xshmd.config import devicetree_rules as rules
from xshmd.config.devicetree_blob import DOMAIN, EVENT_CHANNEL, SHARED_MEMORY, Node, nodes
from xshmd.config.devicetree_shm import Member, Reading, numbers_of, readings
from xshmd.config.findings import config_error, raise_all
from xshmd.config.xlcfg import shown
from xshmd.declarations import Declarations
from xshmd.errors import ConfigError
from xshmd.model import (
    USUAL_TERMS,
    Backing,
    GuestConfig,
    Place,
    RegionConfig,
    RegionRequest,
    RegionTerms,
    Role,
)
from xshmd.units import frames_of, gfn_of

DOM0: Final = "Domain-0"
"""What the toolstack calls the domain that a tree's /chosen describes."""
MAX_ID_LENGTH: Final = 15
"""MAX_SHM_ID_LENGTH in xen/include/xen/bootfdt.h, without its NUL."""
ID: Final = re.compile(r"[a-zA-Z0-9_@-]+")
"""What may be in an id: it is part of a xenstore path (docs/misc/xenstore.txt)."""
NODE_NAME: Final = re.compile(r"[a-zA-Z0-9,._+-]+(?:@[a-zA-Z0-9,._+-]+)?")

_LARGEST_NUMBER: Final = 0x126
"""The design's largest id; 0x127 is its INVALID_SHMID."""
_ROLES: Final = {role.value.encode() + b"\0": role for role in Role}


def read_devicetree(data: bytes, *, file: str) -> Declarations:
    """Read a device tree, as source or blob; one without shared memory declares nothing.

    Blocks while dtc compiles a source, for 10 seconds at most.

    Args:
        data: The tree's bytes.
        file: What messages call it.  A place's key is the path of a node.

    Raises:
        ConfigUnreadable: it is no device tree, or dtc or libfdt is not there to read it.
        ConfigError: what it says of shared memory or event channels is wrong; see
            :func:`xshmd.config.findings.errors_of`.  ``facts["rule"]`` names what is broken.
    """
    reader = _Reader(file)
    for node in nodes(data, file):
        reader.node(node)
    found = reader.declarations()
    raise_all(reader.errors)
    return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Domain:
    name: str
    direct_mapped: bool
    node: Node


class _Reader:
    """Gathers nodes as they come; ``errors`` has what is wrong with them."""

    def __init__(self, file: str) -> None:
        self.errors: list[ConfigError] = []
        self._file = file
        self._of_node: dict[Node, _Domain] = {}
        self._used: dict[str, _Domain] = {}
        """Those with shared memory or event channels; of others no rule is ours."""
        self._memory_mib: dict[str, int] = {}
        self._members: list[Member] = []
        self._ends: list[devicetree_channels.End] = []

    def node(self, node: Node) -> None:
        if node.depth == 1 and node.name == "chosen":
            self._of_node[node] = _Domain(name=DOM0, direct_mapped=True, node=node)
        elif node.depth == 2 and node.is_compatible(DOMAIN) and node.parent in self._of_node:
            direct_mapped = "direct-map" in node.properties
            self._of_node[node] = _Domain(name=node.name, direct_mapped=direct_mapped, node=node)
        elif node.is_compatible(SHARED_MEMORY):
            domain = self._domain_of(node)
            if domain is not None:
                self._member(node, domain)
        elif node.is_compatible(EVENT_CHANNEL):
            domain = self._domain_of(node)
            if domain is not None:
                end = devicetree_channels.end_of(node, domain.name, self._place(node), self.errors)
                if end is not None:
                    self._ends.append(end)

    def declarations(self) -> Declarations:
        regions: dict[str, list[Member]] = {}
        for member in self._members:
            regions.setdefault(member.region_id, []).append(member)
        self.errors += rules.too_many_regions(len(regions), self._file)
        said: dict[str, tuple[Reading, ...]] = {}
        for region_id, members in regions.items():
            self.errors += rules.check_members(members)
            said[region_id] = readings(members, self.errors)
            self.errors += rules.no_owner(members, said[region_id])
        self.errors += rules.host_overlap(regions, said)
        channels = devicetree_channels.channels(self._ends, self.errors)
        if self.errors:
            return Declarations()
        defined, requests = [], {}
        for region_id, members in regions.items():
            terms = _terms(said[region_id][0])
            if rules.is_the_systems(members):
                defined.append(
                    RegionConfig(
                        region_id=region_id,
                        nr_frames=frames_of(said[region_id][0].size),
                        terms=terms,
                        place=members[0].place,
                    )
                )
            for member, reading in zip(members, said[region_id], strict=True):
                requests[member] = _request(member, reading, terms)
        return Declarations(
            regions=tuple(defined), guests=self._guests(requests), event_channels=channels
        )

    def _guests(self, requests: dict[Member, RegionRequest]) -> tuple[GuestConfig, ...]:
        by_domain: dict[str, list[RegionRequest]] = {}
        for member in self._members:
            by_domain.setdefault(member.domain, []).append(requests[member])
        return tuple(
            GuestConfig(
                name=name,
                memory_mib=self._memory_mib[name],
                requests=tuple(of_domain),
                place=self._place(self._used[name].node),
            )
            for name, of_domain in by_domain.items()
        )

    def _domain_of(self, node: Node) -> _Domain | None:
        domain = self._of_node.get(node.parent) if node.parent is not None else None
        if domain is None:
            self._wrong(
                "misplaced",
                self._place(node),
                "the node is neither in /chosen nor in a domain of /chosen, so it is nobody's",
                f'put it into a node with compatible = "{DOMAIN}", or into /chosen for Dom0',
            )
        elif self._used.get(domain.name) is not domain:
            self._use(domain)
        return domain

    def _use(self, domain: _Domain) -> None:
        place, name = self._place(domain.node), domain.name
        if not NODE_NAME.fullmatch(name) or (name == DOM0 and domain.node.depth > 1):
            self._wrong(
                "domain-name",
                place,
                f"'{shown(name)}' cannot be the name of a domain",
                "the node's name becomes the guest's: use a-z A-Z 0-9 , . _ + - in it",
            )
        elif name in self._used:
            what = f"there are two nodes '{shown(name)}'"
            self._wrong("domain-twice", place, what, "rename one of them")
        self._used[name] = domain
        self._memory_mib[name] = 0
        if "memory" in domain.node.properties and name != DOM0:
            cells = domain.node.cells("memory")
            if cells is not None and len(cells) == 2:
                self._memory_mib[name] = -(-(cells[0] << 32 | cells[1]) // 1024)
            else:
                hint = "say KiB in two cells, as in memory = <0 131072>"
                self._wrong("memory", place, "'memory' is no 64-bit number", hint)

    def _member(self, node: Node, domain: _Domain) -> None:
        place = self._place(node)
        region_id, numeric = self._id(node, place)
        role = self._role(node, place)
        numbers = numbers_of(node, place, self.errors)
        if region_id and numbers is not None:
            cells, address_cells, size_cells = numbers
            self._members.append(
                Member(
                    domain=domain.name,
                    direct_mapped=domain.direct_mapped,
                    region_id=region_id,
                    numeric=numeric,
                    role=role,
                    cells=cells,
                    address_cells=address_cells,
                    size_cells=size_cells,
                    place=place,
                )
            )

    def _id(self, node: Node, place: Place) -> tuple[str, bool]:
        value = node.properties.get("xen,shm-id")
        hint = f'name the region with 1 to {MAX_ID_LENGTH} of a-z A-Z 0-9 _ - @, as in "my-memory"'
        if value is None:
            self._wrong("id", place, "'xen,shm-id' is missing", hint)
            return "", False
        text, nul = value[:-1].decode("latin-1"), value[-1:]
        # No string starts with a NUL, and every number the design allows does.
        if len(value) == 4 and (value[0] == 0 or nul != b"\0"):
            number = int.from_bytes(value)
            if number > _LARGEST_NUMBER:
                what = f"xen,shm-id <{number:#x}> is too large"
                self._wrong("id-number", place, what, f"the largest is {_LARGEST_NUMBER:#x}")
                return "", True
            return str(number), True
        if nul != b"\0" or not ID.fullmatch(text):
            self._wrong("id", place, f"xen,shm-id '{shown(text)}' is no id", hint)
        elif len(text) > MAX_ID_LENGTH:
            what = f"xen,shm-id '{shown(text)}' has {len(text)} characters"
            self._wrong("id-length", place, what, f"a device tree has room for {MAX_ID_LENGTH}")
        else:
            return text, False
        return "", False

    def _role(self, node: Node, place: Place) -> Role | None:
        value = node.properties.get("role")
        if value is None:
            return None
        if value not in _ROLES:
            text = shown(value.rstrip(b"\0").decode("latin-1"))
            hint = 'say role = "owner" or role = "borrower", or leave it out in all nodes'
            self._wrong("role", place, f"role '{text}' is not known", hint)
        return _ROLES.get(value)

    def _place(self, node: Node) -> Place:
        return Place(file=self._file, key=node.path)

    def _wrong(self, rule: str, place: Place, what: str, hint: str) -> None:
        self.errors.append(config_error(place, what, hint=hint, rule=rule))


def _terms(reading: Reading) -> RegionTerms:
    if reading.host is None:
        return USUAL_TERMS
    return RegionTerms(backing=Backing.HOST, host_first_mfn=frames_of(reading.host))


def _request(member: Member, reading: Reading, terms: RegionTerms) -> RegionRequest:
    return RegionRequest(
        region_id=member.region_id,
        first_gfn=gfn_of(reading.guest),
        nr_frames=frames_of(reading.size),
        role=member.role or Role.BORROWER,
        terms=terms if member.role is Role.OWNER else USUAL_TERMS,
        place=member.place,
    )
