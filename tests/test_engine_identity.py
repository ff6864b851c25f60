# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domid that has become a stranger's in the middle of something: the stranger never notices."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

import pytest
import trio
from fakes.machine import Call
from fakes.objects import Domain
from fakes.toolstack import XlFailed
from fakes.world import Daemon, World, world
from trio.testing import MockClock

from xshmd.errors import DomainGone, NoSuchGuest
from xshmd.model import AddRegion, Arch, AttachRegion, DetachRegion, RegionConfig
from xshmd.policy.identity import is_holder_uuid
from xshmd.units import DomId, Gfn

STRANGER: Final = "99999999-9999-4999-8999-999999999999"
WORDS: Final = b"the stranger's own"
POOL_BYTES: Final = 1 << 21
NEVER: Final = frozenset({"set_max_pages", "populate", "paging_pool_bytes", "map_pages"})
"""What only xl does to a guest; a look at once followed by what it was made for; and a map, which
keeps the domid from being given away."""

Scenario = Callable[[World, Daemon, Callable[[], None]], Awaitable[None]]


class Usurper:
    """Ends a guest at the n-th of the daemon's calls to do with it, and gives its domid away.

    Before a look at the guest (whatever was awaited before it took that long), or after any other
    call.  Between a look and the call it was made for there is nothing that could take time.
    """

    def __init__(self, host: World, strike_at: int) -> None:
        self._host, self._strike_at = host, strike_at
        self.calls = 0
        self.domain: Domain | None = None
        host.xen.before = lambda call: self._see(call, is_look=True)
        host.xen.after = lambda call: self._see(call, is_look=False)

    def _see(self, call: Call, *, is_look: bool) -> None:
        domid = call.arguments[0] if call.arguments else None
        domain = self._host.xen.by_domid.get(DomId(domid)) if isinstance(domid, int) else None
        if self.domain or domain is None or is_holder_uuid(domain.uuid) or domid == 0:
            return
        if (call.kind == "domain_info") != is_look or call.kind in NEVER:
            return
        self.calls += 1
        if self.calls == self._strike_at:
            self._strike(domain)

    def _strike(self, guest: Domain) -> None:
        xen, server, domid = self._host.xen, self._host.server, guest.domid
        self.domain = guest  # no second strike while this one is under way
        if xen.by_domid.get(domid) is guest:
            xen.destroy(domid)
        if domid in xen.by_domid:
            return  # a page of it is mapped: that is what anchors are for
        for path in (f"/local/domain/{domid}", f"/libxl/{domid}"):
            if path in server.nodes:
                server.remove(path)
        xen.next_domid = domid
        self.domain = xen.make_domain(STRANGER)
        assert self.domain.domid == domid
        xen.set_paging_pool_bytes(domid, POOL_BYTES)
        xen.set_max_pages(domid, 4)
        xen.populate(domid, Gfn(0x40000), 1)
        xen.guest_write(domid, 0x40000, 0, WORDS)

    def unharmed(self) -> None:
        """Fail unless the stranger is as it was made: paused once, by its own toolstack."""
        domain = self.domain
        assert domain is not None, "nothing was usurped"
        if domain.uuid != STRANGER:
            return
        assert self._host.xen.by_domid.get(domain.domid) is domain
        assert (domain.uuid, domain.pauses, domain.dying) == (STRANGER, 1, False)
        assert (domain.target, domain.shutdown_reason) == (None, None)
        assert domain.pool_pages << 12 == POOL_BYTES
        assert self._host.xen.foreign_frames(domain.domid) == {}
        assert self._host.xen.guest_read(domain.domid, 0x40000, 0, len(WORDS)) == WORDS


async def creation(host: World, daemon: Daemon, usurp: Callable[[], None]) -> None:
    usurp()
    with contextlib.suppress(XlFailed, DomainGone, AssertionError):
        await host.tools.create(host.config("a", host.request("r", 3)))


async def refusal(host: World, daemon: Daemon, usurp: Callable[[], None]) -> None:
    usurp()
    with contextlib.suppress(XlFailed, DomainGone, AssertionError):
        await host.tools.create(host.config("a", host.borrow("nobodys", 3)))


async def detach(host: World, daemon: Daemon, usurp: Callable[[], None]) -> None:
    made = await host.tools.create(host.config("a", host.request("r", 3)))
    await host.until(lambda: host.running(made))
    usurp()
    with contextlib.suppress(DomainGone, NoSuchGuest):
        await daemon.engine.apply([DetachRegion(guest="a", region_id="r")])


async def attach(host: World, daemon: Daemon, usurp: Callable[[], None]) -> None:
    made = await host.tools.create(host.config("a"))
    await host.until(lambda: host.running(made))
    wanted = host.borrow("n", 2, at=64)
    usurp()
    config = RegionConfig(region_id="n", nr_frames=2)
    with contextlib.suppress(DomainGone, NoSuchGuest):
        await daemon.engine.apply(
            [AddRegion(config=config), AttachRegion(guest="a", request=wanted)]
        )


def play(scenario: Scenario, arch: Arch, strike_at: int) -> int:
    """Play a scenario with a usurpation in it; return how many there could have been."""
    usurpers: list[Usurper] = []

    async def main() -> None:
        async with world(arch) as host:
            daemon = await host.start()
            await scenario(host, daemon, lambda: usurpers.append(Usurper(host, strike_at)))
            await trio.sleep(60)
            if strike_at:
                usurpers[0].unharmed()
                assert daemon.guest("a") is None

    trio.run(main, clock=MockClock(autojump_threshold=0))
    return usurpers[0].calls


@pytest.mark.parametrize("arch", list(Arch), ids=str)
@pytest.mark.parametrize("scenario", [creation, refusal, detach, attach], ids=lambda s: s.__name__)
def test_the_stranger_never_notices(scenario: Scenario, arch: Arch) -> None:
    calls = play(scenario, arch, 0)
    assert calls > 3
    for strike_at in range(1, calls + 1):
        try:
            play(scenario, arch, strike_at)
        except BaseException as problem:
            problem.add_note(f"strike {strike_at} of {calls}")
            raise
