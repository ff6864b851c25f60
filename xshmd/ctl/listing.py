# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xshmctl list``: one line a region, or with ``--guests`` one line a guest."""

from __future__ import annotations

from xshmd.ctl import render
from xshmd.units import human_size
from xshmd.varlink.client import Client

# xshmctl starts in the time that importing typing would take.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

REGION_HEADER = ("ID", "SIZE", "LIFETIME", "OWNER", "HOLDER", "MEMBERS")
DOM0 = "dom0"
"""Before the number of a process that has a lease."""
GUEST_HEADER = ("NAME", "DOMAIN", "STATE", "HOLDER", "REGIONS")


def run(options: Any) -> int:
    """List what there is."""
    with Client(options.socket) as client:
        reply = client.call("ListGuests" if options.guests else "ListRegions")
    if options.json != "off":
        render.print_json(reply, options.json)
    elif options.guests:
        rows = [_guest_row(guest) for guest in reply["guests"]]
        render.print_table(GUEST_HEADER, rows, legend=options.legend, noun="guest")
    else:
        rows = [_region_row(region) for region in reply["regions"]]
        render.print_table(REGION_HEADER, rows, legend=options.legend, noun="region")
    return 0


def _region_row(region: dict[str, Any]) -> tuple[str, ...]:
    members = [
        f"{member['guest']}@{render.address(member['firstFrame'])}" for member in region["members"]
    ]
    members += [f"{DOM0}:{lease['processId']}" for lease in region.get("leases") or ()]
    return (
        region["id"],
        human_size(region["sizeBytes"]),
        region["lifetime"],
        region.get("owner") or "-",
        ",".join(_number(one.get("holderDomainId")) for one in region.get("pieces") or [region]),
        ",".join(members) or "-",
    )


def _guest_row(guest: dict[str, Any]) -> tuple[str, ...]:
    return (
        guest["name"],
        _number(guest.get("domainId")),
        guest["state"],
        _number(guest.get("holderDomainId")),
        ",".join([*guest["regions"], *_withdrawn(guest)]) or "-",
    )


def _withdrawn(guest: dict[str, Any]) -> list[str]:
    return [f"{region} (withdrawn, still mapped)" for region in guest.get("stillMapped") or ()]


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)
