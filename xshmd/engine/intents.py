# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal of a set of changes: what may have been done of it, should we be cut off in it.

A set that is not committed is undone by the next start, one that is committed is finished.  One
node for the set says which; a node below it for each guest says how far that guest's part has come.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from xshmd.engine import records
from xshmd.engine.packing import pack
from xshmd.errors import StoreError
from xshmd.model import Lifetime, RegionRequest

ROOT: Final = f"{records.ROOT}/changes"
_GUEST: Final = "guest-"
_CREATE: Final = "create-"
_LIFETIME: Final = "lifetime-"
_REMOVE: Final = "remove-"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What happens to one guest."""

    generation: str
    attach: tuple[RegionRequest, ...] = ()
    detach: tuple[RegionRequest, ...] = ()
    is_late: bool = False
    """The guest was none of ours, and nothing has been done to it yet that binds it to a holder."""
    pauses: int | None = None
    """How many pauses of others the guest has, while one of ours is or may be on it; else None."""
    is_counting: bool = False
    """Its pauses are being counted, by taking all that Xen allows: ``pauses`` is a guess."""
    is_mapping: bool = False
    """The frames of ``attach`` were seen to be empty: whatever is there by now is ours."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """A set of changes."""

    id: str
    reason: str
    """Why, for the events of it."""
    is_committed: bool = False
    """All that can fail is done: what is left is to take away."""
    creates: tuple[str, ...] = ()
    """Regions that did not exist before."""
    lifetimes: tuple[tuple[str, Lifetime], ...] = ()
    removes: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()

    def with_part(self, part: Part) -> Intent:
        """Return the same with another state of one guest's part."""
        parts = tuple(part if one.generation == part.generation else one for one in self.parts)
        return dataclasses.replace(self, parts=parts)


def intent_path(intent_id: str) -> str:
    """Return the node of a set of changes."""
    return f"{ROOT}/{intent_id}"


def part_path(intent_id: str, generation: str) -> str:
    """Return the node of one guest's part in it."""
    return f"{ROOT}/{intent_id}/{_GUEST}{generation}"


def encode_head(intent: Intent) -> str:
    """Return the text of the set's own node: it counts from when this is there."""
    return pack({"v": records.SCHEMA, "committed": intent.is_committed, "reason": intent.reason})


def encode_part(part: Part) -> str:
    """Return the text of a guest's part."""
    document = {
        "v": records.SCHEMA,
        "attach": [records.request_document(one) for one in part.attach],
        "detach": [records.request_document(one) for one in part.detach],
        "late": part.is_late,
        "pauses": part.pauses,
        "counting": part.is_counting,
        "mapping": part.is_mapping,
    }
    return pack(document)


def nodes(intent: Intent) -> list[tuple[str, str]]:
    """Return all nodes of a set with their texts, the one that makes it count last."""
    at = intent_path(intent.id)
    return [
        *((part_path(intent.id, part.generation), encode_part(part)) for part in intent.parts),
        *((f"{at}/{_CREATE}{one}", "") for one in intent.creates),
        *((f"{at}/{_LIFETIME}{one}", lifetime.value) for one, lifetime in intent.lifetimes),
        *((f"{at}/{_REMOVE}{one}", "") for one in intent.removes),
        (at, encode_head(intent)),
    ]


def decode(intent_id: str, head: str, below: Mapping[str, str]) -> Intent | None:
    """Read a set back; None if it never came to count.

    Args:
        intent_id: Its id.
        head: The text of its own node.
        below: Those of the nodes below, by name.

    Raises:
        StoreError: it is not one of ours.
    """
    if not head:
        return None
    at = intent_path(intent_id)
    document = records.read_document(at, head)
    try:
        return Intent(
            id=intent_id,
            reason=str(document["reason"]),
            is_committed=document["committed"] is True,
            creates=_named(below, _CREATE),
            lifetimes=tuple(
                (one, Lifetime(below[f"{_LIFETIME}{one}"])) for one in _named(below, _LIFETIME)
            ),
            removes=_named(below, _REMOVE),
            parts=tuple(
                _part(f"{at}/{_GUEST}{one}", one, below[f"{_GUEST}{one}"])
                for one in _named(below, _GUEST)
            ),
        )
    except (KeyError, ValueError, TypeError) as broken:
        raise records.unreadable(at, repr(broken)) from broken


def _named(below: Mapping[str, str], prefix: str) -> tuple[str, ...]:
    return tuple(name.removeprefix(prefix) for name in below if name.startswith(prefix))


def _part(path: str, generation: str, text: str) -> Part:
    document: dict[str, Any] = records.read_document(path, text)
    pauses = document["pauses"]
    if pauses is not None and not isinstance(pauses, int):
        raise StoreError(f"{path}: pauses is {pauses!r}, not a number", path=path)
    return Part(
        generation=generation,
        attach=tuple(records.read_request(one) for one in document["attach"]),
        detach=tuple(records.read_request(one) for one in document["detach"]),
        is_late=document["late"] is True,
        pauses=pauses,
        is_counting=document["counting"] is True,
        is_mapping=document["mapping"] is True,
    )
