# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lists that are posted: which there are, which one a transfer takes, and what became of each.

Pure book-keeping, bounded whatever is asked: it awaits nothing and touches no memory.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator
from typing import Final

from xshmd.errors import Conflict, ListCancelled, NoSuchList, QuotaExceeded, XshmError
from xshmd.ranges import Part, check_apart, nr_bytes_of

MAX_LISTS_OF_ONE: Final = 16
"""Lists that one guest has posted in one region, at the most."""
MAX_LISTS: Final = 1024
"""Lists that are posted, at the most."""
MAX_OUTCOMES: Final = 1024
"""Lists that are done and of which one can still ask what became; older ones are forgotten."""


class Direction(enum.StrEnum):
    """Which way bytes go, as seen by whoever says it."""

    INPUT = "input"
    """They come to him."""
    OUTPUT = "output"
    """They go from him."""

    @property
    def opposite(self) -> Direction:
        return Direction.OUTPUT if self is Direction.INPUT else Direction.INPUT


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PostedList:
    """Bytes that somebody has put up to be filled, or to be fetched, once."""

    list_id: int
    region_id: str
    part: Part
    direction: Direction
    count_at: Part | None = None
    """Where the number of bytes is to be written when it is done."""

    @property
    def nr_bytes(self) -> int:
        return nr_bytes_of(self.part.ranges)


Outcome = int | XshmError
"""How many bytes were moved, or why none ever will be."""


class Lists:
    """All lists.  A list is posted, then perhaps taken by a transfer, then done; never again."""

    def __init__(self, on_done: Callable[[PostedList, Outcome], None]) -> None:
        self._posted: dict[int, PostedList] = {}
        """In the order they were posted in."""
        self._taken: dict[int, PostedList] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._last_id = 0
        self._on_done = on_done

    def __iter__(self) -> Iterator[PostedList]:
        yield from tuple(self._posted.values())

    def post(
        self, region_id: str, part: Part, direction: Direction, count_at: Part | None = None
    ) -> PostedList:
        """Add a list and return it with its id, which no other list ever has.

        Raises:
            QuotaExceeded: there are too many.
            Conflict: some of its bytes are in another list of the same guest.
        """
        own = [
            each
            for each in (*self._posted.values(), *self._taken.values())
            if (each.region_id, each.part.generation) == (region_id, part.generation)
        ]
        for have, most, whose in (
            (len(own), MAX_LISTS_OF_ONE, f"{_who(part)} in region {region_id}"),
            (len(self._posted) + len(self._taken), MAX_LISTS, "all guests"),
        ):
            if have >= most:
                raise QuotaExceeded(
                    f"{most} lists of {whose} are posted, which is the most there may be",
                    hint="transfer or unregister some",
                    limit=most,
                )
        counts = [each.count_at.ranges for each in own if each.count_at]
        new_count = [count_at.ranges] if count_at else []
        check_apart(part.ranges, *new_count, *(each.part.ranges for each in own), *counts)
        self._last_id += 1
        posted = PostedList(
            list_id=self._last_id, region_id=region_id, part=part, direction=direction,
            count_at=count_at,
        )  # fmt: skip
        self._posted[posted.list_id] = posted
        return posted

    def withdraw(self, list_id: int) -> None:
        """Take back a list that no transfer has taken.

        Raises:
            NoSuchList: there is none, or it is done.
            Conflict: a transfer is at work on it.
        """
        if list_id in self._taken:
            raise Conflict(
                f"a transfer is at work on list {list_id}", hint="await it: it is about to be done"
            )
        if list_id not in self._posted:
            raise self._no_such(list_id)
        self.cancel(list_id, "it was unregistered")

    def cancel(self, list_id: int, reason: str) -> None:
        """End a list that is posted or taken, without a transfer."""
        cancelled = ListCancelled(
            f"list {list_id} is cancelled: {reason}", hint="register another", list=list_id
        )
        self._end(list_id, cancelled)

    def take(
        self,
        region_id: str,
        generation: str | None,
        direction: Direction,
        list_id: int | None,
        *,
        not_of: str | None = None,
    ) -> PostedList:
        """Take a list out for a transfer: the oldest that fits, or this one.

        Args:
            region_id: The region.
            generation: Whose list; None: anybody's.
            direction: As whoever posted it said.
            list_id: This one and no other; None: the oldest.
            not_of: Whose list it is not to be.

        Raises:
            NoSuchList: there is none.
        """
        for posted in self._posted.values():
            whose = posted.part.generation
            if (
                (posted.region_id, posted.direction) == (region_id, direction)
                and generation in (None, whose)
                and whose != not_of
                and list_id in (None, posted.list_id)
            ):
                self._taken[posted.list_id] = self._posted.pop(posted.list_id)
                return posted
        if list_id is not None:
            raise self._no_such(list_id)
        raise NoSuchList(
            f"the peer has posted no list for {direction} in region {region_id}",
            hint="it registers one when it is ready; lists are used once",
        )

    def put_back(self, posted: PostedList) -> None:
        """Undo :meth:`take`, as if it had never been taken."""
        del self._taken[posted.list_id]
        self._posted[posted.list_id] = posted
        self._posted = dict(sorted(self._posted.items()))

    def finish(self, posted: PostedList, nr_bytes: int) -> None:
        """End a list that was taken: so many bytes were moved."""
        self._end(posted.list_id, nr_bytes)

    def outcome(self, list_id: int) -> Outcome | None:
        """Return what became of a list; None while it is neither done nor cancelled.

        Raises:
            NoSuchList: there never was one, or it is done for so long that it is forgotten.
        """
        if list_id in self._posted or list_id in self._taken:
            return None
        if list_id in self._outcomes:
            return self._outcomes[list_id]
        raise self._no_such(list_id)

    def _end(self, list_id: int, outcome: Outcome) -> None:
        posted = self._taken.pop(list_id, None) or self._posted.pop(list_id)
        self._outcomes[list_id] = outcome
        if len(self._outcomes) > MAX_OUTCOMES:
            del self._outcomes[next(iter(self._outcomes))]
        self._on_done(posted, outcome)

    def _no_such(self, list_id: int) -> NoSuchList:
        if 1 <= list_id <= self._last_id:
            return NoSuchList(
                f"list {list_id} is not posted (any more), or not there",
                hint="a list is used once: register another",
                list=list_id,
            )
        return NoSuchList(f"there never was a list {list_id}", list=list_id)


def _who(part: Part) -> str:
    return f"guest {part.guest}" if part.generation else "dom0"
