# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a broken rule is said: for people with place, reason and remedy, for programs by its name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias, TypeVar

from xshmd.errors import ConfigError, Conflict, Fact, OutOfMemory, Refused, XshmError
from xshmd.model import UNPLACED, WHOLE_REGION, Place, RegionRequest
from xshmd.policy import layout

Findings: TypeAlias = Iterator[XshmError]
"""What a rule returns: an error for each time it is broken."""

_E = TypeVar("_E", bound=XshmError)


def config_error(rule: str, place: Place, what: str, hint: str, **facts: Fact) -> ConfigError:
    """Return the finding that what is written is wrong in itself.

    Args:
        rule: The rule's name for programs, in ``facts``; names do not change.
        place: Where it is broken.
        what: What is wrong, in one sentence without a final full stop.
        hint: What to do about it.
        facts: The values that the sentence speaks of.
    """
    return _finding(ConfigError, rule, place, what, hint, facts)


def refused(rule: str, place: Place, what: str, hint: str, **facts: Fact) -> Refused:
    """Return the finding that what is written cannot be kept here; see :func:`config_error`."""
    return _finding(Refused, rule, place, what, hint, facts)


def conflict(rule: str, place: Place, what: str, hint: str, **facts: Fact) -> Conflict:
    """Return the finding that it contradicts something else; see :func:`config_error`."""
    return _finding(Conflict, rule, place, what, hint, facts)


def out_of_memory(rule: str, place: Place, what: str, hint: str, **facts: Fact) -> OutOfMemory:
    """Return the finding that the host has too little memory; see :func:`config_error`."""
    return _finding(OutOfMemory, rule, place, what, hint, facts)


def _finding(
    kind: type[_E], rule: str, place: Place, what: str, hint: str, facts: dict[str, Fact]
) -> _E:
    message = f"{place}: {what}" if place.file else what
    where: dict[str, Fact] = {"file": place.file, "place": place.key, "line": place.line}
    return kind(message, hint=hint, rule=rule, **where, **facts)


def region_at(request: RegionRequest) -> str:
    """Name a guest's part in a region, with its addresses where they are known."""
    name = f"region '{request.region_id}'"
    if request.first_gfn == UNPLACED:
        return name
    if request.nr_frames == WHOLE_REGION:
        return f"{name} from {layout.address_text(request.first_gfn)}"
    return f"{name} at {layout.span_text(request.first_gfn, request.end_gfn)}"
