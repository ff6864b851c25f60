# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xshmctl convert``: the same regions in another form, or what a guest is given to find them.

What the other form cannot say is said on the standard error, and never dropped in silence.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from xshmd import errors
from xshmd.config.forms import Form, Together, read_file, render, take_together
from xshmd.ctl import render as output
from xshmd.ctl.machine import add_arch, arch_of
from xshmd.declarations import Declarations
from xshmd.errors import ConfigError, ConfigUnreadable, NoSuchGuest, UsageError, XshmError
from xshmd.machine import Arch
from xshmd.model import GuestConfig

ARTEFACT_NAMES = (
    "partial-dts", "reserved-memory", "memmap", "pmem", "header", "overlay", "zephyr-overlay",
)  # fmt: skip
"""The keys of :data:`xshmd.config.artefacts.ARTEFACTS`, which parsing need not import."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only this verb takes."""
    parser.add_argument(
        "--to",
        required=True,
        choices=[*(form.value for form in Form), *ARTEFACT_NAMES],
        help="what to write: a form of configuration, or something for one guest to find its"
        " regions by",
    )
    parser.add_argument("--guest", metavar="NAME", help="write only what concerns this guest")
    parser.add_argument(
        "--strict", action="store_true", help="fail if the form cannot say everything"
    )
    add_arch(parser)
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="a configuration, as for xshmctl check"
    )


def run(options: Any) -> int:
    """Read the files together, and print them in the other form."""
    arch = arch_of(options.arch, options.files)
    together = take_together(read_file(file, arch=arch) for file in dict.fromkeys(options.files))
    _raise_if(together.errors)
    losses: tuple[str, ...] = ()
    if options.to in ARTEFACT_NAMES:
        text = _artefact(options, together, arch)
    else:
        text, losses = _form(options, together, arch)
    if options.json == "off":
        for loss in losses:
            output.say(f"note: {loss}")
    if options.strict and losses:
        raise ConfigError(
            f"{options.to} cannot say everything: {losses[0]}"
            if len(losses) == 1
            else f"{options.to} cannot say {len(losses)} things, the first of which: {losses[0]}",
            hint="leave out --strict to have the rest",
            rule="loss",
        )
    if options.json == "off":
        sys.stdout.write(text)
    else:
        output.print_json({"text": text, "notes": list(losses)}, options.json)
    return errors.EXIT_OK


def _form(options: Any, together: Together, arch: Arch) -> tuple[str, tuple[str, ...]]:
    form = Form(options.to)
    declarations = together.declarations
    if form is Form.DTS:
        # A tree has no word for "anywhere".
        declarations, no_room = together.placed(arch)
        _raise_if(no_room)
    if options.guest is not None:
        declarations = _about(_guest(declarations, options.guest), declarations)
    return render(declarations, form, arch)


def _artefact(options: Any, together: Together, arch: Arch) -> str:
    from xshmd.config.artefacts import ARTEFACTS

    declarations, no_room = together.placed(arch)
    _raise_if(no_room)
    if options.guest is not None:
        guest = _guest(declarations, options.guest)
        return ARTEFACTS[options.to](_mapped_for(guest, declarations))
    guests = [guest for guest in declarations.guests if guest.requests]
    if len(guests) > 1:
        names = ", ".join(guest.name for guest in guests)
        raise UsageError(
            f"{options.to} is for one guest, and there are {len(guests)}: {names}",
            hint=f"say --guest {guests[0].name}",
        )
    if not guests:
        raise NoSuchGuest(
            "no guest in these files has shared memory", hint="name the guest's own file too"
        )
    return ARTEFACTS[options.to](_mapped_for(guests[0], declarations))


def _mapped_for(guest: GuestConfig, declarations: Declarations) -> GuestConfig:
    """Return the guest with the regions that it finds in its address space.

    Of those that it maps itself nobody else can say where they are.
    """
    from xshmd.policy.grants import granted_ids, without

    granted = granted_ids((), declarations.regions, declarations.guests)
    found = without(granted, guest)
    if guest.requests and not found.requests:
        raise errors.ConfigError(
            f"guest '{guest.name}' maps all of its regions itself, where it likes",
            hint="what it needs for that is in its xenstore node xshm/ID: see docs/grants.md",
        )
    return found


def _guest(declarations: Declarations, name: str) -> GuestConfig:
    for guest in declarations.guests:
        if guest.name == name:
            return guest
    names = ", ".join(guest.name for guest in declarations.guests)
    raise NoSuchGuest(
        f"there is no guest '{name}' in these files",
        hint=f"there are {names}" if names else "name the guest's own file too",
    )


def _about(guest: GuestConfig, declarations: Declarations) -> Declarations:
    """Return what concerns the guest: itself, the regions it has, the channels it is an end of."""
    ids = {request.region_id for request in guest.requests}
    return dataclasses.replace(
        declarations,
        guests=(guest,),
        regions=tuple(region for region in declarations.regions if region.region_id in ids),
        event_channels=tuple(
            channel
            for channel in declarations.event_channels
            if guest.name in (channel.guest, channel.peer_guest)
        ),
    )


def _raise_if(found: Sequence[XshmError]) -> None:
    if found:
        # A file that could not be read counts more than a rule that is broken in another.
        raise errors.combined(
            sorted(found, key=lambda error: not isinstance(error, ConfigUnreadable))
        )
