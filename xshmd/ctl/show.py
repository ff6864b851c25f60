# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xshmctl show``: everything about a region, for people."""

from __future__ import annotations

from xshmd.ctl import render
from xshmd.errors import NoSuchRegion
from xshmd.units import human_size
from xshmd.varlink.client import Client

# xshmctl starts in the time that importing typing would take.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def run(options: Any) -> int:
    """Show each region; one that is not there does not hide the others."""
    status = 0
    shown = 0
    with Client(options.socket) as client:
        for region_id in options.ids:
            try:
                reply = client.call("ShowRegion", id=region_id)
            except NoSuchRegion as exc:
                render.complain(exc)
                status = exc.exit_status
                continue
            if options.json != "off":
                render.print_json(reply, options.json)
            else:
                print("\n" if shown else "", end="")
                _print_region(reply["region"])
            shown += 1
    return status


def _print_region(region: dict[str, Any]) -> None:
    print(render.printable(region["id"]))
    count = region["frameCount"]
    lines = [
        ("Size", f"{human_size(region['sizeBytes'])} ({count} frame{'' if count == 1 else 's'})"),
        ("Lifetime", _lifetime(region["lifetime"])),
        ("Owner", region.get("owner") or "the system"),
        ("Ready", "yes" if region["ready"] else "no, its memory is being prepared"),
        *_holders(region),
        *_terms(region.get("terms") or {}),
        *_pause(region),
    ]
    members = [_member(member) for member in region["members"]]
    members += [_lease(lease) for lease in region.get("leases") or ()]
    members = members or ["none"]
    lines += [("Members" if at == 0 else "", text) for at, text in enumerate(members)]
    if left := region.get("stillMappedBy"):
        lines.append(("Withdrawn", f"still mapped by {', '.join(left)}, until unmapped or ended"))
    render.print_fields(lines)


def _lifetime(word: str) -> str:
    meanings = {
        "owner": "owner (ends with its owner)",
        "members": "members (freed when its last member has ended)",
        "system": "system (stays until it is removed)",
    }
    return meanings.get(word, word)


def _terms(terms: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what is said of the region that is not as usual."""
    found = []
    if terms.get("prot") == "ro":
        found.append(("Prot", "ro at the most"))
    if terms.get("backing") == "host":
        where = render.address(terms["hostFirstFrame"])
        found.append(("Backing", f"memory of the host, from machine address {where} on"))
    if terms.get("backing") == "dom0":
        found.append(("Backing", "memory of dom0, lent to one guest at a time"))
    if terms.get("transport") == "grant":
        found.append(("Transport", "grant (each guest maps it from grant references)"))
    if isolation := terms.get("isolation"):
        found.append(("Isolation", isolation))
    if terms.get("protEnforcement") == "advisory":
        found.append(("Enforcement", "advisory (protection that Xen cannot enforce binds nobody)"))
    if doorbells := terms.get("doorbells"):
        found.append(("Doorbells", f"for {doorbells} peers; the last page is their control page"))
    return found


def _holders(region: dict[str, Any]) -> list[tuple[str, str]]:
    if not region["holderUuid"]:
        return []
    pieces = region.get("pieces") or [region]
    return [("" if at else "Holder", _holder(piece)) for at, piece in enumerate(pieces)]


def _pause(region: dict[str, Any]) -> list[tuple[str, str]]:
    """Return for how long a sealed region's group last stood still for it."""
    pause_us = region.get("pauseMicroseconds")
    if not pause_us:
        return []
    per_mib = pause_us / 1000 / max(region["sizeBytes"] / (1 << 20), 1)
    return [("Last pause", f"{pause_us / 1000:.3g} ms, {per_mib:.3g} ms a MiB")]


def _holder(region: dict[str, Any]) -> str:
    where = render.frames(region["holderFirstFrame"], region["frameCount"])
    domid = region.get("holderDomainId")
    domain = "no domain" if domid is None else f"domain {domid}"
    return f"{domain}, uuid {region['holderUuid']}, frames {where}"


def _member(member: dict[str, Any]) -> str:
    domid = member.get("domainId")
    domain = "no domain" if domid is None else f"domain {domid}"
    where = (
        f"at {render.address(member['firstFrame'])}, "
        f"frames {render.frames(member['firstFrame'], member['frameCount'])}"
    )
    if references := member.get("references"):
        where = f"maps {sum(one['count'] for one in references)} grant references"
    text = f"{member['guest']} ({domain}, {member['state']}): {member['role']} {member['prot']} "
    text += where
    if member["offsetFrames"]:
        text += f", from the region's frame {render.frame(member['offsetFrames'])} on"
    if member.get("peerId") is not None:
        text += f", peer {member['peerId']} ({member['peerState']})"
    if ports := member.get("ports"):
        text += f", ports {' '.join(map(str, ports))}"
    return text


def _lease(lease: dict[str, Any]) -> str:
    name = lease.get("processName")
    process = f"process {lease['processId']}" + (f", {name}" if name else "")
    return f"dom0 ({process}, user {lease['userId']}): lease {lease['prot']}"
