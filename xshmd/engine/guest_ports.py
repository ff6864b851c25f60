# SPDX-License-Identifier: LGPL-2.1-or-later
"""The event channel ports of guests: planned, written down, and then made.

A guest has one port for each peer of a region and, at its own number, one for dom0.  All of them
lead to dom0; others may be there besides, which another guest alone may bind.  Only a guest can
close a port, so one that is needed no more is kept for the next region.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Final

from xshmd.engine import identity
from xshmd.engine.ledger import Ledger
from xshmd.errors import Conflict, DomainGone, HypercallFailed, Refused
from xshmd.model import DoorbellRoute, Guest, GuestState, Peer
from xshmd.ports import EventChannels, Hypervisor
from xshmd.share import control_page
from xshmd.share.peers import places
from xshmd.units import DOMID_0

MAX_PORT: Final = 1 << 17


class GuestPorts:
    """See the module.  Used by the reconciler alone."""

    def __init__(self, *, channels: EventChannels | None, xen: Hypervisor, ledger: Ledger) -> None:
        self._channels, self._xen, self._ledger = channels, xen, ledger

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

    def offer(self, guest: Guest, peer: Peer) -> dict[int, int]:
        """Make ports for others to bind, whose rings then need no dom0.

        Nobody writes them down: who does not find one in the control page rings by dom0.

        Args:
            guest: A guest that is about to run for the first time.
            peer: Its place in a region.

        Returns:
            The ports, by the number of the peer that may bind each.
        """
        offers: dict[int, int] = {}
        region = self._ledger.region(peer.region_id)
        if not peer.ports or region is None:
            return offers
        if region.terms.doorbell_route is not DoorbellRoute.AUTO:
            return offers
        with contextlib.suppress(HypercallFailed):
            for other in self._ledger.members(peer.region_id):
                its = other.peer(peer.region_id)
                if (
                    its is None
                    or other.generation == guest.generation
                    or other.state is not GuestState.ATTACHED
                ):
                    continue
                identity.verify(self._xen, other)
                identity.verify(self._xen, guest)
                port = self._event_channels().allocate(guest.domid, other.domid)
                if port <= control_page.MAX_OFFER:
                    offers[its.peer_id] = port
        return offers

    def _event_channels(self) -> EventChannels:
        if self._channels is None:
            raise AssertionError("doorbells without event channels were let by")
        return self._channels


def _no_port(guest: Guest) -> Conflict:
    return Conflict(
        f"guest {guest.name} has no event channel left for its doorbells",
        hint="say a larger max_event_channels in its configuration, or fewer doorbells",
        domid=guest.domid,
    )
