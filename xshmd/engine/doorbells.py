# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who hears whom: the lines between guests' event channels, and what each of them rings.

All ports of guests lead to dom0, which passes rings on: that works under every XSM policy, and a
guest needs to bind nothing.  What is there follows from the guests' records alone, so a new life of
the daemon binds the same ports again; each then rings once, for what may have been lost meanwhile
(xen/common/event_channel.c, evtchn_bind_interdomain()).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from xshmd.engine import identity
from xshmd.engine.control_pages import ControlPages
from xshmd.engine.guest_ports import GuestPorts
from xshmd.engine.holders import Holders
from xshmd.engine.ledger import Ledger
from xshmd.errors import Conflict, DomainGone, HypercallFailed
from xshmd.model import Guest, GuestState, PeerState, Region
from xshmd.ports import NOWHERE_LINE, EventChannels, Hypervisor
from xshmd.share.control_page import Row

log = structlog.get_logger()

HEARD_AGAIN_S: Final = 0.01
"""A guest that rings dom0 without end takes a look of the reconciler's this often."""


@dataclasses.dataclass(frozen=True, slots=True)
class Bell:
    """One port of a guest: the line of it that is bound in dom0 is a doorbell's other half."""

    generation: str
    region_id: str
    peer_id: int
    """Whose port it is."""
    rings: int
    """Which peer it rings; its own number: dom0."""


class Doorbells:
    """Has the event channels be as the records say.  Used by the reconciler alone."""

    def __init__(
        self,
        *,
        channels: EventChannels | None,
        xen: Hypervisor,
        ledger: Ledger,
        holders: Holders,
    ) -> None:
        self._channels, self._xen, self._ledger = channels, xen, ledger
        self.ports = GuestPorts(channels=channels, xen=xen, ledger=ledger)
        self._pages = ControlPages(xen=xen, ledger=ledger, holders=holders)
        self._lines: dict[Bell, int] = {}
        self._routes: dict[int, int | None] = {}
        """What each line rings; None: somebody here hears it."""
        self._offers: dict[tuple[str, str], dict[int, int]] = {}
        """Ports of a guest in a region that another peer alone may bind."""
        self._welcome: set[str] = set()
        """Generations of guests that are peers already, though they do not run yet."""
        self._rung_before = 0
        """How often lines had rung that are bound no more."""
        self._lost: set[Bell] = set()
        """Those whose guest has closed its port itself."""
        self._seen: tuple[object, ...] = ()

    def welcome(self, guest: Guest) -> None:
        """Have a guest that is about to run for the first time be a peer like the others."""
        self._welcome.add(guest.generation)
        for peer in guest.peers:
            self._offers[guest.generation, peer.region_id] = self.ports.offer(guest, peer)
        with contextlib.suppress(HypercallFailed, Conflict):
            self.settle()  # what cannot be now is reported, and done, after this piece of work

    # -- lines, and what they ring --------------------------------------------------------------

    async def run(self, on_ring: Callable[[str], Awaitable[None]]) -> None:
        """Pass rings on for ever.

        Args:
            on_ring: Awaited with each region of which a peer has rung dom0, once for all rings
                that come meanwhile.
        """
        if self._channels is None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._channels.run)
            while True:
                lines = await self._channels.heard()
                heard = {bell.region_id for bell, line in self._lines.items() if line in lines}
                for region_id in heard:
                    await on_ring(region_id)
                await trio.sleep(HEARD_AGAIN_S)

    def ring(self, region_id: str, peer_id: int) -> bool:
        """Ring a peer from dom0; whether it is there."""
        for bell, line in self._lines.items():
            if (bell.region_id, bell.peer_id, bell.rings) == (region_id, peer_id, peer_id):
                self._event_channels().notify(line)
                return True
        return False

    def settle(self) -> None:
        """Have lines and control pages be as the records say.

        Raises:
            XshmError: not all of it could be done; call again.
        """
        seen = (self._ledger.guests, self._ledger.regions, len(self._welcome))
        living = {guest.generation for guest in self._ledger.guests}
        self._welcome &= living
        self._offers = {key: ports for key, ports in self._offers.items() if key[0] in living}
        if self._channels is None or seen == self._seen:
            return
        wanted = {bell: (guest, port) for guest in self._here() for bell, port in _bells(guest)}
        for bell in self._lines.keys() - wanted.keys():
            self._unbind(bell)
        self._lost &= wanted.keys()
        failed: list[HypercallFailed] = []
        for bell, (guest, port) in wanted.items():
            if bell not in self._lines and bell not in self._lost:
                try:
                    self._bind(bell, guest, port)
                except HypercallFailed as error:  # one line's trouble is not the others'
                    failed.append(error)
        self._connect()
        belled = [region for region in self._ledger.regions if region.terms.doorbells]
        self._pages.forget_others(belled)
        for region in belled:
            if self._pages.tell(region, self._rows(region)):
                self.note_ready(region.region_id)
                for peer_id in range(region.terms.doorbells):
                    self.ring(region.region_id, peer_id)
        if failed:
            raise failed[0]
        self._seen = seen

    def _here(self) -> list[Guest]:
        return [guest for guest in self._ledger.guests if self._is_here(guest)]

    def _is_here(self, guest: Guest) -> bool:
        about_to_run = guest.state is GuestState.MAPPING and guest.generation in self._welcome
        return about_to_run or guest.state is GuestState.ATTACHED

    def _bind(self, bell: Bell, guest: Guest, port: int) -> None:
        channels = self._event_channels()
        try:
            identity.verify(self._xen, guest)
            line = channels.bind(guest.domid, port)
        except DomainGone:
            return  # the next look finds it gone
        except HypercallFailed as error:
            if error.errno != errno.EINVAL:
                raise
            self._lost.add(bell)
            log.warning(
                "doorbell lost", guest=guest.name, domid=guest.domid, region=bell.region_id,
                port=port, reason="the guest has closed its port",
            )  # fmt: skip
            return
        self._lines[bell] = line

    @property
    def rings(self) -> int:
        """How many rings of guests have come to dom0 since its start."""
        if self._channels is None:
            return 0
        return self._rung_before + sum(map(self._channels.rings, self._lines.values()))

    @property
    def held_up(self) -> int:
        """How often a guest rang faster than is passed on, and had to wait."""
        return 0 if self._channels is None else self._channels.held_up()

    def _unbind(self, bell: Bell) -> None:
        line = self._lines.pop(bell)
        self._rung_before += self._event_channels().rings(line)
        self._routes.pop(line, None)
        self._event_channels().unbind(line)

    def _connect(self) -> None:
        """Have every line ring the one of the peer it is for; those for dom0 are heard here."""
        channels = self._event_channels()
        ends = {
            (bell.region_id, bell.peer_id, bell.rings): line for bell, line in self._lines.items()
        }
        for bell, line in self._lines.items():
            other = ends.get((bell.region_id, bell.rings, bell.peer_id), NOWHERE_LINE)
            to = None if bell.rings == bell.peer_id else other
            if self._routes.get(line, NOWHERE_LINE) != to:
                self._routes[line] = to
                channels.pass_on(line, to)
                # It may have rung before it led anywhere: once too often is never wrong.
                if to:
                    channels.notify(to)

    def note_ready(self, region_id: str) -> None:
        """Have the guests' records say which of them say that they use a region."""
        region = self._ledger.region(region_id)
        if region is not None:
            here = [guest for guest in self._ledger.members(region_id) if self._is_here(guest)]
            self._pages.note_ready(region, here)

    def _rows(self, region: Region) -> dict[int, Row]:
        rows: dict[int, Row] = {}
        for guest in self._ledger.members(region.region_id):
            peer = guest.peer(region.region_id)
            if peer is None:
                continue
            if self._is_here(guest):
                rows[peer.peer_id] = Row(
                    state=PeerState.JOINED, domid=guest.domid, ports=peer.ports,
                    offers=self._offers.get((guest.generation, region.region_id), {}),
                )  # fmt: skip
            else:
                rows.setdefault(peer.peer_id, Row())
        return rows

    def _event_channels(self) -> EventChannels:
        if self._channels is None:
            raise AssertionError("doorbells without event channels were let by")
        return self._channels


def _bells(guest: Guest) -> list[tuple[Bell, int]]:
    return [
        (Bell(guest.generation, peer.region_id, peer.peer_id, rings), port)
        for peer in guest.peers
        if guest.peer(peer.region_id) is not None
        for rings, port in enumerate(peer.ports)
    ]
