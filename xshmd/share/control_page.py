# SPDX-License-Identifier: LGPL-2.1-or-later
"""The last page of a region with doorbells: who is there, whom to ring how, who watches what.

It is the documented protocol between guests, xshmd and each other (docs/doorbells.md): the same
layout is in C in resources/guest/xshm_peer.h.  Every member can write all of it, so nothing that
is read from it is believed: the worst that it can say is wrong about the region itself.

Little-endian; offsets in bytes::

    0x000  magic, version, number of peers, count of changes to the table
    0x040  a row of 32 bytes a peer: state, domain id, lives, ready, hears offers
    0x240  a row of 64 bytes a peer: its ports, by the id of the peer each rings
    0x600  a row of 32 bytes a peer: ports of its own that others may bind, by the id of that peer
    0x800  a row of 128 bytes a peer, the last of them dom0's: 8 watches of an address and a counter
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator, Mapping
from typing import Final

from xshmd.model import MAX_DOORBELLS, PeerState
from xshmd.units import PAGE_SIZE, is_within

MAGIC: Final = 0x50485358  # "XSHP"
VERSION: Final = 1
HEADER: Final = struct.Struct("<IHHI")
CHANGES_AT: Final = 8
ROWS_AT: Final = 0x40
ROW_BYTES: Final = 32
DOM0S_WORDS: Final = struct.Struct("<III")
PORTS_AT: Final = 0x240
PORTS: Final = struct.Struct("<16I")
OFFERS_AT: Final = 0x600
OFFERS: Final = struct.Struct("<16H")
MAX_OFFER: Final = 0xFFFF
WATCHES_AT: Final = 0x800
WATCH: Final = struct.Struct("<QQ")
WATCHES_PER_PEER: Final = 8
DOM0: Final = MAX_DOORBELLS
"""dom0's row among the watches; it is no peer, and has no other."""
READY_AT: Final = 12
"""Where in a peer's row are its own words: whether it is ready, and hears the ports it offers."""
OWN_BYTES: Final = 8
NO_COUNTER: Final = 0
"""In a watch, in place of where its counter is: wake at each trigger."""

_STATES: Final = {
    PeerState.ABSENT: 0, PeerState.JOINED: 1, PeerState.LEFT: 2,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What dom0 says of one peer."""

    state: PeerState = PeerState.ABSENT
    domid: int = 0
    ports: tuple[int, ...] = ()
    offers: Mapping[int, int] = dataclasses.field(default_factory=dict, compare=False)
    """Ports made for other peers alone to bind when this one joined; said then and never again."""


@dataclasses.dataclass(frozen=True, slots=True)
class Watch:
    """One peer's wish to be woken."""

    peer_id: int
    """Whose it is; DOM0 for dom0."""
    address: int
    """Offset of a byte of the region."""
    counter: int
    """Offset of a 32-bit word that a trigger decrements: it wakes when that becomes 0; or
    NO_COUNTER."""


def row_at(peer_id: int) -> int:
    """Return where in the page the row of a peer is."""
    return ROWS_AT + peer_id * ROW_BYTES


def offers_at(peer_id: int) -> int:
    """Return where in the page what a peer offers others to bind is."""
    return OFFERS_AT + peer_id * OFFERS.size


def table(rows: Mapping[int, Row], nr_peers: int, before: bytes) -> list[tuple[int, bytes]]:
    """Return what is to be written into a control page, and where; what makes it count comes last.

    Args:
        rows: The peers there are, by id.
        nr_peers: How many peers have doorbells.
        before: The page as it is.  Whoever wrote it: it says which peers were there, and how often
            each has joined, and nobody but the peers themselves relies on that.
    """
    pieces: list[tuple[int, bytes]] = []
    known = HEADER.unpack_from(before)[:2] == (MAGIC, VERSION)
    for peer_id in range(nr_peers):
        row = rows.get(peer_id, Row())
        old_state, old_domid, lives = DOM0S_WORDS.unpack_from(before, row_at(peer_id))
        state, domid = _STATES[row.state], row.domid
        if peer_id not in rows and known and old_state:
            state, domid = _STATES[PeerState.LEFT], 0
        if (state, domid) != (old_state, old_domid):
            lives = (lives + (row.state is PeerState.JOINED)) & 0xFFFFFFFF
            # Only then: while a peer is there, those words and its watches are its own.
            pieces.append((row_at(peer_id) + READY_AT, bytes(OWN_BYTES)))
            pieces.append((watch_at(peer_id, 0), bytes(WATCHES_PER_PEER * WATCH.size)))
            offers = [row.offers.get(to, 0) for to in range(OFFERS.size // 2)]
            pieces.append((offers_at(peer_id), OFFERS.pack(*offers)))
        ports = PORTS.pack(*row.ports, *(0,) * (PORTS.size // 4 - len(row.ports)))
        pieces.append((PORTS_AT + peer_id * PORTS.size, ports))
        pieces.append((row_at(peer_id), DOM0S_WORDS.pack(state, domid, lives)))
    (changes,) = struct.unpack_from("<I", before, CHANGES_AT)
    pieces.append((0, HEADER.pack(MAGIC, VERSION, nr_peers, (changes + 1) & 0xFFFFFFFF)))
    return pieces


def is_ready(page: bytes, peer_id: int) -> bool:
    """Return whether a peer says of itself that it uses the region."""
    (word,) = struct.unpack_from("<I", page, row_at(peer_id) + READY_AT)
    return bool(word)


def watch_at(peer_id: int, slot: int) -> int:
    """Return where in the page a watch is."""
    return WATCHES_AT + (peer_id * WATCHES_PER_PEER + slot) * WATCH.size


def encode_watch(address: int | None, counter: int = NO_COUNTER) -> bytes:
    """Return a watch as it stands in the page; of no address, the empty one."""
    return WATCH.pack(0 if address is None else address + 1, counter)


def watches(page: bytes, size_bytes: int) -> Iterator[Watch]:
    """Yield every watch of a control page that makes sense.

    Args:
        page: The page.
        size_bytes: Size of the region; what a watch says beyond it is no watch.
    """
    counted_bytes = size_bytes - PAGE_SIZE
    for peer_id in range(MAX_DOORBELLS + 1):
        for slot in range(WATCHES_PER_PEER):
            address, counter = WATCH.unpack_from(page, watch_at(peer_id, slot))
            # A counter lies outside the control page: a trigger never changes that.
            fits = counter == NO_COUNTER or (
                counter % 4 == 0 and is_within(counter, 4, counted_bytes)
            )
            if 0 < address <= size_bytes and fits:
                yield Watch(peer_id, address - 1, counter)
