# SPDX-License-Identifier: LGPL-2.1-or-later
"""What happens in a soak, and what must be true after each of it; all chosen by one seed."""

from __future__ import annotations

import base64
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from integration.dom0 import Running
from integration.scenarios.guest import MIB, PAGE, Entry, Guest
from integration.scenarios.host import WAIT_S, Host, add, attach, detach, remove

MOST_GUESTS: Final = 6
MOST_REGIONS: Final = 4
"""Of the system's."""
MOST_LEASES: Final = 3
SIZES: Final = (PAGE, 16 * PAGE, 64 * PAGE, MIB, 2 * MIB, 4 * MIB)
POWEROFF, REBOOT, CRASH = 0, 1, 3
"""Why a domain shuts down (xen/include/public/sched.h)."""
STOPS: Final = {"poweroff": POWEROFF, "crash": CRASH}
BEAT: Final = 128 + 4
"""Offset of the heartbeat of the guest with slot 0, and how far the slots lie apart."""
SLOT_BYTES: Final = 64
SLOTS: Final = 16
REFUSALS: Final = ("Refused", "Conflict")
"""What may be answered to a change: what a guest has already may not go with it."""
LEASE: Final = """
import select, sys
from xshmd import client

with client.connect().region(sys.argv[1]).attach("rw") as lease, lease.map() as memory:
    memory[0:8] = b"had by 1"
    print("has it", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0] and not lease.wait_ending(0.5):
        pass
"""
"""Has a region until its input ends or somebody wants the region back."""


class Kind(StrEnum):
    """How a region is kept; the value is what its definition says of it."""

    OPEN = ""
    SEALED = "isolation=sealed"
    GRANTED = "transport=grant"

    @property
    def terms(self) -> dict[str, str]:
        return dict([self.value.split("=")]) if self.value else {}


@dataclass
class Shared:
    """A region, as it ought to be."""

    name: str
    kind: Kind
    size: int
    place: int = -1
    """Which of the places for the system's regions is its own; -1 if it is not the system's."""

    @property
    def is_system(self) -> bool:
        return self.place >= 0


@dataclass
class Alive:
    """A guest that runs.

    Attributes:
        guest: what it is.
        regions: what it has; its heart beats in the first, if it beats.
        beats: whether it does: one that is given its regions later knows nothing of them.
    """

    guest: Guest
    regions: list[Shared]
    beats: bool
    domid: int = -1

    @property
    def kinds(self) -> set[Kind]:
        return {region.kind for region in self.regions}


@dataclass
class Lease:
    """A program of dom0 that has a region."""

    region: Shared
    running: Running = field(repr=False)


class Churn:
    """A machine on which something happens all the time.

    Args:
        host: the machine.
        rng: what chooses.
        start_daemon: starts the next daemon; None if this one is to stay.
        say: is told of every operation before it is done.
    """

    def __init__(
        self,
        host: Host,
        rng: random.Random,
        start_daemon: Callable[[], None] | None,
        say: Callable[[str], None],
    ) -> None:
        self._host, self._rng, self._start_daemon, self._say = host, rng, start_daemon, say
        self._alive: list[Alive] = []
        self._system: list[Shared] = []
        self._leases: list[Lease] = []
        self.done = 0
        self.refused = 0
        """Changes that were refused: Xen gives a guest one holder for life."""
        self.expected_errors: list[str] = []
        """What the daemon may have logged as errors: the guests that were to be refused."""

    # -- one thing after the other --------------------------------------------------------------

    def operate(self) -> None:
        """Do the next thing, and see that all is well after it."""
        operations = dict(self._possible())
        name = self._rng.choices(list(operations), [weight for weight, _ in operations.values()])[0]
        operations[name][1]()
        self._check()
        self.done += 1

    def _possible(self) -> Iterator[tuple[str, tuple[int, Callable[[], None]]]]:
        """Every operation that makes sense now, with how often it is to come."""
        if len(self._alive) < MOST_GUESTS:
            yield "create", (6, self._create)
            yield "create two", (2, self._create_two)
            yield "create without regions", (2, self._create_late)
            yield "refuse", (1, self._refuse)
        if self._alive:
            yield "destroy", (3, self._destroy)
            yield "stop", (3, self._stop)
            yield "reboot", (4, self._reboot)
            yield "replace", (1, self._replace)
            yield "end unseen", (1, self._end_unseen)
        if len(self._system) < MOST_REGIONS:
            yield "add", (2, self._add)
        if self._system:
            yield "remove", (1, self._remove)
            if self._late:
                yield "attach", (4, self._attach)
        if any(region.is_system for alive in self._alive for region in alive.regions):
            yield "detach", (2, self._detach)
        if self._mappable and len(self._leases) < MOST_LEASES:
            yield "take a lease", (2, self._take_lease)
        if self._leases:
            yield "end a lease", (2, self._end_lease)
        yield "reload", (1, self._reload)
        yield "restart", (1, self._restart)

    def finish(self) -> None:
        """End everything that lives."""
        for lease in self._leases:
            self._let_go(lease)
        self._leases.clear()
        self._rng.shuffle(self._alive)
        for alive in self._alive:
            self._host.destroy(alive.guest)
        self._alive.clear()
        for region in self._system:
            self._host.apply(remove(region.name, force=True))
        self._system.clear()
        self._host.clean_up()
        self._host.wait(lambda: not self._host.guests(), "no guest is awaited any more")

    # -- what must be true ----------------------------------------------------------------------

    def _check(self) -> None:
        """Every guest has what it is to have, and the heart of one of them beats."""
        for alive in self._alive:
            self._wait_attached(alive)
        beating = [alive for alive in self._alive if alive.beats]
        if beating:
            self._wait_beats(self._rng.choice(beating))

    def _wait_attached(self, alive: Alive) -> None:
        wanted = sorted(region.name for region in alive.regions)

        def is_so() -> bool:
            found = next((g for g in self._host.guests() if g["name"] == alive.guest.name), None)
            if found is None:
                return not wanted
            is_up = found["state"] == "attached" and sorted(found["regions"]) == wanted
            return is_up and found["domainId"] == alive.domid

        self._host.wait(is_so, f"{alive.guest.name} (domain {alive.domid}) has {wanted}")

    def _wait_beats(self, alive: Alive) -> None:
        before = self._beat(alive)
        self._host.wait(lambda: self._beat(alive) != before, f"{alive.guest.name} beats")

    def _beat(self, alive: Alive) -> int:
        where = {
            "id": alive.regions[0].name,
            "offsetBytes": BEAT + alive.guest.slot * SLOT_BYTES, "byteCount": 4,
        }  # fmt: skip
        answer: dict[str, Any] = self._host.ask("call", "ReadRegion", where)
        return int.from_bytes(base64.b64decode(answer["data"]), "little")

    # -- guests ---------------------------------------------------------------------------------

    def _new_region(self, kind: Kind) -> Shared:
        return Shared(self._host.unique(kind.name.lower()), kind, self._rng.choice(SIZES))

    def _members(self, kind: Kind) -> list[Shared]:
        """Regions of this kind that guests own among them, and another may join."""
        found = {
            region.name: region
            for alive in self._alive
            for region in alive.regions
            if region.kind == kind and not region.is_system
        }
        return list(found.values())

    def _slot(self, *others: Alive) -> int:
        taken = {alive.guest.slot for alive in (*self._alive, *others)}
        return next(slot for slot in range(SLOTS) if slot not in taken)

    def _plan(self, *others: Alive) -> Alive:
        """A guest that makes a region of some kind, or joins one that is there; not made yet."""
        kind = self._rng.choice(list(Kind))
        known = self._members(kind)
        joins = bool(known) and self._rng.random() < 0.5
        region = self._rng.choice(known) if joins else self._new_region(kind)
        role = "borrower" if joins else "owner"
        entry = Entry(region.name, self._host.at, region.size, role, "" if joins else kind.value)
        regions, entries = [region], [entry]
        if kind is Kind.GRANTED:  # which the bare-metal guest cannot map: it beats in another
            own = self._new_region(Kind.OPEN)
            regions.insert(0, own)
            entries.insert(0, Entry(own.name, self._host.at_elsewhere, own.size))
        first = entries[0]
        guest = self._host.guest(
            "guest", *entries, do="beat" if joins else "fill,beat",
            slot=self._slot(*others),
            shm=f"shm={first.at:#x},{first.size:#x}",
        )  # fmt: skip
        return Alive(guest, regions, beats=True)

    def _start(self, alive: Alive) -> tuple[Alive, Running]:
        entries = "; ".join(map(str, alive.guest.entries)) or "of nothing yet"
        self._say(f"create {alive.guest.name}: {entries}")
        self._alive.append(alive)
        return alive, self._host.start_creating(alive.guest)

    def _up(self, *made: tuple[Alive, Running]) -> None:
        """Wait until these have been made."""
        for alive, creating in made:
            creating.wait(2 * WAIT_S, check=True)
            domid = self._host.domid(alive.guest)
            assert domid is not None, f"{alive.guest.name} is gone"
            alive.domid = domid
            if alive.beats:
                self._wait_beats(alive)

    def _create(self) -> None:
        self._up(self._start(self._plan()))

    def _create_two(self) -> None:
        one = self._plan()
        other = self._plan(one)
        self._up(self._start(one), self._start(other))

    def _create_late(self) -> None:
        guest = self._host.guest("late", slot=self._slot())
        self._up(self._start(Alive(guest, [], beats=False)))

    def _refuse(self) -> None:
        entry = Entry(self._host.unique("nothing"), self._host.at, PAGE, "borrower")
        guest = self._host.guest("refused", entry)
        self._say(f"refuse {guest.name}")
        self.expected_errors.append(f"guest refused guest='{guest.name}'")
        done = self._host.create(guest, check=False)
        assert done.status, f"{guest.name} was made"
        self._host.wait_gone(guest)

    def _take(self) -> Alive:
        """Some guest, which is taken to have ended."""
        alive = self._rng.choice(self._alive)
        self._alive.remove(alive)
        return alive

    def _destroy(self) -> None:
        guest = self._take().guest
        self._say(f"destroy {guest.name}")
        self._host.destroy(guest)

    def _stop(self) -> None:
        alive, how = self._take(), self._rng.choice(list(STOPS))
        self._say(f"{how} {alive.guest.name}")
        self._host.ask("shut_down", alive.domid, STOPS[how])
        self._host.wait_gone(alive.guest)

    def _reboot(self) -> None:
        alive = self._rng.choice(self._alive)
        self._say(f"reboot {alive.guest.name}")
        self._host.ask("shut_down", alive.domid, REBOOT)
        before = alive.domid
        alive.domid = self._host.wait(
            lambda: self._another_domid(alive, before), f"{alive.guest.name} is back"
        )
        if alive.beats:
            self._wait_attached(alive)
            self._wait_beats(alive)

    def _another_domid(self, alive: Alive, before: int) -> int | None:
        domid = self._host.domid(alive.guest)
        return None if domid == before else domid

    def _replace(self) -> None:
        """One is destroyed as another is made."""
        gone = self._take().guest
        self._say(f"destroy {gone.name} meanwhile")
        ending = self._host.dom0.spawn(["xl", "destroy", gone.name], timeout_s=2 * WAIT_S)
        self._up(self._start(self._plan()))
        ending.wait(2 * WAIT_S, check=True)

    # -- regions of the system's ----------------------------------------------------------------

    @property
    def _late(self) -> list[Alive]:
        return [alive for alive in self._alive if not alive.beats]

    def _add(self) -> None:
        region = self._new_region(self._rng.choice(list(Kind)))
        taken = {other.place for other in self._system}
        region.place = next(place for place in range(MOST_REGIONS) if place not in taken)
        self._say(f"add {region.name}")
        change = add(region.name, region.size)
        change["add"]["terms"] = region.kind.terms
        self._host.apply(change)
        self._system.append(region)

    def _attach(self) -> None:
        alive, region = self._rng.choice(self._late), self._rng.choice(self._system)
        self._say(f"attach {region.name} to {alive.guest.name}")
        at = self._host.at + (region.place + 1) * 2 * max(SIZES)
        if self._asked(attach(alive.domid, region.name, at, region.size)):
            alive.regions.append(region)

    def _detach(self) -> None:
        having = [
            (alive, region) for alive in self._alive for region in alive.regions if region.is_system
        ]
        alive, region = self._rng.choice(having)
        self._say(f"detach {region.name} from {alive.guest.name}")
        self._host.apply(detach(alive.domid, region.name))
        alive.regions.remove(region)

    def _remove(self) -> None:
        region = self._rng.choice(self._system)
        self._say(f"remove {region.name}")
        self._host.apply(remove(region.name, force=True))
        for lease in [one for one in self._leases if one.region is region]:
            self._leases.remove(lease)
            lease.running.wait(WAIT_S, check=True)  # it lets go when it is asked to
        self._system.remove(region)
        for alive in self._alive:
            if region in alive.regions:
                alive.regions.remove(region)

    def _asked(self, change: dict[str, Any]) -> bool:
        """Ask for a change; whether it was made, and not refused."""
        try:
            self._host.apply(change)
        except AssertionError as answer:
            if not any(f"{name}: " in str(answer) for name in REFUSALS):
                raise
            self._say(f"  {answer}")
            self.refused += 1
            return False
        return True

    # -- leases ---------------------------------------------------------------------------------

    @property
    def _mappable(self) -> list[Shared]:
        """What a program can have: regions that are there, and not sealed."""
        return [*self._members(Kind.OPEN), *(r for r in self._system if r.kind is Kind.OPEN)]

    def _take_lease(self) -> None:
        region = self._rng.choice(self._mappable)
        self._say(f"a lease of {region.name}")
        words = ["python3", "-c", LEASE, region.name]
        running = self._host.dom0.spawn(words, stdin=True)
        self._leases.append(Lease(region, running))
        self._host.wait(
            lambda: b"has it" in running.stdout, f"it has {region.name}: {running.stderr.decode()}"
        )

    def _end_lease(self) -> None:
        lease = self._rng.choice(self._leases)
        self._leases.remove(lease)
        if self._rng.random() < 0.5:
            self._say(f"kill the lease of {lease.region.name}")
            lease.running.kill(signal.SIGKILL)
            assert lease.running.wait(WAIT_S).status == -signal.SIGKILL
        else:
            self._say(f"give up the lease of {lease.region.name}")
            self._let_go(lease)

    def _let_go(self, lease: Lease) -> None:
        lease.running.close_stdin()
        lease.running.wait(WAIT_S, check=True)

    # -- the daemon -----------------------------------------------------------------------------

    def _reload(self) -> None:
        self._say("reload")
        since = self._host.mark
        self._host.reload()
        self._host.wait_log(r"^<6>reloaded", since)

    def _restart(self) -> None:
        how = self._rng.choice((signal.SIGTERM, signal.SIGKILL))
        if self._start_daemon is None:
            self._reload()
            return
        self._say(f"restart by {how.name}")
        self._host.stop_daemon(how)
        self._start_daemon()

    def _end_unseen(self) -> None:
        """A guest ends while no daemon runs."""
        gone = self._take().guest
        if self._start_daemon is None:
            self._say(f"destroy {gone.name}")
            self._host.destroy(gone)
            return
        self._say(f"destroy {gone.name} while no daemon runs")
        self._host.stop_daemon(signal.SIGKILL)
        self._host.destroy(gone)
        self._start_daemon()


def told(operations: Sequence[str]) -> str:
    """A round's operations, for people."""
    return "\n".join(f"  {number}. {text}" for number, text in enumerate(operations, 1))
