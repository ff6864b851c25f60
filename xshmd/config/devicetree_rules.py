# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the nodes of a device tree must be to each other, rule by rule.

These are the rules of ``process_shm_node`` and ``process_shm`` in Xen's
``xen/arch/arm/static-shmem.c``, and those whose breach it would not notice until it misbehaves.
Each yields what is wrong; what the numbers of one region must be is in
:mod:`xshmd.config.devicetree_shm`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from xshmd.config.devicetree_shm import Member, Reading
from xshmd.config.findings import config_error
from xshmd.errors import ConfigError
from xshmd.model import Place, Role

MAX_REGIONS: Final = 32
"""NR_SHMEM_BANKS in xen/include/xen/bootfdt.h."""


def is_the_systems(members: Iterable[Member]) -> bool:
    """Return whether any node leaves the role unsaid: then Xen's own domain owns the region."""
    return any(member.role is None for member in members)


def check_members(members: Sequence[Member]) -> Iterator[ConfigError]:
    """Yield what is wrong with the nodes of one region, their numbers apart."""
    for rule in (region_twice, id_kinds, role_unsaid, two_owners):
        yield from rule(members)


def region_twice(members: Sequence[Member]) -> Iterator[ConfigError]:
    """A guest's own memory map would have the region at two places, of which one is told to it."""
    seen: dict[str, Member] = {}
    for member in members:
        before = seen.setdefault(member.domain, member)
        if before is not member:
            yield config_error(
                member.place,
                f"region '{member.region_id}' is already in {before.place.key}",
                hint="a guest can have a region once; give the other one another id",
                rule="region-twice",
            )


def id_kinds(members: Sequence[Member]) -> Iterator[ConfigError]:
    """A number and a string are ids of two generations, which no Xen takes for the same."""
    first = members[0]
    for member in members:
        if member.numeric is not first.numeric:
            yield config_error(
                member.place,
                f"region '{member.region_id}' has a number as id in one node and a string in"
                f" another, {first.place.key}",
                hint="use a string in both",
                rule="id-kinds",
            )


def role_unsaid(members: Sequence[Member]) -> Iterator[ConfigError]:
    """Without a role Xen gives the pages to dom_io, and panics where they have an owner.

    handle_shared_mem_bank and is_shm_allocated_to_domio.
    """
    owner = next((member for member in members if member.role is Role.OWNER), None)
    for member in members:
        if owner is not None and member.role is None:
            yield config_error(
                member.place,
                f"without a role region '{member.region_id}' is the system's, but"
                f" {owner.place.key} owns it",
                hint='say role = "borrower", or leave the role out in all nodes of the region',
                rule="role-unsaid",
            )


def two_owners(members: Sequence[Member]) -> Iterator[ConfigError]:
    """The second one's acquire_domstatic_pages fails, and with it the boot."""
    owners = [member for member in members if member.role is Role.OWNER]
    for second in owners[1:]:
        yield config_error(
            second.place,
            f"region '{second.region_id}' has an owner already in {owners[0].place.key}",
            hint='make all but one of them role = "borrower"',
            rule="two-owners",
        )


def no_owner(members: Sequence[Member], said: Sequence[Reading]) -> Iterator[ConfigError]:
    """A host range that nobody owns would be mapped without a reference to its pages.

    Without a host range somebody outside of the tree may define the region.
    """
    owned = any(member.role is Role.OWNER for member in members)
    if said and said[0].host is not None and not owned and not is_the_systems(members):
        yield config_error(
            members[0].place,
            f"region '{members[0].region_id}' has a host address, but all its nodes are borrowers",
            hint='say role = "owner" in one of them, or leave the role out in all of them',
            rule="undefined-region",
        )


def host_overlap(
    regions: Mapping[str, Sequence[Member]], said: Mapping[str, Sequence[Reading]]
) -> Iterator[ConfigError]:
    """No machine frame is in two regions (check_reserved_regions_overlap)."""
    ranges = sorted(
        (found[0].host, found[0].host + found[0].size, region_id)
        for region_id, found in said.items()
        if found and found[0].host is not None
    )
    furthest, holder = 0, ""
    for start, end, region_id in ranges:
        if start < furthest:
            yield config_error(
                regions[region_id][0].place,
                f"the host range of region '{region_id}' at {start:#x} overlaps that of region"
                f" '{holder}'",
                hint="give every region memory of its own, or both nodes the same xen,shm-id",
                rule="shared-host-range",
            )
        if end > furthest:
            furthest, holder = end, region_id


def too_many_regions(nr_regions: int, file: str) -> Iterator[ConfigError]:
    """Xen has room for so many, and goes on without the others (-ENOSPC)."""
    if nr_regions > MAX_REGIONS:
        yield config_error(
            Place(file=file),
            f"there are {nr_regions} regions, and Xen takes {MAX_REGIONS} from a device tree",
            hint="put some of them into an xl configuration or a .toml file",
            rule="too-many-regions",
        )
