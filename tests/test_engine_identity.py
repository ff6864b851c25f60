# SPDX-License-Identifier: LGPL-2.1-or-later
"""A domid that has become a stranger's in the middle of something: the stranger never notices."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any, Final

import granted
import pytest
import trio
from fakes.machine import Call
from fakes.objects import Domain
from fakes.toolstack import XlFailed
from fakes.world import Daemon, World, world
from trio.testing import MockClock

from xshmd.changes import AddRegion, AttachRegion, DetachRegion
from xshmd.errors import DomainGone, NoSuchGuest
from xshmd.machine import Arch
from xshmd.model import (
    Backing,
    Isolation,
    Lifetime,
    RegionConfig,
    RegionRequest,
    RegionTerms,
    Transport,
)
from xshmd.policy.identity import is_holder_uuid
from xshmd.units import DomId, Gfn

STRANGER: Final = "99999999-9999-4999-8999-999999999999"
WORDS: Final = b"the stranger's own"
POOL_BYTES: Final = 1 << 21
NEVER: Final = frozenset({"set_max_pages", "populate", "paging_pool_bytes", "map_pages"})
"""What only xl does to a guest; a look at once followed by what it was made for; and a map, which
keeps the domid from being given away."""

SEALED: Final = {"isolation": Isolation.SEALED, "lifetime": Lifetime.MEMBERS}
LENT: Final = {
    "backing": Backing.DOM0, "transport": Transport.GRANT, "lifetime": Lifetime.MEMBERS,
}  # fmt: skip
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
        self.struck = ""
        host.xen.before = lambda call: self._see(call, is_look=True)
        host.xen.after = lambda call: self._see(call, is_look=False)
        for name in ("allocate", "status", "bind"):
            setattr(host.channels, name, self._seen(getattr(host.channels, name)))

    def _seen(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Have a call of the event channels' seen as those of the hypervisor are."""

        def call(domid: DomId, other: int) -> Any:
            result = work(domid, other)
            self._see(Call(work.__name__, 0, (domid, other)), is_look=False)
            return result

        return call

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
        self.struck = guest.uuid
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
        assert len(self._host.channels.ports(domain.domid)) == self._host.channels.taken_at_birth
        for other in self._host.xen.by_domid.values():
            granted = [one for one in other.grants.values() if one.valid]
            assert domain.domid not in [one.domid for one in granted]
        assert self._host.xen.guest_read(domain.domid, 0x40000, 0, len(WORDS)) == WORDS


async def creation(host: World, daemon: Daemon, usurp: Callable[[], None]) -> None:
    usurp()
    with contextlib.suppress(XlFailed, DomainGone, AssertionError):
        await host.tools.create(host.config("a", host.request("r", 3)))


async def creation_with_doorbells(host: World, daemon: Daemon, usurp: Callable[[], None]) -> None:
    usurp()
    with contextlib.suppress(XlFailed, DomainGone, AssertionError):
        await host.tools.create(host.config("a", host.request("r", 3, doorbells=2)))


def on_terms(host: World, **terms: Any) -> RegionRequest:
    return dataclasses.replace(host.request("r", 3), terms=RegionTerms(**terms))


async def creation_sealed(host: World, daemon: Daemon, usurp: Callable[[], None]) -> None:
    await host.tools.create(host.config("b", on_terms(host, **SEALED)))
    await host.until(lambda: daemon.guest("b") is not None)
    usurp()
    with contextlib.suppress(XlFailed, DomainGone, AssertionError):
        await host.tools.create(host.config("a", host.borrow("r", 3)))


async def creation_granted(host: World, daemon: Daemon, usurp: Callable[[], None]) -> None:
    usurp()
    with contextlib.suppress(XlFailed, DomainGone, AssertionError):
        await host.tools.create(host.config("a", granted.owned(host, "r", 3)))


async def creation_lent(host: World, daemon: Daemon, usurp: Callable[[], None]) -> None:
    usurp()
    with contextlib.suppress(XlFailed, DomainGone, AssertionError):
        await host.tools.create(host.config("a", on_terms(host, **LENT)))


async def detach_sealed(host: World, daemon: Daemon, usurp: Callable[[], None]) -> None:
    await _detach(host, daemon, usurp, on_terms(host, **SEALED))


async def detach_granted(host: World, daemon: Daemon, usurp: Callable[[], None]) -> None:
    await _detach(host, daemon, usurp, granted.owned(host, "r", 3))


async def detach_lent(host: World, daemon: Daemon, usurp: Callable[[], None]) -> None:
    await _detach(host, daemon, usurp, on_terms(host, **LENT))


async def _detach(
    host: World, daemon: Daemon, usurp: Callable[[], None], request: RegionRequest
) -> None:
    made = await host.tools.create(host.config("a", request))
    await host.until(lambda: host.running(made))
    usurp()
    with contextlib.suppress(DomainGone, NoSuchGuest):
        await daemon.engine.apply([DetachRegion(guest="a", region_id="r")])


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


SCENARIOS: Final[list[Scenario]] = [
    creation, creation_with_doorbells, creation_sealed, creation_granted, creation_lent, refusal,
    detach, detach_sealed, detach_granted, detach_lent, attach,
]  # fmt: skip


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
                known = [daemon.guest(name) for name in ("a", "b")]
                assert usurpers[0].struck not in [guest.uuid for guest in known if guest]
            else:
                assert (daemon.guest("a") is None) == (scenario is refusal)

    trio.run(main, clock=MockClock(autojump_threshold=0))
    return usurpers[0].calls


@pytest.mark.parametrize("arch", list(Arch), ids=str)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_the_stranger_never_notices(scenario: Scenario, arch: Arch) -> None:
    calls = play(scenario, arch, 0)
    assert calls, "there was nothing to usurp"
    for strike_at in range(1, calls + 1):
        try:
            play(scenario, arch, strike_at)
        except BaseException as problem:
            problem.add_note(f"strike {strike_at} of {calls}")
            raise
