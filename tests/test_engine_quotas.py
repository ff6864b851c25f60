# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the administrator does not allow nobody gets, whoever asks; and each refusal is counted."""

from __future__ import annotations

import pytest
from fakes.toolstack import XlFailed
from fakes.world import World, world
from trio.testing import MockClock

from xshmd.changes import AddRegion, AttachRegion, DetachRegion, RemoveRegion
from xshmd.errors import ConfigError, OutOfMemory, Refused, XshmError
from xshmd.events import EventKind
from xshmd.host_policy import Allowed, HostPolicy, Limit, Limits
from xshmd.model import Place, Process, Prot, RegionConfig

AT = Place(file="/etc/xshmd/xshmd.toml", key="limits.x", line=2)


def limits(**values: int) -> HostPolicy:
    return HostPolicy(
        limits=Limits(**{key: Limit(value=value, place=AT) for key, value in values.items()})
    )


def region(region_id: str, frames: int = 3) -> AddRegion:
    return AddRegion(config=RegionConfig(region_id=region_id, nr_frames=frames))


async def refused(host: World, name: str, *regions: str) -> None:
    """Fail unless xl cannot make a guest with these regions."""
    requests = [host.request(one, at=64 * number) for number, one in enumerate(regions)]
    with pytest.raises(XlFailed):
        await host.tools.create(host.config(name, *requests))


async def test_a_guest_is_refused_and_the_rule_is_said(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        host.finder.rules = limits(regions_per_guest=1)
        a = await host.tools.create(host.config("a", host.request("r")))
        async with daemon.engine.monitor() as events:
            await refused(host, "b", "s", "t")
            event = await events.receive()
        assert event.kind is EventKind.GUEST_REFUSED
        assert event.rules == ("too-many-regions-of-guest",)
        assert "/etc/xshmd/xshmd.toml:2" in event.reason
        assert daemon.engine.statistics()["refusals_too-many-regions-of-guest"] == 1
        host.finder.rules = limits()
        b = await host.tools.create(host.config("b", host.request("s"), host.request("t", at=64)))
        await host.tools.destroy(a)
        await host.tools.destroy(b)
        await host.check_clean()


async def test_a_client_is_refused_as_a_guest_is(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        host.finder.rules = limits(regions=1, memory=4)
        await daemon.engine.apply([region("r")])
        with pytest.raises(Refused) as caught:
            await daemon.engine.apply([region("s")])
        assert {part.facts["rule"] for part in caught.value.parts} == {
            "too-many-regions", "too-much-memory",
        }  # fmt: skip
        # In one set one may come for another that goes.
        await daemon.engine.apply([RemoveRegion(region_id="r"), region("s", 4)])
        with pytest.raises(Refused):
            await daemon.engine.apply([region("t", 1)], dry_run=True)
        figures = daemon.engine.statistics()
        assert figures["refusals_too-many-regions"] == 1
        assert figures["refusals_too-much-memory"] == 1
        await daemon.engine.apply([RemoveRegion(region_id="s")])
        await host.check_clean()


async def test_an_attach_to_a_running_guest(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        host.finder.rules = HostPolicy(
            allowed=(Allowed(name="x", guests=("a",), place=AT), Allowed(name="y", guests=("b",)))
        )
        a = await host.tools.create(host.config("a", host.request("r")))
        b = await host.tools.create(host.config("b", host.request("s")))
        attach = AttachRegion(guest="b", request=host.borrow("r", at=64))
        with pytest.raises(XshmError):  # two groups that live: said before, and by another rule
            await daemon.engine.apply([attach])
        await host.tools.destroy(b)
        late = await host.tools.create(host.config("late", file=False))
        with pytest.raises(Refused) as caught:
            await daemon.engine.apply([AttachRegion(guest="late", request=host.borrow("r", at=64))])
        assert {part.facts["rule"] for part in caught.value.parts} >= {"not-allowed"}
        for made in (a, late):
            await host.tools.destroy(made)
        await host.check_clean()


async def test_a_guest_that_files_link_to_a_group_is_in_it(autojump_clock: MockClock) -> None:
    """Though the guest that links the two is not there: they have one holder from the start."""
    async with world() as host:
        await host.start()
        allowed = (
            Allowed(name="x", guests=("a", "b"), place=AT),
            Allowed(name="y", guests=("b", "c"), place=AT),
        )
        host.finder.rules = HostPolicy(allowed=allowed)
        a = await host.tools.create(host.config("a", host.request("r")))
        linking = host.config("b", host.borrow("r"), host.request("s", at=64))
        with pytest.raises(XlFailed):
            await host.tools.create(host.config("c", host.borrow("s")))
        del host.finder.files["b"], host.finder.files["c"]
        c = await host.tools.create(host.config("c", host.request("s")))
        for made in (a, c):
            await host.tools.destroy(made)
        assert linking.requests
        await host.check_clean()


async def test_who_reboots_finds_what_he_had_whatever_the_limits_are_by_now(
    autojump_clock: MockClock,
) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(host.config("a", host.request("r")))
        host.finder.rules = HostPolicy(
            limits=limits(regions=0, memory=0, regions_per_guest=0).limits,
            allowed=(Allowed(name="x", guests=("nobody",), place=AT),),
        )
        a = await host.tools.reboot(a)
        await host.until(lambda: daemon.is_attached("a"))
        assert host.missing(a.domid, a.config) == ""
        await refused(host, "b", "s")
        await host.tools.destroy(a)
        await host.check_clean()


async def test_a_policy_that_is_wrong_lets_nobody_in_and_everybody_out(
    autojump_clock: MockClock,
) -> None:
    async with world() as host:
        daemon = await host.start()
        await daemon.engine.apply([region("t")])
        a = await host.tools.create(host.config("a", host.request("r")))
        b = await host.tools.create(host.config("b", host.borrow("r")))
        host.finder.rules = ConfigError("xshmd.toml:1: nonsense", rule="unknown-key")
        await refused(host, "c", "s")
        with pytest.raises(ConfigError, match="nonsense"):
            await daemon.engine.apply([region("s")])
        with pytest.raises(ConfigError, match="nonsense"):
            await daemon.engine.reload()
        with pytest.raises(ConfigError, match="nonsense"):
            async with daemon.engine.lease("r", Prot.RO, Process(pid=7, uid=0)):
                pass
        assert daemon.engine.statistics()["refusals_unknown-key"] == 4
        a = await host.tools.reboot(a)
        await host.until(lambda: daemon.is_attached("a"))
        assert host.missing(a.domid, a.config) == ""
        del host.finder.files["b"]  # or it would be missed where it is taken away
        await daemon.engine.apply([DetachRegion(guest="b", region_id="r")])
        await daemon.engine.apply([RemoveRegion(region_id="t")])
        for made in (a, b):
            await host.tools.destroy(made)
        await host.check_clean()


async def test_the_hosts_free_memory(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        host.finder.rules = limits(free_memory=host.xen.free_pages - 10)
        with pytest.raises(OutOfMemory) as caught:
            await daemon.engine.apply([region("r", 11)])
        assert caught.value.facts["rule"] == "free-memory-floor"
        await daemon.engine.apply([region("r", 10)])
        await daemon.engine.apply([RemoveRegion(region_id="r")])
        await host.check_clean()


async def test_leases(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        await daemon.engine.apply([region("r")])
        host.finder.rules = limits(leases=0)
        with pytest.raises(Refused) as caught:
            async with daemon.engine.lease("r", Prot.RO, Process(pid=7, uid=0)):
                pass
        assert caught.value.facts["rule"] == "too-many-leases"
        assert daemon.engine.statistics()["refusals_too-many-leases"] == 1
        await daemon.engine.apply([RemoveRegion(region_id="r")])
        await host.check_clean()
