# SPDX-License-Identifier: LGPL-2.1-or-later
"""The static event channels of a dom0less device tree: read and checked, so as to be reported.

A channel is two nodes that name each other (``xen/arch/arm/static-evtchn.c``); only their domains
can use it, and only in a system that Xen built from the tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from xshmd.config.devicetree_blob import Node
from xshmd.config.findings import config_error
from xshmd.declarations import EventChannel
from xshmd.errors import ConfigError
from xshmd.model import Place

KEY: Final = "xen,evtchn"
PORT_LIMIT: Final = 1 << 17
"""EVTCHN_FIFO_NR_CHANNELS; port 0 is never used (evtchn_init in xen/common/event_channel.c)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """One node: one end of a channel, in one domain."""

    domain: str
    phandle: int
    """0: nothing can refer to it."""
    port: int
    peer_phandle: int
    place: Place


def end_of(node: Node, domain: str, place: Place, errors: list[ConfigError]) -> End | None:
    """Read one node; return None if it is wrong, as ``errors`` then say."""
    cells = node.cells(KEY)
    if cells is None or len(cells) != 2:
        errors.append(
            config_error(
                place,
                f"'{KEY}' is not a port and a reference to the other end",
                hint=f"one node is one end of one channel: {KEY} = <0xa &other_end>",
                rule="evtchn-cells",
            )
        )
        return None
    port, peer_phandle = cells
    if not 0 < port < PORT_LIMIT:
        errors.append(
            config_error(
                place,
                f"event channel port {port:#x} is not possible",
                hint=f"choose one from 1 to {PORT_LIMIT - 1:#x}",
                rule="evtchn-port",
            )
        )
        return None
    phandle = node.cells("phandle") or node.cells("linux,phandle") or (0,)
    return End(domain=domain, phandle=phandle[0], port=port, peer_phandle=peer_phandle, place=place)


def channels(ends: Sequence[End], errors: list[ConfigError]) -> tuple[EventChannel, ...]:
    """Return both ends of every channel, each as its domain sees it, in the tree's order."""
    by_phandle = {end.phandle: end for end in ends if end.phandle}
    used: dict[tuple[str, int], End] = {}
    found = []
    for end in ends:
        before = used.setdefault((end.domain, end.port), end)
        if before is not end:
            errors.append(
                config_error(
                    end.place,
                    f"port {end.port:#x} of '{end.domain}' is already in {before.place.key}",
                    hint="give each channel of a domain its own port",
                    rule="evtchn-port-twice",
                )
            )
        peer = by_phandle.get(end.peer_phandle)
        if peer is None or peer is end or by_phandle.get(peer.peer_phandle) is not end:
            errors.append(_not_mutual(end, peer))
            continue
        found.append(
            EventChannel(
                guest=end.domain,
                local_port=end.port,
                peer_guest=peer.domain,
                peer_port=peer.port,
                place=end.place,
            )
        )
    return tuple(found)


def _not_mutual(end: End, peer: End | None) -> ConfigError:
    if peer is None:
        what = "its other end is no event channel node of any domain"
    elif peer is end:
        what = "it names itself as its other end"
    else:
        what = f"its other end {peer.place.key} does not name it in return"
    return config_error(
        end.place,
        what,
        hint=f"the two nodes of a channel refer to each other by {KEY}",
        rule="evtchn-ends",
    )
