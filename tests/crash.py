# SPDX-License-Identifier: LGPL-2.1-or-later
"""Power cuts of the daemon at every step: records what a scenario does, and replays it with a cut.

A *boundary* is one effect on the outside: a hypercall that changes something, a xenstore message
that does, a lock.  A cut is before one, after it, or (where a call has many parts) in its middle.
What is cut does nothing more at all, however much of its code still runs while it unwinds.
"""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar, cast

import trio
from fakes import hypervisor, keeper
from fakes.world import Daemon, Life, World, world
from trio.testing import MockClock

from xshmd.changes import Change
from xshmd.errors import Conflict, NoSuchRegion, StoreLost, XshmError
from xshmd.machine import Arch
from xshmd.model import Guest
from xshmd.ports import CreationLock, HeldLock, Hypervisor, Keeper, Store
from xshmd.units import DomId

T = TypeVar("T")
SWEEP_STEP: Final = int(os.environ.get("XSHMD_SWEEP_STEP", "7"))
"""Every how manieth cut is played; XSHMD_SWEEP_STEP=1 plays all, which takes some minutes.

A prime: boundaries have two or three cuts each, of which it is to be another one each time."""
RESTART_S: Final = 0.1
"""How soon systemd starts the daemon again."""


class When(enum.Enum):
    BEFORE = "before"
    DURING = "during"
    AFTER = "after"


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """Where a life ends: at its n-th boundary, from 1."""

    ordinal: int
    when: When


@dataclasses.dataclass(frozen=True, slots=True)
class Boundary:
    """An effect that was seen in a recording."""

    ordinal: int
    what: str
    divisible: bool


class PowerCut(BaseException):
    """The daemon is no more."""


class Guard:
    """Counts the boundaries of one life, and ends it at one of them."""

    def __init__(self, cut: Cut | None, seen: list[Boundary]) -> None:
        self._cut, self._seen = cut, seen
        self.dead = False

    def check(self) -> None:
        if self.dead:
            raise PowerCut

    def _is_here(self, ordinal: int, when: When) -> bool:
        return self._cut is not None and (self._cut.ordinal, self._cut.when) == (ordinal, when)

    def enter(self, what: str, *, divisible: bool = False) -> int:
        """Begin an effect; returns its ordinal."""
        self.check()
        ordinal = len(self._seen) + 1
        self._seen.append(Boundary(ordinal, what, divisible))
        if self._is_here(ordinal, When.BEFORE):
            self.dead = True
            raise PowerCut
        return ordinal

    def is_halved(self, ordinal: int) -> bool:
        return self._is_here(ordinal, When.DURING)

    def leave(self, ordinal: int) -> None:
        """End an effect, which has been done (by half, if it is to be)."""
        if self._is_here(ordinal, When.AFTER) or self._is_here(ordinal, When.DURING):
            self.dead = True
        self.check()


READ_ONLY: Final = hypervisor.READ_ONLY | keeper.READ_ONLY


class CutXen:
    """A Hypervisor or a Keeper for one life."""

    def __init__(self, xen: Hypervisor | Keeper, guard: Guard) -> None:
        self._xen, self._guard = xen, guard

    def __getattr__(self, kind: str) -> Any:
        method = getattr(self._xen, kind)

        def call(*arguments: Any, **options: Any) -> Any:
            if kind in READ_ONLY:
                self._guard.check()
                return method(*arguments, **options)
            divisible = kind in HALVES
            what = f"{kind}({', '.join(map(str, arguments))})"
            ordinal = self._guard.enter(what, divisible=divisible)
            if self._guard.is_halved(ordinal):
                arguments = HALVES[kind](*arguments)
            result = method(*arguments, **options)
            self._guard.leave(ordinal)
            return result

        return call


def _half_a_range(domid: int, first_gfn: int, nr_frames: int) -> tuple[int, ...]:
    return (domid, first_gfn, nr_frames // 2)


def _half_a_map(guest: int, first: int, holder: int, from_gfn: int, nr: int) -> tuple[int, ...]:
    return (guest, first, holder, from_gfn, nr // 2)


def _half_the_grants(holder: int, first_ref: int, nr: int, *what: int) -> tuple[int, ...]:
    return (holder, first_ref, nr // 2, *what)


HALVES: Final[dict[str, Callable[..., tuple[int, ...]]]] = {
    "populate": _half_a_range,
    "depopulate": _half_a_range,
    "zero": _half_a_range,
    "unmap": _half_a_range,
    "map_foreign": _half_a_map,
    "write_grants": _half_the_grants,
    "end_grants": _half_the_grants,
}


class CutStore:
    """A Store for one life.  ``write_many`` is not atomic, so each of its parts is a boundary."""

    def __init__(self, store: Store, guard: Guard) -> None:
        self._store, self._guard = store, guard

    @property
    def messages_sent(self) -> int:
        return self._store.messages_sent

    def __getattr__(self, kind: str) -> Any:
        method = getattr(self._store, kind)
        if kind == "watch":
            return method

        async def call(*arguments: Any) -> Any:
            if kind in ("read", "directory", "read_many", "is_introduced"):
                self._guard.check()
                result = await method(*arguments)
                self._guard.check()
                return result
            ordinal = self._guard.enter(f"{kind} {arguments[0]}")
            result = await method(*arguments)
            self._guard.leave(ordinal)
            return result

        return call

    async def write_many(self, items: Sequence[tuple[str, str]]) -> None:
        for path, value in items:
            ordinal = self._guard.enter(f"write {path}")
            await self._store.write(path, value)
            self._guard.leave(ordinal)


class CutLocks:
    """A CreationLock for one life."""

    def __init__(self, locks: CreationLock, guard: Guard) -> None:
        self._locks, self._guard = locks, guard

    def try_hold(self, domid: DomId, uuid: str) -> HeldLock | None:
        ordinal = self._guard.enter(f"lock {domid}")
        held = self._locks.try_hold(domid, uuid)
        self._guard.leave(ordinal)
        return held and _CutHeld(held, self._guard)

    def is_finished(self, domid: DomId, uuid: str) -> bool:
        self._guard.check()
        return self._locks.is_finished(domid, uuid)


class _CutHeld:
    def __init__(self, held: HeldLock, guard: Guard) -> None:
        self._held, self._guard = held, guard

    def release(self) -> None:
        ordinal = self._guard.enter("unlock")
        self._held.release()
        self._guard.leave(ordinal)


def is_power_cut(escaped: BaseException) -> bool:
    """Return whether this is nothing but power cuts, in however many groups."""
    if isinstance(escaped, BaseExceptionGroup):
        return all(is_power_cut(inner) for inner in escaped.exceptions)
    return isinstance(escaped, (PowerCut, trio.Cancelled))


class Lives:
    """The daemon, started again whenever it is cut off, as systemd does."""

    def __init__(self, host: World, cuts: Sequence[Cut], options: dict[str, Any]) -> None:
        self._host, self._cuts, self._options = host, list(cuts), options
        self.seen: list[list[Boundary]] = []
        """What each life did."""
        self.daemon: Daemon | None = None
        self._stopped = False

    async def run(self) -> None:
        while not self._stopped:
            seen: list[Boundary] = []
            guard = self._guard(seen)
            self.seen.append(seen)

            def wrap(life: Life, guard: Guard = guard) -> Life:
                return Life(
                    xen=cast(Hypervisor, CutXen(life.xen, guard)),
                    keeper=cast(Keeper, CutXen(life.keeper, guard)),
                    store=cast(Store, CutStore(life.store, guard)),
                    locks=CutLocks(life.locks, guard),
                )

            self.daemon = await self._host.start(wrap=wrap, wait=False, **self._options)
            await self.daemon.ended.wait()
            guard.dead = True
            await trio.sleep(RESTART_S)

    def _guard(self, seen: list[Boundary]) -> Guard:
        """Return what ends the next life."""
        return Guard(self._cuts.pop(0) if self._cuts else None, seen)

    async def apply(self, *changes: Change) -> None:
        """Have these changes made, asked for again whenever the daemon is cut off in them.

        After each cut they must have been made as a whole, or not at all: then the next attempt
        succeeds, or finds that there is nothing to do.
        """
        while True:
            await self._host.until(
                lambda: (
                    self.daemon is not None
                    and self.daemon.ready.is_set()
                    and not self.daemon.ended.is_set()
                ),
                "a daemon to ask",
            )
            daemon = self.daemon
            assert daemon is not None
            outcome: list[XshmError | None] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_at_the_end_of, daemon, nursery.cancel_scope)
                try:
                    await daemon.engine.apply(changes)
                    outcome.append(None)
                except XshmError as error:
                    outcome.append(error)
                nursery.cancel_scope.cancel()
            if not outcome or isinstance(outcome[0], StoreLost):
                continue  # it was cut off
            refusal = outcome[0]
            if refusal is None or (self.was_cut and isinstance(refusal, (Conflict, NoSuchRegion))):
                return
            raise refusal

    def guests(self) -> tuple[Guest, ...] | None:
        """The guests that the daemon knows; None while there is none."""
        daemon = self.daemon
        if daemon is None or not daemon.ready.is_set() or daemon.ended.is_set():
            return None
        return daemon.engine.snapshot().guests

    @property
    def was_cut(self) -> bool:
        """Whether any life has ended yet."""
        return len(self.seen) > 1

    async def settled(self) -> Daemon:
        """Return the daemon once it is up and will not be cut any more."""
        await self._host.until(
            lambda: (
                not self._cuts
                and self.daemon is not None
                and self.daemon.ready.is_set()
                and not self.daemon.ended.is_set()
            ),
            "a daemon that lives",
        )
        assert self.daemon is not None
        return self.daemon

    async def stop(self) -> None:
        self._stopped = True
        if self.daemon is not None:
            await self.daemon.kill()


async def _cancel_at_the_end_of(daemon: Daemon, scope: trio.CancelScope) -> None:
    await daemon.ended.wait()
    scope.cancel()


Scenario = Callable[[World, Lives], Awaitable[None]]


@asynccontextmanager
async def lives(host: World, cuts: Sequence[Cut] = (), **options: Any) -> AsyncIterator[Lives]:
    """Run the daemon again and again for as long as the body runs."""
    host.tolerate = is_power_cut
    running = Lives(host, cuts, options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(running.run)
        await host.until(lambda: running.daemon is not None)
        yield running
        await running.stop()


def play(
    scenario: Scenario, cuts: Sequence[Cut] = (), *, arch: Arch = Arch.X86_64, **options: Any
) -> list[list[Boundary]]:
    """Play a scenario with these cuts, one for each life; return what each life did.

    Raises:
        AssertionError: an invariant does not hold at the end.
    """
    seen: list[list[Boundary]] = []

    async def main() -> None:
        async with world(arch) as host, lives(host, cuts, **options) as running:
            await scenario(host, running)
            await running.settled()
            await host.check_clean()
            seen.extend(running.seen)

    trio.run(main, clock=MockClock(autojump_threshold=0))
    return seen


def cuts_of(boundaries: Sequence[Boundary]) -> list[Cut]:
    """Return every place at which this life can be cut off."""
    return [
        Cut(boundary.ordinal, when)
        for boundary in boundaries
        for when in When
        if when is not When.DURING or boundary.divisible
    ]


def sampled(places: Sequence[T], step: int = SWEEP_STEP) -> Sequence[T]:
    """Return every step-th of these, the last one in any case."""
    return [*places[:-1:step], *places[-1:]]


def sweep(
    scenario: Scenario, *, arch: Arch = Arch.X86_64, step: int = SWEEP_STEP, **options: Any
) -> tuple[int, list[str]]:
    """Play a scenario once for every cut; return how many there were, and what failed."""
    (boundaries,) = play(scenario, arch=arch, **options)
    cuts = sampled(cuts_of(boundaries), step)
    failed = []
    for cut in cuts:
        try:
            play(scenario, [cut], arch=arch, **options)
        except Exception as error:
            what = boundaries[cut.ordinal - 1].what
            failed.append(f"{cut.when.value} {cut.ordinal} {what}: {_words(error)}")
    return len(cuts), failed


def _not_all_alike(boundaries: Sequence[Boundary]) -> list[Boundary]:
    """Leave out most of those that repeat: recovery counts pauses by taking all there are."""
    counts: dict[str, int] = {}
    kept = []
    for boundary in boundaries:
        counts[boundary.what] = counts.get(boundary.what, 0) + 1
        if counts[boundary.what] <= 2:
            kept.append(boundary)
    return kept


def sweep_twice(
    scenario: Scenario, *, arch: Arch = Arch.X86_64, step: int = 4 * SWEEP_STEP, **options: Any
) -> tuple[int, list[str]]:
    """The same with a second cut, in the life that recovers from the first."""
    (boundaries,) = play(scenario, arch=arch, **options)
    count, failed = 0, []
    for cut in sampled(cuts_of(boundaries), step):
        _, recovery, *_ = [*play(scenario, [cut], arch=arch, **options), []]
        for second in sampled(cuts_of(_not_all_alike(recovery)), step):
            count += 1
            try:
                play(scenario, [cut, second], arch=arch, **options)
            except Exception as error:
                what = recovery[second.ordinal - 1].what
                failed.append(f"{cut}, then {second.when.value} {what}: {_words(error)}")
    return count, failed


def _words(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_words(inner) for inner in error.exceptions)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
