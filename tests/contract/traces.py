# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random sequences of calls, the same on the model and on real Xen: every answer must be the same.

In dom0: ``python3 -m tests.contract.traces FIRST COUNT`` prints one JSON line a trace.  A trace is
its seed; what differs between the two is made a case of ``cases.py``, and the model is mended.

Two things are never done, because they cannot be undone on a real machine: a vCPU is never let
run, and on Arm no page is put where it is already (it would be lost, arch/arm/mmu/p2m.c
``__p2m_set_entry()``), nor over a guest's own memory.
"""

from __future__ import annotations

import errno
import json
import random
import sys
import time
from collections.abc import Callable, Iterable
from typing import Final

from xshmd.errors import HypercallFailed, XshmError
from xshmd.machine import Arch
from xshmd.ports import Hypervisor, PageMap
from xshmd.units import SUPERPAGE_FRAMES, DomId, Gfn, bytes_of

from .host import GUEST_GFN, HOLDER_GFN, ContractHost

LENGTH: Final = 60
DOMAINS: Final = 3
FRAMES: Final = (1, 1, 2, 3, 5, 16, SUPERPAGE_FRAMES, SUPERPAGE_FRAMES + 1)
SPREAD: Final = 24
"""Within how many frames of a start things are put, so that they meet."""


class Trace:
    """One sequence: what it does next depends on the seed and on the answers so far.

    Args:
        xen: What it is played on.
        make: Makes its domains, and destroys them.
        seed: Which sequence.
    """

    def __init__(self, xen: Hypervisor, make: ContractHost, seed: int) -> None:
        self._xen, self._make, self._rng = xen, make, random.Random(seed)
        self._domids: list[DomId] = []
        self._alive: list[int] = []
        self._pauses: dict[int, int] = {}
        self._shared: dict[int, dict[int, tuple[int, int]]] = {}
        self._own: dict[int, set[int]] = {}
        self._maps: list[PageMap] = []
        self.answers: list[str] = []

    def play(self, length: int = LENGTH) -> list[str]:
        """Play it and return every answer, each with what was asked."""
        self._create()
        self._create()
        self._begin()
        actions: list[tuple[int, Callable[[], None]]] = [
            (2, self._create), (1, self._destroy), (3, self._target), (4, self._populate),
            (2, self._depopulate), (3, self._max_pages), (2, self._pool), (8, self._map),
            (5, self._unmap), (4, self._write), (4, self._read), (1, self._zero), (2, self._look),
            (2, self._pause), (1, self._shut_down), (2, self._keep_map), (1, self._drop_maps),
        ]  # fmt: skip
        weights = [weight for weight, _ in actions]
        try:
            for _ in range(length):
                _, action = self._rng.choices(actions, weights)[0]
                if self._alive or action == self._create:
                    action()
        finally:
            self._drop_maps()
        for index in self._alive:
            self._facts(index)
        return self.answers

    def _begin(self) -> None:
        """Have something to play with: a holder with pages, mostly, and a guest of it."""
        holder, guest = self._domids
        if self._rng.random() < 0.9:
            self._ask("more", lambda: self._xen.set_max_pages(holder, 2000))
            if self._ask("fill", lambda: self._xen.populate(holder, HOLDER_GFN, SPREAD)):
                self._own[0].update(range(HOLDER_GFN, HOLDER_GFN + SPREAD))
                self._ask("zero", lambda: self._xen.zero(holder, HOLDER_GFN, SPREAD))
        if self._rng.random() < 0.9:
            self._ask("target 1 0", lambda: self._xen.set_target(guest, holder))

    # -- asking ---------------------------------------------------------------------------------

    def _ask(self, what: str, call: Callable[[], object]) -> object | None:
        """Make a call and note its answer; return it, or None if it failed."""
        try:
            result = call()
        except HypercallFailed as error:
            name = errno.errorcode.get(error.errno, str(error.errno))
            self.answers.append(f"{what}: {type(error).__name__} {name}")
            return None
        except XshmError as error:
            self.answers.append(f"{what}: {type(error).__name__}")
            return None
        self.answers.append(f"{what}: {result!r}")
        return True if result is None else result

    def _any(self) -> int:
        return self._rng.choice(self._alive)

    def _frames(self) -> int:
        return self._rng.choice(FRAMES)

    def _owned(self, index: int) -> Gfn:
        """Return a frame that is the domain's own, mostly."""
        if self._own[index] and self._rng.random() < 0.8:
            return Gfn(self._rng.choice(sorted(self._own[index])))
        return self._near(HOLDER_GFN)

    def _near(self, gfn: int) -> Gfn:
        return Gfn(gfn + self._rng.choice((0, 0, 0, SUPERPAGE_FRAMES, self._rng.randrange(SPREAD))))

    # -- domains --------------------------------------------------------------------------------

    def _create(self) -> None:
        if len(self._alive) >= DOMAINS:
            return
        index = len(self._domids)
        self._domids.append(self._make.domain(self._rng.choice((24, 512, 512))))
        self._alive.append(index)
        self._pauses[index], self._shared[index], self._own[index] = 1, {}, set()
        self.answers.append(f"create {index}")

    def _destroy(self) -> None:
        index = self._any()
        self._alive.remove(index)
        self._ask(f"destroy {index}", lambda: self._make.destroy(self._domids[index]))

    def _target(self) -> None:
        # Never the older one's to the newer: two that are each other's would never go away.
        other, one = sorted((self._any(), self._any()))
        self._ask(
            f"target {one} {other}",
            lambda: self._xen.set_target(self._domids[one], self._domids[other]),
        )

    def _pause(self) -> None:
        index = self._any()
        if self._pauses[index] > 1 and self._rng.random() < 0.5:
            self._ask(f"unpause {index}", lambda: self._xen.unpause(self._domids[index]))
            self._pauses[index] -= 1
        elif self._ask(f"pause {index}", lambda: self._xen.pause(self._domids[index])):
            self._pauses[index] += 1

    def _shut_down(self) -> None:
        index, reason = self._any(), self._rng.randrange(4)
        self._ask(
            f"shut down {index} {reason}",
            lambda: self._xen.shut_down(self._domids[index], reason),
        )

    def _max_pages(self) -> None:
        index, pages = self._any(), self._rng.choice((0, 1, 16, 600, 4096))
        self._ask(
            f"max pages {index} {pages}",
            lambda: self._xen.set_max_pages(self._domids[index], pages),
        )

    def _pool(self) -> None:
        index = self._any()
        size = bytes_of(self._rng.choice((512, 600)))
        self._ask(
            f"pool {index} {size}",
            lambda: self._xen.set_paging_pool_bytes(self._domids[index], size),
        )
        self._ask(f"pool of {index}", lambda: self._xen.paging_pool_bytes(self._domids[index]))

    # -- pages ----------------------------------------------------------------------------------

    def _populate(self) -> None:
        index, first, count = self._any(), self._near(HOLDER_GFN), self._frames()
        gfns = range(first, first + count)
        if self._own[index].intersection(gfns) or self._shared[index].keys() & set(gfns):
            return  # over what is there: x86 crashes the domain, Arm loses the page
        if self._ask(
            f"populate {index} {first:#x} {count}",
            lambda: self._xen.populate(self._domids[index], first, count),
        ):
            self._own[index].update(gfns)
            self._ask("zero", lambda: self._xen.zero(self._domids[index], first, count))

    def _depopulate(self) -> None:
        index, first, count = self._any(), self._near(HOLDER_GFN), self._frames()
        if self._ask(
            f"depopulate {index} {first:#x} {count}",
            lambda: self._xen.depopulate(self._domids[index], first, count),
        ):
            self._own[index].difference_update(range(first, first + count))

    def _map(self) -> None:
        guest, holder = self._any(), self._any()
        if self._rng.random() < 0.7:
            holder, guest = min(self._alive), max(self._alive)
        first, source, count = self._near(GUEST_GFN), self._near(HOLDER_GFN), self._frames()
        if self._make.arch is Arch.ARM64 and self._loses_pages(guest, holder, first, source, count):
            return
        if self._ask(
            f"map {guest} {first:#x} {holder} {source:#x} {count}",
            lambda: self._xen.map_foreign(
                self._domids[guest], first, self._domids[holder], source, count
            ),
        ):
            for step in range(count):
                self._shared[guest][first + step] = holder, source + step
        else:
            # What was there before and lay in the way is gone where the call got that far.
            for gfn in range(first, first + count):
                self._forget_if_gone(guest, gfn)

    def _loses_pages(self, guest: int, holder: int, first: int, source: int, count: int) -> bool:
        there = self._shared[guest].keys() | self._own[guest]
        return bool(there & set(range(first, first + count)))

    def _forget_if_gone(self, guest: int, gfn: int) -> None:
        # Unmapped and so known, whatever the failed call did with it.
        if gfn in self._shared[guest]:
            self._ask("clear", lambda: self._xen.unmap(self._domids[guest], Gfn(gfn), 1))
            del self._shared[guest][gfn]

    def _unmap(self) -> None:
        guest, first, count = self._any(), self._near(GUEST_GFN), self._frames()
        if self._ask(
            f"unmap {guest} {first:#x} {count}",
            lambda: self._xen.unmap(self._domids[guest], first, count),
        ):
            for gfn in range(first, first + count):
                self._shared[guest].pop(gfn, None)

    # -- contents -------------------------------------------------------------------------------

    def _mapping(self, index: int, first: Gfn, count: int, *, writable: bool) -> PageMap:
        return self._xen.map_pages(self._domids[index], first, count, writable=writable)

    def _write(self) -> None:
        index = self._any()
        gfn, byte = self._owned(index), self._rng.randrange(256)
        offset = self._rng.randrange(4096)

        def call() -> None:
            mapping = self._mapping(index, gfn, 1, writable=True)
            mapping.write(offset, bytes([byte]))
            mapping.close()

        self._ask(f"write {index} {gfn:#x} {offset} {byte}", call)

    def _read(self) -> None:
        index = self._any()
        gfn = self._owned(index)
        if self._shared[index] and self._rng.random() < 0.3:
            gfn = Gfn(self._rng.choice(sorted(self._shared[index])))

        def call() -> int:
            mapping = self._mapping(index, gfn, 1, writable=False)
            data = mapping.read(0, 4096)
            mapping.close()
            return sum((place + 1) * byte for place, byte in enumerate(data))

        self._ask(f"read {index} {gfn:#x}", call)

    def _zero(self) -> None:
        index, first, count = self._any(), self._near(HOLDER_GFN), self._frames()
        self._ask(
            f"zero {index} {first:#x} {count}",
            lambda: self._xen.zero(self._domids[index], first, count),
        )

    def _keep_map(self) -> None:
        index = self._any()
        gfn = self._owned(index)

        def call() -> None:
            self._maps.append(self._mapping(index, gfn, 1, writable=False))

        self._ask(f"keep map {index} {gfn:#x}", call)

    def _drop_maps(self) -> None:
        for mapping in self._maps:
            mapping.close()
        self._maps.clear()
        self.answers.append("drop maps")

    # -- looking --------------------------------------------------------------------------------

    def _look(self) -> None:
        self._facts(self._any())

    def _facts(self, index: int) -> None:
        domid = self._domids[index]
        info = self._xen.domain_info(domid)
        if info is None:
            self.answers.append(f"facts {index}: gone")
            return
        gfns = [Gfn(HOLDER_GFN + step) for step in range(0, 2 * SUPERPAGE_FRAMES, 7)]
        there = [gfn - HOLDER_GFN for gfn in self._xen.populated_frames(domid, gfns)]
        self.answers.append(
            f"facts {index}: paused={info.paused} shut_down={info.shut_down} "
            f"reason={info.shutdown_reason} tot={info.tot_pages} max={info.max_pages} {there}"
        )


def played(xen: Hypervisor, seed: int, *, host: type[ContractHost] = ContractHost) -> list[str]:
    """Play one trace on its own and return its answers."""
    with host(xen) as make:
        return Trace(xen, make, seed).play()


def first_difference(one: Iterable[str], other: Iterable[str]) -> str:
    """Return the first answers that differ, or nothing."""
    mine, theirs = list(one), list(other)
    for number, (left, right) in enumerate(zip(mine, theirs, strict=False)):
        if left != right:
            return f"answer {number}: {left!r} here, {right!r} there"
    if len(mine) != len(theirs):
        return f"{len(mine)} answers here, {len(theirs)} there"
    return ""


def main(first: int, count: int) -> int:
    """Play traces on the Xen that is there and print their answers."""
    from xshmd.xen.hypervisor import XenHypervisor

    began = time.monotonic()
    with XenHypervisor() as xen:
        for seed in range(first, first + count):
            print(json.dumps([seed, played(xen, seed)]), flush=True)
    print(f"{count} traces in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
