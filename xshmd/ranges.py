# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lists of byte ranges that strangers name: checked here, once, before anything is done with them.

An offset may be anything: what is not known to end inside is refused, and no sum is made of numbers
that are not known to be small.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Final

from xshmd.errors import Conflict, OutOfRange, UsageError
from xshmd.units import PAGE_SIZE, is_within

MAX_RANGES: Final = 64
"""Ranges in one list, at the most."""
MAX_LIST_BYTES: Final = 8 << 20
"""Bytes that one list names, at the most: dom0 maps them all at the same time to copy them."""


@dataclasses.dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes one after the other; of what, says whoever has it."""

    offset_bytes: int
    nr_bytes: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset_bytes + self.nr_bytes

    def moved(self, by_bytes: int) -> ByteRange:
        """Return the range as it is called in something that begins so much earlier."""
        return ByteRange(self.offset_bytes + by_bytes, self.nr_bytes)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some bytes of what one guest has of a region, or of the whole region for dom0."""

    guest: str
    """Name of the guest, for messages; empty for dom0."""
    generation: str
    """Which life of the guest; empty for dom0."""
    ranges: tuple[ByteRange, ...]
    """In bytes from where the guest's part of the region begins."""


def nr_bytes_of(ranges: Iterable[ByteRange]) -> int:
    """Return how many bytes a list names."""
    return sum(each.nr_bytes for each in ranges)


def nr_frames_of(ranges: Iterable[ByteRange]) -> int:
    """Return how many frames the ranges lie in, those that two lie in counted twice."""
    return sum(-(-each.end // PAGE_SIZE) - each.offset_bytes // PAGE_SIZE for each in ranges)


def check_list(ranges: Sequence[ByteRange], size_bytes: int, what: str) -> None:
    """Refuse a list that is not one of distinct bytes of something of this size.

    Args:
        ranges: The list, as a stranger said it.
        size_bytes: How large that is in which all of it must lie.
        what: What that is, for messages, e.g. ``what guest ctl has of region r0``.

    Raises:
        UsageError: there is nothing in it, or too much.
        OutOfRange: a range does not end inside.
        Conflict: two ranges overlap.
    """
    if not 1 <= len(ranges) <= MAX_RANGES:
        raise UsageError(
            f"a list of {len(ranges)} ranges", hint=f"a list has 1 to {MAX_RANGES} ranges"
        )
    for each in ranges:
        if each.nr_bytes < 1 or each.nr_bytes > size_bytes:
            raise OutOfRange(
                f"a range of {each.nr_bytes} bytes", hint=f"{what} is {size_bytes} bytes"
            )
        if not is_within(each.offset_bytes, each.nr_bytes, size_bytes):
            raise OutOfRange(
                f"{each.nr_bytes} bytes at {each.offset_bytes} are not all in {what}",
                hint=f"it is {size_bytes} bytes",
            )
    if nr_bytes_of(ranges) > MAX_LIST_BYTES:
        raise UsageError(
            f"a list of {nr_bytes_of(ranges)} bytes",
            hint=f"a list names {MAX_LIST_BYTES} bytes at the most: make several of it",
        )
    check_apart(ranges)


def check_apart(*lists: Iterable[ByteRange]) -> None:
    """Refuse ranges, of one list or several about the same bytes, of which two overlap.

    Raises:
        Conflict: two of them do.
    """
    ordered = sorted((each for one in lists for each in one), key=lambda each: each.offset_bytes)
    for before, after in itertools.pairwise(ordered):
        if after.offset_bytes < before.end:
            raise Conflict(
                f"{after.nr_bytes} bytes at {after.offset_bytes} are also in the "
                f"{before.nr_bytes} bytes at {before.offset_bytes}",
                hint="name no byte twice: what would be in it is nobody's to say",
            )
