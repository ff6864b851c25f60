# SPDX-License-Identifier: LGPL-2.1-or-later
"""Says a plan of changes in words, step by step, for people and for programs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from xshmd.changes import Step
from xshmd.model import GuestState, Lifetime, Region
from xshmd.policy.grouping import is_new_home
from xshmd.units import address_of, bytes_of, human_size

if TYPE_CHECKING:
    from xshmd.policy.changes import ChangePlan, GuestChange


def steps_of(plan: ChangePlan, regions: Mapping[str, Region]) -> tuple[Step, ...]:
    """Return the steps of a plan, in the order in which they are taken.

    Args:
        plan: The plan; its own ``steps`` do not matter.
        regions: Those that exist, by id.
    """
    terms = {region_id: region.terms for region_id, region in regions.items()}
    terms |= {new.region_id: new.terms for new, _ in plan.creates}
    sealed = {region_id for region_id, each in terms.items() if each.is_sealed}
    return (
        *_creates(plan, regions),
        *(step for change in plan.guests for step in _attaches(change, sealed)),
        *(step for change in plan.guests for step in _detaches(change, sealed)),
        *_lifetimes(plan),
        *_removes(plan, regions),
    )


def _creates(plan: ChangePlan, regions: Mapping[str, Region]) -> Iterator[Step]:
    for region_id, home in plan.moves:
        size = human_size(regions[region_id].size_bytes)
        yield Step(
            verb="create",
            region=region_id,
            text=f"move the {size} of {region_id}, which nobody has, to {_holder(home)}",
        )
    for new, home in plan.creates:
        where = "dom0's own memory" if new.terms.is_lent else _holder(home)
        yield Step(
            verb="create",
            region=new.region_id,
            text=f"make {human_size(bytes_of(new.nr_frames))} for {new.region_id} in {where}",
        )


def _holder(home: str) -> str:
    if not home:
        return "holders that serve grants"
    return "a new holder" if is_new_home(home) else f"holder {home}"


def _who(change: GuestChange, region_id: str, sealed: Collection[str]) -> str:
    """Say who stands still for a change to a region."""
    name = change.guest.name
    return f"{name}'s whole group, which is sealed," if region_id in sealed else name


def _attaches(change: GuestChange, sealed: Collection[str]) -> Iterator[Step]:
    guest = change.guest
    for request in change.attach:
        who = _who(change, request.region_id, sealed)
        yield Step(
            verb="attach", region=request.region_id, guest=guest.name, domid=guest.domid,
            text=f"pause {who} and map {human_size(request.size_bytes)} of "
            f"{request.region_id} at {address_of(request.first_gfn):#x}",
        )  # fmt: skip


def _detaches(change: GuestChange, sealed: Collection[str]) -> Iterator[Step]:
    guest = change.guest
    away = guest.state is GuestState.REBOOTING
    for request in change.detach:
        who = _who(change, request.region_id, sealed)
        size, at = human_size(request.size_bytes), address_of(request.first_gfn)
        yield Step(
            verb="detach", region=request.region_id, guest=guest.name,
            domid=None if away else guest.domid,
            text=f"do not give {guest.name} {request.region_id} again when it comes back"
            if away
            else f"pause {who} and unmap {size} of {request.region_id} at {at:#x}",
        )  # fmt: skip


def _lifetimes(plan: ChangePlan) -> Iterator[Step]:
    for region_id, lifetime in plan.lifetimes:
        if lifetime is Lifetime.MEMBERS:
            text = f"{region_id} is no longer defined: it stays until its members end"
        else:
            text = f"{region_id} is defined again: it stays when its members end"
        verb = "remove" if lifetime is Lifetime.MEMBERS else "create"
        yield Step(verb=verb, region=region_id, text=text)


def _removes(plan: ChangePlan, regions: Mapping[str, Region]) -> Iterator[Step]:
    for region_id in plan.removes:
        size = human_size(regions[region_id].size_bytes)
        yield Step(verb="remove", region=region_id, text=f"wipe and free the {size} of {region_id}")
