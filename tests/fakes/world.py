# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host in a test: the model of Xen, a fake xenstored, xl, files, and lives of the daemon in it.

The daemon is the production engine with the production xenstore client; only what is below the
ports is not real.  Its blocking calls run in the loop unless ``threads`` is said, which makes every
run the same and lets the clock jump.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import structlog
import trio

from fakes.event_channels import SimulatedEventChannels
from fakes.hypervisor import SimulatedXen
from fakes.keeper import FakeKeeper
from fakes.objects import Page
from fakes.toolstack import DaemonLocks, FakeLocks, FakeToolstack, Made
from fakes.xenstored import FakeXenstored, fake_xenstored
from xshmd.declarations import Declarations
from xshmd.engine.options import Options
from xshmd.engine.reconciler import Reconciler
from xshmd.errors import XshmError
from xshmd.host_policy import NO_POLICY, HostPolicy
from xshmd.machine import Arch
from xshmd.model import (
    Guest,
    GuestConfig,
    GuestState,
    Lifetime,
    RegionConfig,
    RegionRequest,
    RegionTerms,
    Role,
)
from xshmd.policy.identity import is_holder_uuid
from xshmd.ports import CreationLock, Hypervisor, Keeper, Store
from xshmd.units import DomId, Gfn
from xshmd.xen.store import open_store

T = TypeVar("T")
RECORD_ROOTS = tuple(
    f"/xshmd/{kind}" for kind in ("holders", "regions", "guests", "leases", "changes", "windows")
)
PATIENCE_S = 120.0
"""Of the test's clock, not of anybody's time."""
REGION_GFN = {Arch.X86_64: 0x1000000, Arch.ARM64: 0x3A000}
"""Where guests have their regions."""


class Wall:
    """:class:`xshmd.dom0_ports.Clock` that goes with trio's."""

    def __init__(self) -> None:
        self.set_forward_s = 0.0
        """By how much somebody has set the time of day."""

    def now(self) -> float:
        return 1_700_000_000.0 + self.set_forward_s + trio.current_time()

    def uptime(self) -> float:
        return 100.0 + trio.current_time()


class FakeProcesses:
    """:class:`xshmd.dom0_ports.Processes` over a dictionary: when each that lives began."""

    def __init__(self) -> None:
        self.living: dict[int, int] = {}

    def started_at(self, pid: int) -> int | None:
        return self.living.get(pid)


class FakeFinder:
    """:class:`xshmd.dom0_ports.ConfigFinder` over a dictionary."""

    def __init__(self) -> None:
        self.files: dict[str, GuestConfig | XshmError] = {}
        self.defined: list[RegionConfig] = []
        """Regions apart from any guest."""
        self.rules: HostPolicy | XshmError = NO_POLICY
        """What the administrator allows."""
        self.declared: set[str] = set()
        """Guests whose file is one of ours, rather than xl's."""

    def find(self, *, name: str, uuid: str) -> GuestConfig | None:
        found = self.files.get(name)
        if isinstance(found, XshmError):
            raise found
        return found

    def complete(self, config: GuestConfig) -> GuestConfig:
        return config

    def known(self) -> tuple[GuestConfig, ...]:
        return tuple(
            found
            for found in self.files.values()
            if isinstance(found, GuestConfig) and found.requests
        )

    def regions(self) -> tuple[RegionConfig, ...]:
        return tuple(self.defined)

    def policy(self) -> HostPolicy | XshmError:
        return self.rules

    def declarations(self) -> Declarations:
        for found in (*self.files.values(), self.rules):
            if isinstance(found, XshmError):
                raise found
        return Declarations(
            regions=self.regions(),
            guests=tuple(one for one in self.known() if one.name in self.declared),
        )


@dataclasses.dataclass(slots=True)
class Life:
    """What one life of the daemon has hold of; all of it goes when it dies."""

    xen: Hypervisor
    keeper: Keeper
    store: Store
    locks: CreationLock


Wrap = Callable[[Life], Life]


class Daemon:
    """One life of the daemon."""

    def __init__(self, world: World, options: Options, wrap: Wrap) -> None:
        self._world, self._options, self._wrap = world, options, wrap
        self.scope = trio.CancelScope()
        self.ready = trio.Event()
        self.ended = trio.Event()
        self.store: Any = None
        self.failure: BaseException | None = None
        self._engine: Reconciler | None = None

    @property
    def engine(self) -> Reconciler:
        assert self._engine is not None
        return self._engine

    async def run(self) -> None:
        """Live until cancelled, or until something escapes the engine."""
        world = self._world
        locks = DaemonLocks(world.locks)
        maps_before = set(world.xen.open_maps)
        try:
            with self.scope:
                async with open_store(str(world.server.path)) as store:
                    self.store = store
                    life = self._wrap(Life(world.xen, world.keeper, store, locks))
                    self._engine = Reconciler(
                        xen=life.xen, keeper=life.keeper, store=life.store,
                        finder=world.finder, locks=life.locks, clock=world.clock,
                        processes=world.processes, options=self._options,
                        channels=world.channels,
                    )  # fmt: skip
                    async with trio.open_nursery() as nursery:
                        await nursery.start(self._engine.run)
                        self.ready.set()
        except BaseException as escaped:
            self.failure = escaped
            if not world.tolerate(escaped):
                world.escaped = escaped
                raise
        finally:
            for mapping in world.xen.open_maps - maps_before - world.keeper.maps:
                mapping.close()
            locks.die()
            world.channels.die()
            self.ready.set()
            self.ended.set()

    async def kill(self) -> None:
        """SIGKILL, or as near as a task comes to it; returns when it is gone."""
        self.scope.cancel()
        await self.ended.wait()

    def guest(self, name: str) -> Guest | None:
        """Return the newest record of a guest of this name."""
        found = [guest for guest in self.engine.snapshot().guests if guest.name == name]
        return found[-1] if found else None

    def is_attached(self, name: str) -> bool:
        return any(
            guest.name == name and guest.state is GuestState.ATTACHED
            for guest in self.engine.snapshot().guests
        )


class World:
    """See the module.  Use :func:`world`."""

    def __init__(self, xen: SimulatedXen, server: FakeXenstored, nursery: trio.Nursery) -> None:
        self.xen, self.server = xen, server
        self.channels = SimulatedEventChannels(xen)
        self.channels.taken_at_birth = 2
        self.keeper = FakeKeeper(xen)
        self.locks = FakeLocks()
        self.tools = FakeToolstack(xen, server, self.locks)
        self.finder = FakeFinder()
        self.clock = Wall()
        self.processes = FakeProcesses()
        self.ran: list[tuple[DomId, str]] = []
        """Every start of a domain's vCPUs, and what was wrong with it then (empty: nothing)."""
        self.tolerate: Callable[[BaseException], bool] = lambda escaped: False
        self.escaped: BaseException | None = None
        """What ended a daemon, and the test with it."""
        self._nursery = nursery
        token = trio.lowlevel.current_trio_token()
        # Not at once: xenstored hears of it by a virtual interrupt, after the call has returned.
        xen.on_domain_exception = lambda domid: token.run_sync_soon(
            self.tools.domain_exception, domid
        )
        xen.on_run = self._check_run
        self.free_pages = xen.free_pages
        self.tree = self.dump()

    # -- the daemon -------------------------------------------------------------------------------

    async def start(
        self, *, wrap: Wrap = lambda life: life, wait: bool = True, **options: Any
    ) -> Daemon:
        """Start a life of the daemon; returns when it is ready."""
        daemon = Daemon(self, Options(**options), wrap)
        self._nursery.start_soon(daemon.run)
        if wait:
            with trio.fail_after(PATIENCE_S):
                await daemon.ready.wait()
        return daemon

    # -- guests -----------------------------------------------------------------------------------

    def config(self, name: str, *requests: RegionRequest, file: bool = True) -> GuestConfig:
        """Return a small guest's configuration, and have it in a file unless ``file`` is false."""
        config = GuestConfig(name=name, memory_mib=4, requests=requests)
        if file:
            self.finder.files[name] = config
        return config

    def request(
        self,
        region_id: str,
        frames: int = 3,
        *,
        at: int = 0,
        role: Role = Role.OWNER,
        offset: int = 0,
        lifetime: Lifetime | None = Lifetime.MEMBERS,
        doorbells: int = 0,
    ) -> RegionRequest:
        """Return an entry at ``at`` frames past the usual place."""
        terms = RegionTerms()
        if role is Role.OWNER:
            terms = RegionTerms(lifetime=lifetime, doorbells=doorbells)
        return RegionRequest(
            region_id=region_id, first_gfn=Gfn(REGION_GFN[self.xen.arch] + at), nr_frames=frames,
            role=role, offset_frames=offset, terms=terms,
        )  # fmt: skip

    def borrow(
        self, region_id: str, frames: int = 3, *, at: int = 0, offset: int = 0
    ) -> RegionRequest:
        return self.request(region_id, frames, at=at, role=Role.BORROWER, offset=offset)

    def pages(self, domid: DomId, request: RegionRequest) -> list[Page]:
        """Return the pages a guest has for an entry; fails unless all are foreign."""
        p2m = self.xen.by_domid[domid].p2m
        entries = [p2m.get(gfn) for gfn in range(request.first_gfn, request.end_gfn)]
        assert all(entry is not None and entry.foreign for entry in entries), (domid, request)
        return [entry.page for entry in entries if entry]

    def missing(self, domid: DomId, config: GuestConfig) -> str:
        """Say what the guest lacks of its regions; nothing if it has all."""
        domain = self.xen.by_domid[domid]
        for request in config.requests:
            told = self.server.read(f"/local/domain/{domid}/xshm/{request.region_id}") or ""
            if "transport=grant" in told:
                if missing := self._missing_grants(domid, request):
                    return f"domain {domid} ({config.name}) lacks {missing}"
                continue
            for gfn in range(request.first_gfn, request.end_gfn):
                if gfn in domain.direct:  # host memory, which is no domain's page
                    continue
                entry = domain.p2m.get(gfn)
                if entry is None or not entry.foreign:
                    return f"domain {domid} ({config.name}) has no {request.region_id} at {gfn:#x}"
                owner = entry.page.owner
                if not is_holder_uuid(owner.uuid):
                    return f"domain {domid} has a page of domain {owner.domid}, which is no holder"
        return ""

    def grants_told(self, domid: DomId, region_id: str) -> list[tuple[DomId, int, int]]:
        """Return the references a guest reads in its node: holder, the first, how many."""
        told = self.server.read(f"/local/domain/{domid}/xshm/{region_id}") or ""
        words = dict(word.partition("=")[::2] for word in told.split())
        found = []
        for text in filter(None, words.get("grants", "").split(",")):
            holder, _, refs = text.partition(":")
            first, _, count = refs.partition("+")
            found.append((DomId(int(holder)), int(first), int(count)))
        return found

    def _missing_grants(self, domid: DomId, request: RegionRequest) -> str:
        count = 0
        for holder, first_ref, nr_frames in self.grants_told(domid, request.region_id):
            table = self.xen.by_domid[holder].grants
            for ref in range(first_ref, first_ref + nr_frames):
                entry = table.get(ref)
                if entry is None or not entry.valid or entry.domid != domid:
                    return f"reference {ref} of domain {holder} to {request.region_id}"
            count += nr_frames
        wanted = request.nr_frames
        return "" if count == wanted else f"{wanted - count} references to {request.region_id}"

    def _check_run(self, domid: DomId) -> None:
        domain = self.xen.by_domid[domid]
        if is_holder_uuid(domain.uuid):
            self.ran.append((domid, f"the holder {domid} runs"))
            return
        name = self.server.read(f"/local/domain/{domid}/name") or ""
        config = self.finder.files.get(name)
        wrong = self.missing(domid, config) if isinstance(config, GuestConfig) else ""
        self.ran.append((domid, wrong))

    @property
    def ran_wrongly(self) -> list[str]:
        return [wrong for _, wrong in self.ran if wrong]

    def running(self, made: Made) -> bool:
        domain = self.xen.by_domid.get(made.domid)
        return domain is not None and domain.running

    def holders(self) -> list[DomId]:
        """Return the holders that live."""
        return [
            info.domid
            for info in self.xen.domains()
            if is_holder_uuid(info.uuid) and not info.dying
        ]

    # -- waiting, and the state of the host -------------------------------------------------------

    async def until(self, condition: Callable[[], bool], what: str = "") -> None:
        """Wait until something is so, in the test's time."""
        with trio.move_on_after(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - what is waited for has no event
                await trio.sleep(0.05)
            return
        raise AssertionError(f"it never came to {what or condition}")

    def dump(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Return all of xenstore, without the empty directories our records were in."""
        return {
            path: (node.text, tuple(str(permission) for permission in node.permissions))
            for path, node in self.server.nodes.items()
            if path != "/xshmd" and not (path in RECORD_ROOTS and not node.children)
        }

    def is_clean(self) -> str:
        """Say what is left of all that ever was; nothing if all is as at the start."""
        domains = [info.domid for info in self.xen.domains()]
        if domains != [0]:
            return f"domains {domains}"
        tree = self.dump()
        if tree != self.tree:
            return f"xenstore: {sorted(set(tree.items()) ^ set(self.tree.items()))}"
        if self.xen.free_pages != self.free_pages:
            return f"{self.free_pages - self.xen.free_pages} pages"
        if self.locks.held:
            return f"locks {self.locks.held}"
        if self.keeper.names:
            return f"kept {self.keeper.names}"
        return ""

    async def check_clean(self) -> None:
        """Fail unless all is as it was before the first guest, to the page and the node."""
        with trio.move_on_after(PATIENCE_S):
            while self.is_clean():  # noqa: ASYNC110 - nor has this
                await trio.sleep(0.5)
        left = self.is_clean()
        assert not left, left
        self.check()

    def check(self) -> None:
        """Fail if anything happened that never may."""
        self.xen.check()
        assert self.ran_wrongly == []
        assert self.xen.leaked_references == 0
        assert self.xen.unwiped_frees == 0
        assert self.xen.crashed == []


@contextmanager
def _calls_in_the_loop() -> Iterator[None]:
    """Let trio.to_thread.run_sync run the call at once: threads have no place in simulated time."""
    real = trio.to_thread.run_sync

    async def run_sync(
        call: Callable[..., T], *arguments: Any, limiter: Any = None, **options: Any
    ) -> T:
        if limiter is None:
            await trio.lowlevel.checkpoint()
            return call(*arguments)
        async with limiter:
            await trio.lowlevel.checkpoint()
            return call(*arguments)

    trio.to_thread.run_sync = run_sync  # type: ignore[assignment]
    try:
        yield
    finally:
        trio.to_thread.run_sync = real


@contextmanager
def _nothing_patched() -> Iterator[None]:
    yield


@asynccontextmanager
async def world(
    arch: Arch = Arch.X86_64, *, threads: bool = False, **machine: Any
) -> AsyncIterator[World]:
    """Run a host with nothing on it."""
    failure: BaseException | None = None
    patched = _nothing_patched() if threads else _calls_in_the_loop()
    xen = SimulatedXen(arch, **{"total_pages": 1 << 17, "dom0_pages": 1 << 15, **machine})
    with structlog.testing.capture_logs(), patched:
        async with fake_xenstored() as server, trio.open_nursery() as nursery:
            try:
                yield World(xen, server, nursery)
            except BaseException as exc:
                failure = exc
            nursery.cancel_scope.shield = True
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
