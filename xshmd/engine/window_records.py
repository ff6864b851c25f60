# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal of a window: which guests stand still, and how far their regions' pages have come.

One node, as a window is one thing: either no member has been touched yet, and it is undone, or some
have, and it is finished.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from typing import Any, Final

from xshmd.engine import records
from xshmd.engine.packing import pack
from xshmd.units import Gfn

ROOT: Final = f"{records.ROOT}/windows"


class Phase(enum.StrEnum):
    """Written before the step that it names is begun."""

    PREPARING = "preparing"
    """Guests are paused and fresh pages made; what members have is as it was."""
    SWAPPING = "swapping"
    """All fresh pages are there, and some members may have them."""
    SEALING = "sealing"
    """All members have them: what is left is to take them out of the holder."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fresh:
    """The pages that a region is put on."""

    region_id: str
    kept: str
    """The keeper's name for them."""
    first_gfn: Gfn
    """The first of them in the holder, for as long as the window is open."""
    nr_frames: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A time in which nobody runs who could map a page of a holder."""

    holder_uuid: str
    """There is one window of a holder at a time, so this is its name."""
    phase: Phase
    reason: str
    fresh: tuple[Fresh, ...]
    pauses: tuple[tuple[str, int], ...] = ()
    """The guests on which a pause of ours is or may be, by generation, and how many others are."""
    is_counting: bool = False
    """Those are being counted, by taking all that Xen allows: they are guesses."""
    joiner: str = ""
    """The generation of a guest that is given these regions for the first time."""
    joins: tuple[tuple[Gfn, int], ...] = ()
    """Where it has them: first frame and number of frames."""

    def with_pauses(self, pauses: Iterable[tuple[str, int]], *, is_counting: bool) -> Window:
        """Return the same with what is known of pauses by now."""
        return dataclasses.replace(self, pauses=tuple(pauses), is_counting=is_counting)


def window_path(holder_uuid: str) -> str:
    """Return the node of the window of a holder."""
    return f"{ROOT}/{holder_uuid}"


def encode(window: Window) -> str:
    """Return the text of a window's node."""
    document = {
        "v": records.SCHEMA,
        "phase": window.phase.value,
        "reason": window.reason,
        "fresh": [dataclasses.astuple(one) for one in window.fresh],
        "pauses": window.pauses,
        "counting": window.is_counting,
        "joiner": window.joiner,
        "joins": window.joins,
    }
    return pack(document)


def decode(path: str, text: str) -> Window:
    """Read a window's node; StoreError if it is not one of ours."""
    document: dict[str, Any] = records.read_document(path, text)
    try:
        return Window(
            holder_uuid=path.rpartition("/")[2],
            phase=Phase(document["phase"]),
            reason=str(document["reason"]),
            fresh=tuple(
                Fresh(str(region_id), str(kept), Gfn(int(first)), int(nr_frames))
                for region_id, kept, first, nr_frames in document["fresh"]
            ),
            pauses=tuple((str(one), int(count)) for one, count in document["pauses"]),
            is_counting=document["counting"] is True,
            joiner=str(document["joiner"]),
            joins=tuple((Gfn(int(first)), int(nr)) for first, nr in document["joins"]),
        )
    except (KeyError, ValueError, TypeError) as broken:
        raise records.unreadable(path, repr(broken)) from broken
