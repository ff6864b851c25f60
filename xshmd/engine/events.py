# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tells whoever wants to know what happened: one place that audit, metrics and Monitor hang on.

Nobody who listens can hold the engine up: a listener that does not keep up is cut off, and knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Final

import trio

from xshmd.errors import XshmError, rules_of
from xshmd.events import Event, EventKind
from xshmd.model import Guest, Lease, Region, RegionRequest

BACKLOG: Final = 1024
"""How many events a listener may be behind."""


class EventHub:
    """Takes events from the engine and hands them to every listener, in order."""

    def __init__(self, backlog: int = BACKLOG) -> None:
        self._backlog = backlog
        self._listeners: set[trio.MemorySendChannel[Event]] = set()
        self.counts: Counter[EventKind] = Counter()
        """How many of each kind there were."""
        self.refusals: Counter[str] = Counter()
        """How often something was refused, by the rules that it broke."""
        self.dropped = 0
        """How many events were not delivered to a listener that was too slow for them."""
        self.guests_attached = 0
        """How many new guests were given all of their regions."""
        self.attach_s = 0.0
        """How long that took for all of them together, from their introduction on."""

    def emit(self, event: Event) -> None:
        """Say to every listener that this has happened."""
        self.counts[event.kind] += 1
        for listener in tuple(self._listeners):
            try:
                listener.send_nowait(event)
            except trio.WouldBlock:
                self.dropped += 1
                self._listeners.discard(listener)
                listener.close()
            except trio.BrokenResourceError:  # it closed its end and has not left yet
                self._listeners.discard(listener)

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
        """Receive every event from now on; the channel ends once one had to be dropped."""
        send, receive = trio.open_memory_channel[Event](self._backlog)
        self._listeners.add(send)
        try:
            with send, receive:
                yield receive
        finally:
            self._listeners.discard(send)

    def attached(self, seconds: float) -> None:
        """Count a new guest that has all of its regions."""
        self.guests_attached += 1
        self.attach_s += seconds

    def count_refusal(self, error: XshmError) -> None:
        """Count what somebody asked for and cannot have, once for each rule that it breaks."""
        self.refusals.update(rules_of(error))

    # -- the usual ones -------------------------------------------------------------------------

    def joined(self, guest: Guest, requests: Iterable[RegionRequest], reason: str) -> None:
        """Say that the guest was given the memory of these requests."""
        self._for_each(EventKind.PEER_JOINED, guest, requests, reason)

    def left(self, guest: Guest, requests: Iterable[RegionRequest], reason: str) -> None:
        """Say that the guest has the memory of these requests no more."""
        self._for_each(EventKind.PEER_LEFT, guest, requests, reason)

    def _for_each(
        self, kind: EventKind, guest: Guest, requests: Iterable[RegionRequest], reason: str
    ) -> None:
        for request in requests:
            self.emit(
                Event(
                    kind=kind, region=request.region_id, guest=guest.name, domid=guest.domid,
                    holder_uuid=guest.holder_uuid, request=request, size_bytes=request.size_bytes,
                    reason=reason,
                )
            )  # fmt: skip

    def about_region(self, kind: EventKind, region: Region, reason: str) -> None:
        """Say that a region was made or freed."""
        self.emit(
            Event(
                kind=kind, region=region.region_id, guest=region.owner,
                holder_uuid=region.holder_uuid, size_bytes=region.size_bytes, reason=reason,
            )
        )  # fmt: skip

    def about_guest(self, kind: EventKind, guest: Guest) -> None:
        """Say something of a guest as a whole."""
        self.emit(
            Event(kind=kind, guest=guest.name, domid=guest.domid, holder_uuid=guest.holder_uuid)
        )

    def refused(self, guest: Guest, error: XshmError) -> None:
        """Say that a guest cannot have what its configuration says."""
        self.count_refusal(error)
        self.emit(
            Event(
                kind=EventKind.GUEST_REFUSED, guest=guest.name, domid=guest.domid,
                holder_uuid=guest.holder_uuid, reason=error.one_line(), rules=rules_of(error),
            )
        )  # fmt: skip

    def about_lease(self, kind: EventKind, lease: Lease, reason: str = "") -> None:
        """Say that a process may map a region, or no longer has it mapped."""
        self.emit(Event(kind=kind, region=lease.region_id, lease=lease, reason=reason))
