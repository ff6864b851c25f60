# SPDX-License-Identifier: LGPL-2.1-or-later
"""How much of the daemon one client may take, so that one gone wrong is no trouble to the others.

Only root's processes can connect, and most of them are scripts: what is shared out is shared among
processes.  A process that wants more than its share waits for itself, never others for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Final

import structlog
import trio

from xshmd.varlink.peer import Peer

_FREE_WEIGHT: Final = 1024
_PAUSE_PER_WEIGHT_S: Final = 1e-4
"""Some hundred times what reading a message of that weight takes."""
_COMPLAINTS: Final = 10
_COMPLAINTS_IN_S: Final = 10.0

log = structlog.get_logger()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client, and all of them together, may take of the daemon."""

    allowed_uids: frozenset[int] = frozenset({0})
    """Whose calls are answered; others get PermissionDenied."""
    max_connections: int = 64
    max_connections_per_uid: int = 48
    max_connections_per_process: int = 16
    max_large_calls: int = 2
    """How many calls too long for most methods may be under way, one for each process at most."""
    idle_timeout_s: float = 300.0
    """How long a connection may be silent between calls."""
    request_timeout_s: float = 10.0
    """How long a call may take from its first byte to its NUL."""
    send_timeout_s: float = 10.0
    """How long a client may take to read a reply."""


@dataclasses.dataclass(slots=True, eq=False)
class _Process:
    """What the connections of one process have to share."""

    nr_seats: int = 0
    turn: trio.Lock = dataclasses.field(default_factory=trio.Lock)
    large: trio.Lock = dataclasses.field(default_factory=trio.Lock)
    pauses_until: float = 0.0


class Seat:
    """A connection that was let in."""

    def __init__(
        self, peer: Peer, process: _Process, large: trio.CapacityLimiter, vacate: Callable[[], None]
    ) -> None:
        self.peer = peer
        self.vacate = vacate
        self.silent_since: float | None = trio.current_time()
        """When its last call was answered, or it came; None while a call is being answered."""
        self.is_large = False
        """Whether it has the room for a large call."""
        self._process, self._large = process, large

    def begin(self) -> None:
        """Keep the seat, whoever comes, as a call is being answered."""
        self.silent_since = None

    def end(self) -> None:
        """Be silent again, and give back the room that a large call took."""
        self.silent_since = trio.current_time()
        if self.is_large:
            self.is_large = False
            self._large.release()
            self._process.large.release()

    async def turn(self, weight: int) -> None:
        """Wait until it is this connection's turn to have a message read, which then is at once.

        However many connections a process has, one of them has its turn in each round of the loop.

        Args:
            weight: Of the message; after a heavy one the process has to pause.
        """
        process = self._process
        if process.nr_seats > 1 or process.pauses_until > trio.current_time():
            async with process.turn:  # handed on in order, once in a round
                await trio.sleep_until(process.pauses_until)
        process.pauses_until = _pause(weight)

    async def make_room(self) -> None:
        """Wait until there is room to receive and answer a large call; it has it till the end."""
        await self._process.large.acquire()
        try:
            await self._large.acquire()
        except BaseException:
            self._process.large.release()
            raise
        self.is_large = True


def _pause(weight: int) -> float:
    return trio.current_time() + max(0, weight - _FREE_WEIGHT) * _PAUSE_PER_WEIGHT_S


class Admission:
    """Lets connections in."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._seats: list[Seat] = []
        self._processes: dict[Peer, _Process] = {}
        self._large = trio.CapacityLimiter(limits.max_large_calls)

    @contextlib.contextmanager
    def seat(self, peer: Peer, vacate: Callable[[], None]) -> Iterator[Seat | None]:
        """Give a connection a seat for the body; None if there is none.

        Where all are taken it gets that of the connection that has been silent longest: of the same
        process, if that has all it may have, else of the same user, else of anybody.

        Args:
            peer: Who connected.
            vacate: Ends the connection, should its seat go to another.
        """
        if not self._make_room(peer):
            yield None
            return
        process = self._processes.setdefault(peer, _Process())
        seat = Seat(peer, process, self._large, vacate)
        process.nr_seats += 1
        self._seats.append(seat)
        try:
            yield seat
        finally:
            if seat in self._seats:
                self._seats.remove(seat)
            process.nr_seats -= 1
            self._forget()

    def _forget(self) -> None:
        # One that has to pause is not forgiven for having left.
        now = trio.current_time()
        for peer, process in tuple(self._processes.items()):
            if not process.nr_seats and process.pauses_until <= now:
                del self._processes[peer]

    def _make_room(self, peer: Peer) -> bool:
        limits, seats = self._limits, self._seats
        for rivals, most in (
            ([one for one in seats if one.peer == peer], limits.max_connections_per_process),
            ([one for one in seats if one.peer.uid == peer.uid], limits.max_connections_per_uid),
            (seats, limits.max_connections),
        ):
            if len(rivals) < most:
                continue
            silent = [(one.silent_since, one) for one in rivals if one.silent_since is not None]
            if not silent:
                return False
            _, longest = min(silent, key=lambda pair: pair[0])
            seats.remove(longest)
            longest.vacate()
        return True


class Complaints:
    """Warnings of what clients do wrong: the first few, then how many more there were.

    journald drops what a service says too often, whatever it is.
    """

    def __init__(self) -> None:
        self._since = -_COMPLAINTS_IN_S
        self._said = self._unsaid = 0

    def warn(self, event: str, **fields: object) -> None:
        """Log a warning, unless there have been too many just now."""
        now = trio.current_time()
        if now - self._since >= _COMPLAINTS_IN_S:
            if self._unsaid:
                log.warning("more clients did wrong than was said", count=self._unsaid)
            self._since, self._said, self._unsaid = now, 0, 0
        if self._said < _COMPLAINTS:
            self._said += 1
            log.warning(event, **fields)
        else:
            self._unsaid += 1
