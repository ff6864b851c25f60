# SPDX-License-Identifier: LGPL-2.1-or-later
"""Chooses the guest frames of regions whose configuration says none.

The choice follows from the guest's configuration alone: the host's state, other guests and time
have no part in it, so it is the same at every start and on every machine.  Entries are placed in
the order they are written, each at the lowest place that is free, so one that is added at the end
moves none before it (unless it says the very frames that one of them was given: what is said goes
before what is chosen).
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final

from xshmd.errors import XshmError, combined
from xshmd.machine import Arch
from xshmd.model import DOMAIN_0, UNPLACED, WHOLE_REGION, GuestConfig, RegionRequest
from xshmd.policy import layout
from xshmd.policy.findings import config_error, region_at
from xshmd.units import SUPERPAGE_FRAMES, Gfn, bytes_of, human_size

_ARM_ADDRESS_BITS: Final = 40
"""What may be used without knowing the machine: the width many Arm machines have."""


def placed(config: GuestConfig, arch: Arch, *, sizes: Mapping[str, int]) -> GuestConfig:
    """Give every request a frame, and the size of its region where it wants all of it.

    A request for a region of unknown size is left as it is, and so is what wants a frame and would
    move once the size is known; :mod:`xshmd.policy.rules` refuses a region that nobody defines.
    Domain-0 is left as it is, too: its addresses are the machine's.

    Args:
        config: What the guest's configuration says.
        arch: The machine's.
        sizes: How many frames each region has that is defined anywhere, the guest's own included
            or not.

    Raises:
        ConfigError: there is no room for some of them.
    """
    if config.name == DOMAIN_0:
        return config
    requests = tuple(_sized(request, sizes) for request in config.requests)
    if all(request.first_gfn != UNPLACED for request in requests):
        return dataclasses.replace(config, requests=requests)
    space = _Space(_windows(arch, config), requests)
    found: list[RegionRequest] = []
    broken: list[XshmError] = []
    is_settled = not any(
        request.nr_frames == WHOLE_REGION and request.first_gfn != UNPLACED for request in requests
    )
    for request in requests:
        is_settled = is_settled and request.nr_frames != WHOLE_REGION
        if is_settled and request.first_gfn == UNPLACED:
            first_gfn = space.take(request.nr_frames)
            if first_gfn is None:
                broken.append(_no_room(request, space))
            else:
                request = dataclasses.replace(request, first_gfn=first_gfn)
        found.append(request)
    if broken:
        raise combined(broken)
    return dataclasses.replace(config, requests=tuple(found))


def _sized(request: RegionRequest, sizes: Mapping[str, int]) -> RegionRequest:
    left = sizes.get(request.region_id, 0) - request.offset_frames
    if request.nr_frames != WHOLE_REGION or left <= 0:
        return request
    return dataclasses.replace(request, nr_frames=left)


def _windows(arch: Arch, config: GuestConfig) -> tuple[layout.Window, ...]:
    """Return where regions may be put unasked, the best first.

    On Arm the layout's free ranges, the last of which is the window of virtual PCI's prefetchable
    memory: for what is too large for the others.  On x86 only what is above everything else, as
    Linux looks below for frames to map grants at (drivers/xen/unpopulated-alloc.c).
    """
    if arch is Arch.ARM64:
        return layout.free(arch, config, _ARM_ADDRESS_BITS)
    return (layout.default_window(arch, config),)


def _no_room(request: RegionRequest, space: _Space) -> XshmError:
    size, largest = bytes_of(request.nr_frames), bytes_of(space.largest_gap())
    return config_error(
        "no-room",
        request.place,
        f"{region_at(request)} needs {human_size(size)}, for which the guest has no free range"
        f" left: the largest has {human_size(largest)}",
        "make the region smaller, or say 'begin' for the guest's other regions elsewhere",
    )


class _Space:
    """The windows of one guest, and what of them is taken."""

    def __init__(self, windows: Sequence[layout.Window], requests: Sequence[RegionRequest]) -> None:
        self._windows = windows
        self._taken: list[tuple[int, int]] = []
        """Ranges of frames that do not touch each other, in ascending order."""
        self._searched: dict[int, tuple[int, int]] = {}
        """In which window and to which frame there is no gap of so many frames, nor will be."""
        for request in requests:
            if request.first_gfn != UNPLACED:
                self._add(request.first_gfn, request.end_gfn)

    def take(self, nr_frames: int) -> Gfn | None:
        """Take the first range of so many frames; None if there is none."""
        alignment = SUPERPAGE_FRAMES if nr_frames >= SUPERPAGE_FRAMES else 1
        index, at = self._searched.get(nr_frames, (0, 0))
        for window in self._windows[index:]:
            first = self._first_gap(max(at, window.first_gfn), window.end_gfn, nr_frames, alignment)
            if first is not None:
                self._add(first, first + nr_frames)
                self._searched[nr_frames] = (index, first + nr_frames)
                return Gfn(first)
            index, at = index + 1, 0
        return None

    def largest_gap(self) -> int:
        """Return how many frames the largest free range has."""
        largest = 0
        for window in self._windows:
            at = int(window.first_gfn)
            for first, end in (*self._taken, (window.end_gfn, window.end_gfn)):
                largest = max(largest, min(first, window.end_gfn) - at)
                at = max(at, end)
        return largest

    def _first_gap(self, start: int, end: int, nr_frames: int, alignment: int) -> int | None:
        at = _aligned(start, alignment)
        index = bisect.bisect_right(self._taken, at, key=lambda one: one[1])
        while at + nr_frames <= end:
            if index == len(self._taken) or at + nr_frames <= self._taken[index][0]:
                return at
            at = max(at, _aligned(self._taken[index][1], alignment))
            index += 1
        return None

    def _add(self, first: int, end: int) -> None:
        # Joined with what it touches, so that many regions in a row are one range to look at.
        low = bisect.bisect_left(self._taken, first, key=lambda one: one[1])
        high = bisect.bisect_right(self._taken, end, key=lambda one: one[0])
        if low < high:
            first = min(first, self._taken[low][0])
            end = max(end, self._taken[high - 1][1])
        self._taken[low:high] = [(first, end)]


def _aligned(gfn: int, alignment: int) -> int:
    return -(-gfn // alignment) * alignment
