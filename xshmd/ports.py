# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the engine needs of the outside, as Protocols: the seam the verified fakes plug into.

``xshmd.xen`` implements :class:`Hypervisor` and :class:`Store` for real; ``tests/fakes`` implements
them for tests.  Nothing here knows cffi, sockets or paths of this machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

import trio

from xshmd.model import DomainInfo, Guest, GuestConfig, HostInfo, Snapshot
from xshmd.units import DomId, Gfn

T = TypeVar("T")


class PageMap(Protocol):
    """A dom0 mapping of some domain's frames, which keeps those pages (and the domid) alive."""

    def read(self, offset_bytes: int, nr_bytes: int) -> bytes: ...

    def write(self, offset_bytes: int, data: bytes) -> None: ...

    def close(self) -> None:
        """Drop the mapping; may be called again without harm."""
        ...


class Hypervisor(Protocol):
    """Xen's control interface.  Synchronous and total: records in, records or an XshmError out.

    Every call may raise :class:`~xshmd.errors.HypercallFailed` (``DomainGone`` for ESRCH).
    Calls block for as long as Xen takes: run them in a thread.
    """

    def host_info(self) -> HostInfo: ...

    def domain_info(self, domid: DomId) -> DomainInfo | None:
        """Return the domain with exactly this domid, or None if there is none."""
        ...

    def domains(self) -> tuple[DomainInfo, ...]:
        """Return every domain, dom0 included, in domid order."""
        ...

    def create_holder_domain(self, uuid: str) -> DomId:
        """Create a domain by the holder recipe: vCPU 0 there, never to run, owning no page."""
        ...

    def destroy(self, domid: DomId) -> None:
        """Destroy the domain; returns when its own foreign references are gone."""
        ...

    def pause(self, domid: DomId) -> None:
        """Add one to the domain's pause count and wait until none of its vCPUs runs."""
        ...

    def unpause(self, domid: DomId) -> None:
        """Take one from the domain's pause count."""
        ...

    def shut_down(self, domid: DomId, reason: int) -> None: ...

    def set_target(self, domid: DomId, target: DomId) -> None:
        """Make ``domid`` privileged over ``target``: once in its life, never undone."""
        ...

    def set_max_pages(self, domid: DomId, nr_pages: int) -> None: ...

    def paging_pool_bytes(self, domid: DomId) -> int: ...

    def set_paging_pool_bytes(self, domid: DomId, size_bytes: int) -> None: ...

    def populate(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> None:
        """Give the domain fresh pages at these frames, all of them or (on error) none."""
        ...

    def depopulate(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> int:
        """Free the domain's pages at these frames; return how many there were."""
        ...

    def zero(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> None:
        """Overwrite the frames with zeros and make that visible to uncached readers."""
        ...

    def map_foreign(
        self, guest: DomId, first_gfn: Gfn, holder: DomId, holder_gfn: Gfn, nr_frames: int
    ) -> None:
        """Map the holder's frames into the guest, all of them or (on error) none.

        Raises:
            PartialMap: an entry failed; facts name the first and its errno; all is undone.
        """
        ...

    def unmap(self, guest: DomId, first_gfn: Gfn, nr_frames: int) -> int:
        """Remove whatever the guest has at these frames; return how many there were."""
        ...

    def populated_frames(self, domid: DomId, gfns: Sequence[Gfn]) -> tuple[Gfn, ...]:
        """Return those of ``gfns`` at which dom0 can map a page of the domain."""
        ...

    def map_pages(
        self, domid: DomId, first_gfn: Gfn, nr_frames: int, *, writable: bool
    ) -> PageMap: ...


@dataclasses.dataclass(frozen=True, slots=True)
class WatchEvent:
    """Something at or below a watched path may have changed.  A hint: read again what matters."""

    path: str


class StoreTransaction(Protocol):
    """Reads and writes of one transaction; see :meth:`Store.transact`."""

    async def read(self, path: str) -> str | None: ...

    async def directory(self, path: str) -> tuple[str, ...] | None: ...

    async def write(self, path: str, value: str) -> None: ...

    async def remove(self, path: str) -> None: ...

    async def set_permissions(self, path: str, permissions: Sequence[str]) -> None: ...


class Store(StoreTransaction, Protocol):
    """xenstore.  Every call raises StoreLost when the connection breaks, TimedOut past a deadline.

    ``read`` and ``directory`` return None for a node that is not there; ``remove`` of such a node
    does nothing.  Values are text.
    """

    messages_sent: int
    """How many requests went over the wire since the start: a published figure."""

    async def read_many(self, paths: Sequence[str]) -> tuple[str | None, ...]:
        """Read several nodes in one go (pipelined); same order as ``paths``."""
        ...

    async def write_many(self, items: Sequence[tuple[str, str]]) -> None:
        """Write several nodes in one go (pipelined, in this order, not atomic)."""
        ...

    async def is_introduced(self, domid: DomId) -> bool:
        """Return whether the toolstack has introduced the domain to xenstored."""
        ...

    async def transact(self, body: Callable[[StoreTransaction], Awaitable[T]]) -> T:
        """Run ``body`` in a transaction, again from the start for as long as it conflicts."""
        ...

    def watch(
        self, path: str
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[WatchEvent]]:
        """Watch a path.  One event comes at once; after a reconnect each watch fires again."""
        ...


class Clock(Protocol):
    """Wall time, injected so that a reboot's grace can be tested without waiting."""

    def now(self) -> float:
        """Return seconds since the epoch."""
        ...


class ConfigFinder(Protocol):
    """Finds what a new domain's configuration says about shared memory."""

    def find(self, *, name: str, uuid: str) -> GuestConfig | None:
        """Return the configuration of the guest of this name, or None if nobody has one.

        Raises:
            ConfigError, ConfigUnreadable: it was found, and is wrong.
        """
        ...

    def known(self) -> tuple[GuestConfig, ...]:
        """Return every readable configuration with shared memory in the usual places."""
        ...


class HeldLock(Protocol):
    """A lock that is held."""

    def release(self) -> None:
        """Let go of it; may be called again without harm."""
        ...


class CreationLock(Protocol):
    """libxl's lock on a domain's stored configuration: without it ``xl create`` cannot end."""

    def try_hold(self, domid: DomId, uuid: str) -> HeldLock | None:
        """Hold it, or return None at once if somebody else does."""
        ...

    def is_finished(self, domid: DomId, uuid: str) -> bool:
        """Return whether libxl has stored the configuration: all but the unpause is done."""
        ...


class RegionsApi(Protocol):
    """What the daemon offers to its clients; the Varlink service is a thin skin over this."""

    def snapshot(self) -> Snapshot: ...

    async def declare(self, config: GuestConfig) -> None:
        """Check this configuration and use it for the next domain of its name.

        Raises:
            ConfigError, Refused, Conflict, OutOfMemory: it cannot be given; nothing is kept.
        """
        ...

    async def withdraw(self, name: str) -> None:
        """Forget a declaration that no domain has used; does nothing if there is none."""
        ...

    async def wait_guest(self, name: str, timeout_s: float) -> Guest:
        """Return the guest once it has its regions.

        Raises:
            TimedOut: it did not get them in time.
            Refused, Conflict, ...: it could not be given them; the reason the gate had.
        """
        ...

    async def host(self) -> HostInfo: ...
