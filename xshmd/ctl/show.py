# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xshmctl show``: everything about a region, for people."""

from __future__ import annotations

import argparse
from typing import Any

from xshmd.ctl import render
from xshmd.errors import NoSuchRegion
from xshmd.units import human_size
from xshmd.varlink.client import Client


def run(options: argparse.Namespace) -> int:
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
        ("Holder", _holder(region)),
    ]
    members = [_member(member) for member in region["members"]] or ["none"]
    lines += [("Members" if at == 0 else "", text) for at, text in enumerate(members)]
    for label, text in lines:
        print(f"{label + ':' if label else '':>12} {render.printable(text)}")


def _lifetime(word: str) -> str:
    meanings = {
        "members": "members (freed when its last member has ended)",
        "system": "system (stays until it is removed)",
    }
    return meanings.get(word, word)


def _holder(region: dict[str, Any]) -> str:
    where = render.frames(region["holderFirstFrame"], region["frameCount"])
    domid = region.get("holderDomainId")
    domain = "no domain" if domid is None else f"domain {domid}"
    return f"{domain}, uuid {region['holderUuid']}, frames {where}"


def _member(member: dict[str, Any]) -> str:
    domid = member.get("domainId")
    domain = "no domain" if domid is None else f"domain {domid}"
    text = (
        f"{member['guest']} ({domain}, {member['state']}): {member['role']} {member['prot']} "
        f"at {render.address(member['firstFrame'])}, "
        f"frames {render.frames(member['firstFrame'], member['frameCount'])}"
    )
    if member["offsetFrames"]:
        text += f", from the region's frame {render.frame(member['offsetFrames'])} on"
    return text
