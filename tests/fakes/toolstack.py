# SPDX-License-Identifier: LGPL-2.1-or-later
"""Plays libxl and xl on the model and the fake xenstored, in the order real ones do things.

The steps are those of ``tools/libs/light/libxl_create.c`` (reference: xen-and-libxl-facts.md,
sections 1 and 3).  Time passes between them, so that the daemon under test comes in between.
"""

from __future__ import annotations

import dataclasses
import uuid as uuid_module
from collections.abc import Callable

import trio

from fakes.hypervisor import SimulatedXen
from fakes.objects import Domain
from fakes.start_info import write_start_info
from fakes.xenstored import FakeXenstored
from xshmd.errors import DomainGone, XshmError
from xshmd.machine import SHUTDOWN_POWEROFF, SHUTDOWN_REBOOT, Arch, MemoryKind, MemoryRange
from xshmd.model import GuestConfig
from xshmd.policy import layout
from xshmd.ports import HeldLock
from xshmd.units import DomId, address_of, bytes_of

STEP_S = 0.2
"""How long each step of xl takes."""
POLL_S = 0.05
REBOOT_SLEEP_S = 2.0
"""xl sleeps between the destruction and the creation of a guest that reboots."""


class XlFailed(Exception):
    """``xl create`` ends with an error."""


class FakeLocks:
    """The lock files of libxl's userdata, and which configurations it has stored."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, str], object] = {}
        self.finished: set[tuple[int, str]] = set()

    def take(self, domid: int, uuid: str, who: object) -> bool:
        return self.held.setdefault((domid, uuid), who) is who

    def release(self, domid: int, uuid: str, who: object) -> None:
        if self.held.get((domid, uuid)) is who:
            del self.held[domid, uuid]

    def release_all(self, who: object) -> None:
        """What the kernel does to the locks of a process that dies."""
        self.held = {key: owner for key, owner in self.held.items() if owner is not who}


class _Held:
    def __init__(self, locks: FakeLocks, domid: int, uuid: str, who: object) -> None:
        self._key = (domid, uuid)
        self._locks, self._who = locks, who

    def release(self) -> None:
        self._locks.release(*self._key, self._who)


class DaemonLocks:
    """:class:`xshmd.ports.CreationLock` for one life of the daemon."""

    def __init__(self, locks: FakeLocks) -> None:
        self._locks = locks

    def try_hold(self, domid: DomId, uuid: str) -> HeldLock | None:
        if not self._locks.take(domid, uuid, self):
            return None
        return _Held(self._locks, domid, uuid, self)

    def is_finished(self, domid: DomId, uuid: str) -> bool:
        return (domid, uuid) in self._locks.finished

    def die(self) -> None:
        self._locks.release_all(self)


@dataclasses.dataclass(slots=True)
class Made:
    """A domain that xl made."""

    domid: DomId
    config: GuestConfig


class FakeToolstack:
    """xl.  Every method is one command or one thing that happens to a guest."""

    def __init__(self, xen: SimulatedXen, server: FakeXenstored, locks: FakeLocks) -> None:
        self.xen, self.server, self.locks = xen, server, locks
        self.blocked = 0
        """How often xl had to wait for the creation lock."""
        self.at_step: Callable[[str, DomId], None] = lambda step, domid: None
        for path in ("/local/domain", "/vm", "/libxl"):
            server.write(path, "")

    # -- xl create --------------------------------------------------------------------------------

    async def create(
        self,
        config: GuestConfig,
        *,
        paused: bool = False,
        devices: bool = False,
        fast: bool = False,
    ) -> Made:
        """``xl create``, with ``-p`` if ``paused``.  Raises XlFailed and leaves what libxl leaves.

        Args:
            config: The guest's; without uuid xl chooses one.
            paused: Leave it paused.
            devices: Give it a network device.
            fast: Let no time pass: nobody can hold it up but by the lock.
        """
        if not config.uuid:
            config = dataclasses.replace(config, uuid=str(uuid_module.uuid4()))
        domain = self.xen.make_domain(config.uuid, hap=config.hap)  # libxl__domain_make
        made = Made(domain.domid, config)
        try:
            await self._build(made, domain, devices=devices, step_s=0.0 if fast else STEP_S)
            await self._complete(made, paused=paused)
        except XshmError as error:
            # domcreate_complete -> libxl__domain_destroy: "Non-existent domain", nodes stay
            if self.xen.by_domid.get(made.domid) is domain and not domain.dying:
                await self.destroy(made)
            raise XlFailed(f"xl create {config.name}: {error}") from error
        return made

    async def _step(self, name: str, domain: Domain, seconds: float) -> None:
        self.at_step(name, domain.domid)
        if seconds:
            await trio.sleep(seconds)
        if self.xen.by_domid.get(domain.domid) is not domain or domain.dying:
            raise DomainGone(f"domain {domain.domid} is gone at {name}", call=name)

    async def _build(self, made: Made, domain: Domain, *, devices: bool, step_s: float) -> None:
        config, domid, server = made.config, made.domid, self.server
        server.create_domain(domid)
        await self._step("made", domain, step_s)
        # One transaction: its watches fire when all of it is there (step 3b).
        own = f"n0 r{domid}"
        server.write(f"/local/domain/{domid}", "", permissions=own)
        server.write(f"/local/domain/{domid}/vm", f"/vm/{config.uuid}")
        server.write(f"/local/domain/{domid}/name", config.name)
        server.write(f"/local/domain/{domid}/control/shutdown", "")
        server.write(f"/local/domain/{domid}/data", "", permissions=f"n{domid}")
        server.write(f"/vm/{config.uuid}", "", permissions=own)
        server.write(f"/vm/{config.uuid}/uuid", config.uuid)
        server.write(f"/vm/{config.uuid}/name", config.name)
        server.write(f"/libxl/{domid}", "")
        server.write(f"/libxl/{domid}/type", "pvh")
        await self._step("nodes", domain, step_s)
        server.write(f"/libxl/{domid}/dm-version", "qemu_xen")
        # libxl__build_pre: the pool is set, not enlarged (step 4)
        ram = layout.ram(self.xen.arch, config)
        nr_frames = sum(window.end_gfn - window.first_gfn for window in ram)
        self.xen.set_max_pages(domid, nr_frames + 256)
        overhead = 128 if self.xen.arch is Arch.ARM64 else 0
        pool = 4 * (256 + nr_frames // 256 + overhead) // 4
        self.xen.set_paging_pool_bytes(domid, bytes_of(pool))
        await self._step("pool", domain, step_s)
        for window in ram:
            self.xen.populate(domid, window.first_gfn, window.end_gfn - window.first_gfn)
        if self.xen.arch is Arch.X86_64 and config.hap:
            spans = ((address_of(one.first_gfn), address_of(one.end_gfn)) for one in ram)
            memory = [MemoryRange(start, end - start, MemoryKind.RAM) for start, end in spans]
            write_start_info(self.xen, domid, memory)
        await self._step("memory", domain, step_s)
        server.write(f"/local/domain/{domid}/memory/target", str(config.memory_mib * 1024))
        server.write(f"/local/domain/{domid}/store/port", "1")
        server.introduce(domid)  # libxl__build_post (step 6)
        await self._step("introduced", domain, step_s)
        if devices:
            backend = f"/local/domain/0/backend/vif/{domid}/0"
            server.write(f"{backend}/frontend-id", str(domid))
            server.write(f"/libxl/{domid}/device/vif/0/backend", backend)
            server.write(f"/local/domain/{domid}/device/vif/0/backend", backend)
        await self._step("devices", domain, step_s)

    async def _complete(self, made: Made, *, paused: bool) -> None:
        """domcreate_complete: the lock, the stored configuration, the unpause (11, 12)."""
        domid, uuid = made.domid, made.config.uuid
        domain = self.xen.by_domid.get(domid)
        assert domain is not None
        async with _Locked(self, domid, uuid):
            await self._step("locked", domain, 0)
            self.locks.finished.add((domid, uuid))
        if not paused:
            self.xen.unpause(domid)

    # -- the end ----------------------------------------------------------------------------------

    async def destroy(self, made: Made) -> None:
        """``xl destroy``: libxl__destroy_domid.  Nodes go before the domain."""
        domid, uuid = made.domid, made.config.uuid
        try:
            self.xen.pause(domid)
        except DomainGone:
            return
        except XshmError:
            pass
        for kind in self._children(f"/libxl/{domid}/device"):
            for number in self._children(f"/libxl/{domid}/device/{kind}"):
                backend = self.server.read(f"/libxl/{domid}/device/{kind}/{number}/backend")
                if backend and backend in self.server.nodes:
                    self.server.remove(backend)
        for path in (f"/vm/{uuid}", f"/local/domain/{domid}", f"/libxl/{domid}"):
            if path in self.server.nodes:
                self.server.remove(path)
        async with _Locked(self, domid, uuid):
            self.locks.finished.discard((domid, uuid))
        await trio.sleep(POLL_S)
        try:
            self.xen.destroy(domid)
        except DomainGone:
            return

    def _children(self, path: str) -> tuple[str, ...]:
        node = self.server.nodes.get(path)
        return node.children if node else ()

    def shut_down(self, made: Made, reason: int = SHUTDOWN_POWEROFF) -> None:
        """The guest shuts itself down: the domain stays until somebody destroys it."""
        self.xen.shut_down(made.domid, reason)

    async def end(self, made: Made, reason: int = SHUTDOWN_POWEROFF) -> None:
        """The guest shuts itself down, and xl destroys it."""
        self.shut_down(made, reason)
        await trio.sleep(STEP_S)
        await self.destroy(made)

    async def reboot(self, made: Made, reason: int = SHUTDOWN_REBOOT) -> Made:
        """The guest reboots: xl destroys it, and makes it anew from the same configuration."""
        await self.end(made, reason)
        await trio.sleep(REBOOT_SLEEP_S)
        return await self.create(made.config)

    # -- what xenstored hears of Xen --------------------------------------------------------------

    def domain_exception(self, domid: DomId) -> None:
        """VIRQ_DOM_EXC: xenstored's check_domains() (tools/xenstored/domain.c)."""
        if domid not in self.server.introduced:
            return
        domain = self.xen.by_domid.get(domid)
        if domain is None or domain.dying:
            self.server.release(domid)
        elif domain.shutdown_reason is not None:
            self.server.shut_down(domid)


class _Locked:
    """The userdata lock, as libxl takes it: for as long as it takes."""

    def __init__(self, tools: FakeToolstack, domid: int, uuid: str) -> None:
        self._tools, self._domid, self._uuid = tools, domid, uuid

    async def __aenter__(self) -> None:
        waited = False
        while not self._tools.locks.take(self._domid, self._uuid, self):
            self._tools.blocked += not waited
            waited = True
            await trio.sleep(POLL_S)

    async def __aexit__(self, *_: object) -> None:
        self._tools.locks.release(self._domid, self._uuid, self)
