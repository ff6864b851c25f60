# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which frames hold a range of a region's bytes, with every number checked before it is used.

What a caller asks for and what the daemon answers end as arguments of a C function that takes 64
bits and believes them: here they are known to fit, and to be inside the region.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

from xshmd.errors import DaemonUnreachable, UsageError
from xshmd.units import DOMID_FIRST_RESERVED, MAX_GUEST_FRAMES, PAGE_SIZE, is_within


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A range of bytes within whole frames."""

    first_frame: int
    """The first frame of the region that has a byte of it."""
    nr_frames: int
    skip_bytes: int
    """How many bytes of that frame are before it."""
    nr_bytes: int


def part_of(total_bytes: int, offset_bytes: int, size_bytes: int | None) -> Part:
    """Return where a range of a region's bytes is.

    Args:
        total_bytes: How large the region is.
        offset_bytes: Where in it the range begins.
        size_bytes: How long it is; None: to the region's end.

    Raises:
        UsageError: it is not all in the region, or there is nothing of it.
        TypeError: something is not a whole number.
    """
    offset_bytes = operator.index(offset_bytes)
    size_bytes = total_bytes - offset_bytes if size_bytes is None else operator.index(size_bytes)
    if size_bytes < 1 or not is_within(offset_bytes, size_bytes, total_bytes):
        raise UsageError(
            f"{size_bytes} bytes at {offset_bytes} cannot be had of a region of {total_bytes}",
            hint="offset and size are bytes; at least one, and all of them in the region",
        )
    first_frame, skip_bytes = divmod(offset_bytes, PAGE_SIZE)
    return Part(
        first_frame=first_frame,
        nr_frames=-(-(skip_bytes + size_bytes) // PAGE_SIZE),
        skip_bytes=skip_bytes,
        nr_bytes=size_bytes,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """Where a region's memory is, as the daemon says: its ``Mapping``, checked."""

    holder_domid: int
    holder_uuid: str
    first_gfn: int
    nr_frames: int
    transport: str

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Whereabouts:
        """Read what the daemon answered.

        Raises:
            DaemonUnreachable: no daemon of ours can have answered so.
        """
        found = cls(
            holder_domid=_within(fields, "holderDomainId", 1, DOMID_FIRST_RESERVED - 1),
            holder_uuid=str(fields.get("holderUuid")),
            first_gfn=_within(fields, "holderFirstFrame", 0, MAX_GUEST_FRAMES - 1),
            nr_frames=_within(fields, "frameCount", 1, MAX_GUEST_FRAMES),
            transport=str(fields.get("transport")),
        )
        if not is_within(found.first_gfn, found.nr_frames, MAX_GUEST_FRAMES):
            raise _nonsense("frameCount", found.nr_frames)
        return found


def _within(fields: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _nonsense(name, value)
    return value


def _nonsense(name: str, value: object) -> DaemonUnreachable:
    return DaemonUnreachable(
        f"what answers as xshmd says {name}={value!r}, which cannot be",
        hint="the library and the running xshmd differ in version: systemctl restart xshmd",
    )
