# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xshmctl check``: every broken rule of configuration files, with no daemon and no Xen."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xshmd import errors
from xshmd.config.forms import Parsed, Together, read_file, take_together
from xshmd.ctl import render
from xshmd.ctl.machine import add_arch, arch_of
from xshmd.declarations import Declarations
from xshmd.errors import ConfigUnreadable, XshmError
from xshmd.machine import Arch
from xshmd.model import UNPLACED, GuestConfig, Place, RegionRequest
from xshmd.units import bytes_of, human_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this verb takes."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a configuration: TOML (.toml), a device tree (.dts, .dtb), or xl's (any other)",
    )
    add_arch(parser)


def run(options: Any) -> int:
    """Check the files together; print what is wrong, or else what each guest will have."""
    arch = arch_of(options.arch, options.files)
    parsed = [read_file(file, arch=arch) for file in dict.fromkeys(options.files)]
    together = take_together(parsed)
    placed, found = _findings(together, arch)
    members = [] if found else list(_members(together.declarations, placed))
    notes = [] if found else _notes(placed)
    if options.json != "off":
        value = {
            "findings": [_fields(error) for error in found],
            "members": [dataclasses.asdict(member) for member in members],
            "notes": notes,
        }
        render.print_json(value, options.json)
    else:
        for error in found:
            _print(error)
        for note in notes:
            render.say(f"note: {note}")
        _conclude(options, parsed, found, members)
    return _status(found)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    """A guest's part in a region; the names are those of the JSON output."""

    guest: str
    region: str
    role: str
    address: int
    sizeBytes: int
    chosen: bool
    """Whether the address is our choice."""


def _findings(together: Together, arch: Arch) -> tuple[Declarations, list[XshmError]]:
    from xshmd.policy import quota_rules, rules
    from xshmd.policy.holdings import NOTHING, Holdings

    placed, no_room = together.placed(arch)
    broken = list(rules.check_together(placed.guests, placed.regions, arch))
    growth = quota_rules.Growth(
        before=NOTHING, after=Holdings.of_files(placed), policy=placed.policy
    )
    broken += quota_rules.broken(growth)
    return placed, [*together.errors, *no_room, *broken]


def _notes(placed: Declarations) -> list[str]:
    from xshmd.policy import rules

    others = rules.claims((), placed.guests)
    notes = [
        note
        for guest in placed.guests
        for note in rules.remarks(guest, existing={}, others=others, regions=placed.regions)
    ]
    if placed.event_channels:
        count = len(placed.event_channels)
        notes.append(f"{count} static event channels are Xen's to make: xshmd only reports them")
    return notes


def _members(written: Declarations, placed: Declarations) -> Iterator[_Member]:
    for before, after in zip(written.guests, placed.guests, strict=True):
        for said, request in zip(before.requests, after.requests, strict=True):
            yield _member(after, request, chosen=said.first_gfn == UNPLACED)


def _member(guest: GuestConfig, request: RegionRequest, *, chosen: bool) -> _Member:
    return _Member(
        guest=guest.name,
        region=request.region_id,
        role=request.role.value,
        address=bytes_of(request.first_gfn),
        sizeBytes=request.size_bytes,
        chosen=chosen,
    )


def _fields(error: XshmError) -> Mapping[str, str | int]:
    place = Place(
        file=str(error.facts.get("file", "")),
        key=str(error.facts.get("place", "")),
        line=int(error.facts.get("line", 0)),
    )
    return {
        "file": place.file,
        "line": place.line,
        "place": place.key,
        "rule": _rule(error),
        "message": error.message.removeprefix(f"{place}: "),
        "hint": error.hint,
    }


def _rule(error: XshmError) -> str:
    usual = "unreadable" if isinstance(error, ConfigUnreadable) else "wrong"
    return str(error.facts.get("rule") or usual)


def _print(error: XshmError) -> None:
    print(render.printable(f"{error.message} [{_rule(error)}]"))
    if error.hint:
        print(render.printable(f"  hint: {error.hint}"))


def _conclude(
    options: Any,
    parsed: Sequence[Parsed],
    found: Sequence[XshmError],
    members: Sequence[_Member],
) -> None:
    if found and options.legend:
        things = "thing is" if len(found) == 1 else "things are"
        files = "file" if len(parsed) == 1 else "files"
        print(f"\n{len(found)} {things} wrong in {len(parsed)} {files}.")
    header = ("GUEST", "REGION", "ROLE", "ADDRESS", "SIZE", "")
    rows = [
        (
            member.guest,
            member.region,
            member.role,
            f"{member.address:#x}",
            human_size(member.sizeBytes),
            "chosen" if member.chosen else "",
        )
        for member in members
    ]
    if rows:
        render.print_table(header, rows, legend=options.legend, noun="member")
    if options.legend and not found:
        print("All rules hold.")


def _status(found: Sequence[XshmError]) -> int:
    if any(isinstance(error, ConfigUnreadable) for error in found):
        return errors.EXIT_FAILED
    return errors.EXIT_REFUSED if found else errors.EXIT_OK
