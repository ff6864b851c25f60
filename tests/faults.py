# SPDX-License-Identifier: LGPL-2.1-or-later
"""An error at every call: finds every call that a scenario makes of Xen and xenstore, and fails it.

A fault is one call failing once, or every such call from then on until the fault is lifted.  Where
xenstored's answer is lost, what was asked for has been done all the same.
"""

from __future__ import annotations

import dataclasses
import errno
import inspect
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, cast

import trio
from fakes.world import Daemon, Life, World, world
from trio.testing import MockClock

from xshmd.errors import StoreError, StoreLost, StoreTimedOut, XshmError
from xshmd.machine import Arch
from xshmd.ports import Hypervisor, Keeper, Store
from xshmd.xen.errno_table import failure

CHANGES: Final = (errno.ENOMEM, errno.EINVAL, errno.EPERM, errno.EBUSY)
LOOKS: Final = (errno.EPERM, errno.ENOMEM)
RESTART_S: Final = 0.2
READS: Final = frozenset({"host_info", "domain_info", "domains", "paging_pool_bytes"})
QUIET: Final = frozenset({"populated_frames", "close"})
"""What does not fail: a frame that cannot be mapped counts as empty."""
STORE_READS: Final = frozenset({"read", "read_many", "directory", "is_introduced"})


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """The n-th call of a kind that a life makes."""

    where: str
    """``xen`` or ``store``."""
    kind: str
    nth: int


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong there."""

    site: Site
    error: XshmError
    for_ever: bool
    done: bool = False
    """Whether what was asked for is done although it fails."""

    def __str__(self) -> str:
        how = "for ever" if self.for_ever else "once"
        lost = ", though done" if self.done else ""
        what = f"{type(self.error).__name__} {getattr(self.error, 'errno', '')}".strip()
        return f"{self.site.where}.{self.site.kind} #{self.site.nth}: {what} {how}{lost}"


class Faults:
    """Counts the calls of one life, and fails those that the fault names."""

    def __init__(self, fault: Fault | None) -> None:
        self._fault = fault
        self._counts: Counter[tuple[str, str]] = Counter()
        self.seen: list[Site] = []
        self.struck = 0
        self.struck_at: set[tuple[str, int, str]] = set()
        """File, line and kind of the engine's calls that a fault befell."""
        self.counting = True
        """Until then no call counts, nor fails."""
        self.daemon: Daemon | None = None
        """The life that runs."""

    def lift(self) -> None:
        """Let everything work again."""
        self._fault = None

    def strikes(self, where: str, kind: str) -> Fault | None:
        if not self.counting:
            return None
        self._counts[where, kind] += 1
        site = Site(where, kind, self._counts[where, kind])
        self.seen.append(site)
        fault = self._fault
        if fault is None or (fault.site.where, fault.site.kind) != (where, kind):
            return None
        if site.nth == fault.site.nth or (fault.for_ever and site.nth > fault.site.nth):
            self.struck += 1
            self.struck_at.add((*_asker(), kind))
            return fault
        return None

    def wrap(self, life: Life) -> Life:
        return Life(
            xen=cast(Hypervisor, _FaultyXen(life.xen, self)),
            keeper=cast(Keeper, _FaultyXen(life.keeper, self)),
            store=cast(Store, _FaultyStore(life.store, self)),
            locks=life.locks,
        )


def _asker() -> tuple[str, int]:
    """Return the file and line of the engine that asks."""
    frame = inspect.currentframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent.name == "engine" and path.name != "xen_worker.py":
            return path.name, frame.f_lineno
        frame = frame.f_back
    return "", 0


class _FaultyXen:
    def __init__(self, xen: Hypervisor | Keeper, faults: Faults) -> None:
        self._xen, self._faults = xen, faults

    def __getattr__(self, kind: str) -> Any:
        method = getattr(self._xen, kind)
        if kind in QUIET:
            return method

        def call(*arguments: Any, **options: Any) -> Any:
            if fault := self._faults.strikes("xen", kind):
                raise fault.error
            return method(*arguments, **options)

        return call


class _FaultyStore:
    def __init__(self, store: Store, faults: Faults) -> None:
        self._store, self._faults = store, faults

    @property
    def messages_sent(self) -> int:
        return self._store.messages_sent

    def __getattr__(self, kind: str) -> Any:
        method = getattr(self._store, kind)
        if kind == "watch":
            return method

        async def call(*arguments: Any) -> Any:
            fault = self._faults.strikes("store", kind)
            if fault is None:
                return await method(*arguments)
            await trio.lowlevel.checkpoint()
            if fault.done:
                await method(*arguments)
            raise fault.error

        return call


def faults_at(site: Site) -> list[Fault]:
    """Return every fault that may befall a call."""
    found = []
    if site.where == "xen":
        for code in LOOKS if site.kind in READS else CHANGES:
            refusal = failure(site.kind, None, code)
            found += [Fault(site, refusal, for_ever) for for_ever in _how_long(site)]
        return found
    errors: list[XshmError] = [
        StoreLost("the connection broke"),
        StoreTimedOut("no answer in time"),
        StoreError("EQUOTA", error="EQUOTA"),
    ]
    for error in errors:
        for for_ever in (False, True):
            found.append(Fault(site, error, for_ever))
            if site.kind not in STORE_READS and not isinstance(error, StoreError):
                found.append(Fault(site, error, for_ever, done=True))
    return found


class _Service:
    """The daemon as systemd runs it: one that cannot start says why, ends and is started again."""

    def __init__(self, host: World, faults: Faults) -> None:
        self._host, self._faults = host, faults
        self.runs = False
        self.ended_running: list[BaseException | None] = []
        """What ended a life that had started well, which nothing may."""

    async def run(self) -> None:
        while True:
            daemon = await self._host.start(wrap=self._faults.wrap)
            self._faults.daemon = daemon
            self.runs = not daemon.ended.is_set()
            await daemon.ended.wait()
            if self.runs:
                self.ended_running.append(daemon.failure)
            await trio.sleep(RESTART_S)


def _only(escaped: BaseException) -> BaseException:
    while isinstance(escaped, BaseExceptionGroup) and len(escaped.exceptions) == 1:
        escaped = escaped.exceptions[0]
    return escaped


def _how_long(site: Site) -> tuple[bool, ...]:
    # Xen takes any pause of a living domain back (common/domain.c,
    # domain_unpause_by_systemcontroller()): that it never does is not even imagined.
    return (False,) if site.kind == "unpause" else (False, True)


Body = Callable[[World, Faults], Awaitable[None]]
"""A scenario that may fail: it lifts the fault in time."""


def play(
    body: Body,
    fault: Fault | None = None,
    *,
    arch: Arch = Arch.X86_64,
    at_start: bool = False,
) -> Faults:
    """Play a scenario with a fault in it.

    Args:
        body: The scenario.
        fault: What fails.
        arch: Whose rules hold.
        at_start: Whether it is the daemon's start that is looked at; otherwise it has started well.

    Raises:
        AssertionError: something was lost, or the daemon did not come through.
    """
    faults = Faults(fault)

    async def main() -> None:
        async with world(arch) as host, trio.open_nursery() as nursery:
            host.tolerate = lambda escaped: isinstance(_only(escaped), XshmError)
            service = _Service(host, faults)
            faults.counting = at_start
            nursery.start_soon(service.run)
            if not at_start:
                await host.until(lambda: service.runs, "a start")
                faults.counting = True
            await body(host, faults)
            if fault is not None and fault.for_ever:
                # Blind for as long as the fault lasts, it cannot stop what it does not see.
                host.ran.clear()
            await host.check_clean()
            assert service.ended_running == []
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    return faults


def sweep(
    body: Body,
    *,
    arch: Arch = Arch.X86_64,
    step: int = 1,
    at_start: bool = False,
    struck_at: set[tuple[str, int, str]] | None = None,
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Play a scenario once for every fault at every call it makes.

    Returns:
        How many faults struck each kind of call, and what failed.
    """
    sites = _distinct(play(body, arch=arch, at_start=at_start).seen)
    chosen = [fault for site in sites for fault in faults_at(site)][::step]
    covered: Counter[tuple[str, str]] = Counter()
    failed = []
    for fault in chosen:
        try:
            played = play(body, fault, arch=arch, at_start=at_start)
        except Exception as error:
            failed.append(f"{fault}: {_words(error)}")
        else:
            covered[fault.site.where, fault.site.kind] += played.struck > 0
            if struck_at is not None:
                struck_at |= played.struck_at
    return covered, failed


def _distinct(sites: Sequence[Site]) -> list[Site]:
    """Leave out the later ones of calls that are made over and over, while waiting mostly."""
    return [site for site in sites if site.nth <= 12]


def _words(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_words(inner) for inner in error.exceptions)
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {str(error)[:200]} ({frames[-1].line})"
