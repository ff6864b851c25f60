# SPDX-License-Identifier: LGPL-2.1-or-later
"""Peers that can wake each other: their event channels, and who hears whom.

A guest has one port for each peer of a region and, at its own number, one for dom0.  All of them
lead to dom0, which passes rings on: that works under every XSM policy, and a guest needs to bind
nothing.  What is there follows from the guests' records alone, so a new life of the daemon binds
the same ports again; each then rings once, for what may have been lost meanwhile
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
from xshmd.engine.holders import Holders
from xshmd.engine.ledger import Ledger
from xshmd.errors import Conflict, DomainGone, HypercallFailed, Refused
from xshmd.model import DoorbellRoute, Guest, GuestState, Peer, PeerState, Region
from xshmd.ports import NOWHERE_LINE, EventChannels, Hypervisor
from xshmd.share import control_page
from xshmd.share.control_page import Row
from xshmd.share.peers import places
from xshmd.units import DOMID_0, PAGE_SIZE, Gfn

log = structlog.get_logger()

MAX_PORT: Final = 1 << 17
NO_WATCHES: Final = bytes(control_page.WATCHES_PER_PEER * control_page.WATCH.size)
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
        self._channels, self._xen = channels, xen
        self._ledger, self._holders = ledger, holders
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
        self._told: dict[tuple[str, int], dict[int, Row]] = {}
        """What control pages say, by their holder and frame in it: no frame is used twice."""
        self._seen: tuple[object, ...] = ()

    # -- a guest's ports ------------------------------------------------------------------------

    def plan(self, guest: Guest) -> Guest:
        """Return a guest that has never run with its places, and the ports it is about to have.

        They are the lowest free ones.  To be written down before :meth:`provide` makes them.

        Raises:
            Refused, Conflict: it cannot have them.
        """
        guest = dataclasses.replace(guest, peers=self._places(guest))
        port, peers = 0, []
        for peer in guest.peers:
            ports = list(peer.ports)
            while len(ports) < self._nr_doorbells(peer.region_id):
                port = self._next_free(guest, port)
                ports.append(port)
            peers.append(dataclasses.replace(peer, ports=tuple(ports)))
        return dataclasses.replace(guest, peers=tuple(peers))

    def _places(self, guest: Guest) -> tuple[Peer, ...]:
        found = places(guest, self._ledger.guests, self._ledger.regions)
        if self._channels is None and any(self._nr_doorbells(one.region_id) for one in found):
            raise Refused(
                f"guest {guest.name} has a region with doorbells, and xshmd has no event channels",
                hint="load the module xen-evtchn in dom0 and start xshmd again",
                domid=guest.domid,
            )
        return found

    def _nr_doorbells(self, region_id: str) -> int:
        region = self._ledger.region(region_id)
        return region.terms.doorbells if region else 0

    def _next_free(self, guest: Guest, after: int) -> int:
        identity.verify(self._xen, guest)
        channels = self._event_channels()
        for port in range(after + 1, MAX_PORT):
            if channels.status(guest.domid, port) is None:
                return port
        raise _no_port(guest)

    def provide(self, guest: Guest) -> Guest:
        """Make the ports that were planned for a guest which has never run; may be done again.

        Returns:
            The guest, with the ports it really got where somebody was quicker.
        """
        peers = []
        for peer in guest.peers:
            ports = [
                port if self._is_there(guest, port) else self._allocate(guest)
                for port in peer.ports
            ]
            peers.append(dataclasses.replace(peer, ports=tuple(ports)))
        return dataclasses.replace(guest, peers=tuple(peers))

    def provide_running(self, guest: Guest) -> Guest:
        """Return a guest that runs with its places, and make the ports it lacks."""
        guest = dataclasses.replace(guest, peers=self._places(guest))
        peers = []
        for peer in guest.peers:
            ports = list(peer.ports)
            while len(ports) < self._nr_doorbells(peer.region_id):
                ports.append(self._allocate(guest))
            peers.append(dataclasses.replace(peer, ports=tuple(ports)))
        return dataclasses.replace(guest, peers=tuple(peers))

    def _is_there(self, guest: Guest, port: int) -> bool:
        found = self._event_channels().status(guest.domid, port)
        return found is not None and found.remote == DOMID_0 and not found.remote_port

    def _allocate(self, guest: Guest) -> int:
        identity.verify(self._xen, guest)
        try:
            return self._event_channels().allocate(guest.domid, DOMID_0)
        except DomainGone:
            raise
        except HypercallFailed as error:
            raise _no_port(guest) from error

    def _event_channels(self) -> EventChannels:
        if self._channels is None:
            raise AssertionError("doorbells without event channels were let by")
        return self._channels

    def welcome(self, guest: Guest) -> None:
        """Have a guest that is about to run for the first time be a peer like the others."""
        self._welcome.add(guest.generation)
        for peer in guest.peers:
            self._offer(guest, peer)
        with contextlib.suppress(HypercallFailed, Conflict):
            self.settle()  # what cannot be now is reported, and done, after this piece of work

    def _offer(self, guest: Guest, peer: Peer) -> None:
        """Make ports for others to bind, whose rings then need no dom0.

        Nobody writes them down: who does not find one in the control page rings by dom0.
        """
        region = self._ledger.region(peer.region_id)
        if not peer.ports or region is None:
            return
        if region.terms.doorbell_route is not DoorbellRoute.AUTO:
            return
        offers: dict[int, int] = {}
        with contextlib.suppress(HypercallFailed):
            for other in self._ledger.members(peer.region_id):
                its = other.peer(peer.region_id)
                if its is None or other is guest or other.state is not GuestState.ATTACHED:
                    continue
                identity.verify(self._xen, other)
                identity.verify(self._xen, guest)
                port = self._event_channels().allocate(guest.domid, other.domid)
                if port <= control_page.MAX_OFFER:
                    offers[its.peer_id] = port
        self._offers[guest.generation, peer.region_id] = offers

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
        places = {(region.holder_uuid, _control_gfn(region)) for region in belled}
        self._told = {where: rows for where, rows in self._told.items() if where in places}
        for region in belled:
            self._tell(region)
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

    # -- the control page -----------------------------------------------------------------------

    def _tell(self, region: Region) -> None:
        """Write into the control page who is there, and ring them all if that has changed."""
        holder = self._ledger.holder(region.holder_uuid)
        if not region.ready or holder is None:
            return
        rows, where = self._rows(region), (holder.uuid, _control_gfn(region))
        if self._told.get(where) == rows:
            return
        self._holders.verify(holder)
        page = self._xen.map_pages(holder.domid, _control_gfn(region), 1, writable=True)
        try:
            for at, data in control_page.table(
                rows, region.terms.doorbells, page.read(0, PAGE_SIZE)
            ):
                page.write(at, data)
            if where not in self._told:  # in this life nobody in dom0 watches yet
                page.write(control_page.watch_at(control_page.DOM0, 0), NO_WATCHES)
        finally:
            page.close()
        self._told[where] = rows
        self.note_ready(region.region_id)
        for bell, line in self._lines.items():
            if bell.region_id == region.region_id and bell.rings == bell.peer_id:
                self._event_channels().notify(line)

    def note_ready(self, region_id: str) -> None:
        """Have the guests' records say which of them say that they use a region."""
        region = self._ledger.region(region_id)
        holder = self._ledger.holder(region.holder_uuid) if region else None
        if region is None or holder is None or not region.ready:
            return
        self._holders.verify(holder)
        page = self._xen.map_pages(holder.domid, _control_gfn(region), 1, writable=False)
        try:
            data = page.read(0, PAGE_SIZE)
        finally:
            page.close()
        for guest in self._ledger.members(region_id):
            peers = tuple(
                dataclasses.replace(peer, is_ready=control_page.is_ready(data, peer.peer_id))
                if peer.region_id == region_id and self._is_here(guest)
                else peer
                for peer in guest.peers
            )
            if peers != guest.peers:
                self._ledger.know(dataclasses.replace(guest, peers=peers))

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


def _bells(guest: Guest) -> list[tuple[Bell, int]]:
    return [
        (Bell(guest.generation, peer.region_id, peer.peer_id, rings), port)
        for peer in guest.peers
        if guest.peer(peer.region_id) is not None
        for rings, port in enumerate(peer.ports)
    ]


def _control_gfn(region: Region) -> Gfn:
    return Gfn(region.holder_first_gfn + region.nr_frames - 1)


def _no_port(guest: Guest) -> Conflict:
    return Conflict(
        f"guest {guest.name} has no event channel left for its doorbells",
        hint="say a larger max_event_channels in its configuration, or fewer doorbells",
        domid=guest.domid,
    )
