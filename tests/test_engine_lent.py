# SPDX-License-Identifier: LGPL-2.1-or-later
"""Regions of dom0's own memory, from their first guest to their last, through the engine."""

from __future__ import annotations

import dataclasses

import pytest
from fakes.grants import GrantedMap
from fakes.objects import GrantEntry
from fakes.toolstack import Made, XlFailed
from fakes.world import Daemon, World, world
from structlog.testing import capture_logs
from trio.testing import MockClock

from xshmd.changes import AddRegion, AttachRegion, DetachRegion, RemoveRegion
from xshmd.errors import Conflict, HypercallFailed, Refused
from xshmd.machine import Arch
from xshmd.model import (
    Backing,
    Lifetime,
    Process,
    Prot,
    RegionConfig,
    RegionRequest,
    RegionTerms,
    Transport,
)
from xshmd.policy.grants import MAX_RANGES
from xshmd.units import DomId

FRAMES = 5
TERMS = RegionTerms(transport=Transport.GRANT, backing=Backing.DOM0)
SECRET = b"of dom0"
DOM0 = DomId(0)


def defined(frames: int = FRAMES, **more: object) -> AddRegion:
    terms = dataclasses.replace(TERMS, **more)  # type: ignore[arg-type]
    return AddRegion(config=RegionConfig(region_id="l", nr_frames=frames, terms=terms))


def wanted(there: World, prot: Prot = Prot.RW, region_id: str = "l") -> RegionRequest:
    return dataclasses.replace(there.borrow(region_id, FRAMES), prot=prot)


async def with_region(there: World) -> Daemon:
    """Start a daemon and make the region, with something in it."""
    daemon = await there.start()
    await daemon.engine.apply([defined()])
    await daemon.engine.write_region("l", 4096 - 3, SECRET)
    return daemon


async def contents(daemon: Daemon, nr_bytes: int = len(SECRET)) -> bytes:
    return await daemon.engine.read_region("l", 4096 - 3, nr_bytes)


def mapped(there: World, made: Made, *, writable: bool = True) -> GrantedMap:
    """Map all of it as a guest does: by what its node says."""
    ((holder, first, count),) = there.grants_told(made.domid, "l")
    assert holder == 0
    return there.xen.guest_map_grants(made.domid, holder, first, count, writable=writable)


async def remove(there: World, daemon: Daemon) -> None:
    await daemon.engine.apply([RemoveRegion(region_id="l", force=True)])
    await there.check_clean()


@pytest.mark.parametrize("arch", list(Arch), ids=str)
async def test_dom0_and_a_guest_see_the_same_memory(arch: Arch, autojump_clock: MockClock) -> None:
    """Under SILO too, which Arm's Xen has by itself; no holder is made for it."""
    async with world(arch) as there:
        daemon = await with_region(there)
        a = await there.tools.create(there.config("a", wanted(there)))
        assert there.holders() == []
        view = mapped(there, a)
        assert view.read(4096 - 3, len(SECRET)) == SECRET
        view.write(4096 - 3, b"of a   ")
        assert await contents(daemon) == b"of a   "
        await daemon.engine.write_region("l", 0, b"again")
        assert view.read(0, 5) == b"again"
        assert (there.server.read(f"/local/domain/{a.domid}/xshm/l") or "").endswith(
            " backing=dom0 cache=write-back"
            f" memory_map={'unchanged' if arch is Arch.ARM64 else 'reserved'}"
            f" grants=0:8+{FRAMES} peer=0"
        )
        await there.tools.end(a)
        assert await contents(daemon) == b"of a   "
        await remove(there, daemon)


async def test_prot_ro_is_enforced_and_nobody_else_maps_it(autojump_clock: MockClock) -> None:
    async with world() as there:
        daemon = await with_region(there)
        a = await there.tools.create(there.config("a", wanted(there, Prot.RO)))
        stranger = await there.tools.create(there.config("b", file=False))
        with pytest.raises(HypercallFailed):
            mapped(there, a, writable=True)
        assert mapped(there, a, writable=False).read(4096 - 3, len(SECRET)) == SECRET
        with pytest.raises(HypercallFailed):
            there.xen.guest_map_grants(stranger.domid, DOM0, 8, 1, writable=False)
        for made in (a, stranger):
            await there.tools.end(made)
        await remove(there, daemon)


async def test_it_stays_through_a_reboot_on_other_pages(autojump_clock: MockClock) -> None:
    async with world() as there:
        daemon = await with_region(there)
        a = await there.tools.create(there.config("a", wanted(there)))
        mapped(there, a).write(4096 - 3, b"before!")
        await there.tools.end(a, 1)
        await there.until(lambda: there.keeper.names == {f"parked.l.{generation_of(daemon)}"})
        assert there.xen.by_domid[DOM0].grants == {}, "its domid may come again"
        again = await there.tools.create(a.config)
        assert again.domid != a.domid
        assert mapped(there, again).read(4096 - 3, 7) == b"before!"
        await there.tools.end(again)
        await remove(there, daemon)


def generation_of(daemon: Daemon) -> str:
    record = daemon.guest("a")
    assert record is not None
    return record.generation


async def test_it_outlives_the_daemon(autojump_clock: MockClock) -> None:
    async with world() as there:
        daemon = await with_region(there)
        a = await there.tools.create(there.config("a", wanted(there)))
        view = mapped(there, a)
        await daemon.kill()
        view.write(4096 - 3, b"between")
        daemon = await there.start()
        assert await contents(daemon) == b"between"
        view.close()
        assert mapped(there, a).read(4096 - 3, 7) == b"between"
        await there.tools.end(a)
        await remove(there, daemon)


async def test_a_guest_that_ends_while_no_daemon_runs(autojump_clock: MockClock) -> None:
    """Whoever has its domid next maps nothing from the moment when a daemon is there."""
    async with world() as there:
        daemon = await with_region(there)
        a = await there.tools.create(there.config("a", wanted(there)))
        mapped(there, a).write(4096 - 3, b"at last")
        await daemon.kill()
        await there.tools.end(a)
        there.xen.next_domid = a.domid
        b = await there.tools.create(there.config("b", file=False))
        assert b.domid == a.domid
        daemon = await there.start()
        with pytest.raises(HypercallFailed):
            there.xen.guest_map_grants(b.domid, DOM0, 8, 1, writable=False)
        assert await contents(daemon) == b"at last"
        await there.tools.end(b)
        await remove(there, daemon)


async def test_it_is_given_to_and_taken_from_a_guest_that_runs(autojump_clock: MockClock) -> None:
    """What the guest still has mapped it keeps; nobody sees what it writes there."""
    async with world() as there:
        daemon = await with_region(there)
        a = await there.tools.create(there.config("a", file=False))
        before = there.xen.counts.get("pause", 0)
        attach = AttachRegion(guest="a", request=wanted(there))
        await daemon.engine.apply([attach])
        view = mapped(there, a)
        view.write(4096 - 3, b"mapped!")
        with capture_logs() as said:
            await daemon.engine.apply([DetachRegion(guest="a", region_id="l")])
        assert [one for one in said if one["log_level"] not in ("info", "debug")] == []
        assert there.server.read(f"/local/domain/{a.domid}/xshm/l") is None
        assert view.read(4096 - 3, 7) == bytes(7), "it was wiped"
        view.write(4096 - 3, b"unseen!")
        assert await contents(daemon) == b"mapped!"
        await daemon.engine.apply([attach])
        assert there.grants_told(a.domid, "l") == [(0, 8 + FRAMES, FRAMES)]
        assert mapped(there, a).read(4096 - 3, 7) == b"mapped!"
        view.close()
        await daemon.engine.apply([DetachRegion(guest="a", region_id="l")])
        assert there.xen.counts.get("pause", 0) == before, "no guest had to stand still"
        await there.tools.end(a)
        await remove(there, daemon)


async def test_what_the_kernel_does_not_lend_is_refused_beforehand(
    autojump_clock: MockClock,
) -> None:
    async with world() as there:
        daemon = await there.start()
        there.xen.gntalloc_limit = FRAMES - 1
        with pytest.raises(Refused, match="lends 16 KiB in all, of which 0 B are") as caught:
            await daemon.engine.apply([defined()])
        assert caught.value.facts["rule"] == "lends-too-much"
        assert "/sys/module/xen_gntalloc/parameters/limit" in caught.value.hint
        there.xen.gntalloc_limit = 0
        with pytest.raises(Refused, match="no gntalloc") as caught:
            await daemon.engine.apply([defined()], dry_run=True)
        assert caught.value.hint == "modprobe xen-gntalloc"
        assert daemon.engine.snapshot().regions == ()
        there.xen.gntalloc_limit = FRAMES
        await daemon.engine.apply([defined()])
        there.xen.gntalloc_limit -= 1  # others have lent it
        with pytest.raises(XlFailed):
            await there.tools.create(there.config("a", wanted(there)))
        with pytest.raises(HypercallFailed) as failed:
            await daemon.engine.wait_guest("a", 1)
        assert "lends no more" in failed.value.hint
        await remove(there, daemon)


async def test_references_that_cannot_be_told_are_not_given(autojump_clock: MockClock) -> None:
    """Others have every second of the first: the ranges would be too many for a guest's node."""
    async with world() as there:
        daemon = await there.start()
        await daemon.engine.apply([defined(MAX_RANGES + 1)])
        taken = {ref: GrantEntry() for ref in range(8, 10 + 2 * MAX_RANGES, 2)}
        there.xen.by_domid[DOM0].grants |= taken
        request = dataclasses.replace(wanted(there), nr_frames=MAX_RANGES + 1)
        with pytest.raises(XlFailed):
            await there.tools.create(there.config("a", request))
        assert daemon.engine.statistics()["refusals_scattered-references"] == 1
        assert there.xen.by_domid[DOM0].grants == taken
        taken.clear()
        there.xen.by_domid[DOM0].grants.clear()
        a = await there.tools.create(there.config("a", request))
        assert there.grants_told(a.domid, "l") == [(0, 8, MAX_RANGES + 1)]
        await there.tools.end(a)
        await remove(there, daemon)


async def test_one_guest_has_it(autojump_clock: MockClock) -> None:
    async with world() as there:
        daemon = await with_region(there)
        a = await there.tools.create(there.config("a", wanted(there)))
        with pytest.raises(XlFailed):
            await there.tools.create(there.config("b", wanted(there)))
        assert daemon.engine.statistics()["refusals_lent-to-one"] == 1
        await there.tools.end(a)
        there.config("a")
        b = await there.tools.create(there.config("b", wanted(there)))
        assert mapped(there, b).read(4096 - 3, len(SECRET)) == SECRET
        await there.tools.end(b)
        await remove(there, daemon)


async def test_no_other_process_maps_it(autojump_clock: MockClock) -> None:
    async with world() as there:
        daemon = await with_region(there)
        with pytest.raises(Refused, match="own memory"):
            async with daemon.engine.lease("l", Prot.RO, Process(pid=1, uid=0)):
                pass
        await remove(there, daemon)


async def test_without_a_keeper(autojump_clock: MockClock) -> None:
    """It is refused; and where a keeper was ended under a guest that is told, and goes no further
    than the guest's life."""
    async with world() as there:
        daemon = await there.start()
        await daemon.engine.apply([defined()])
        assert await contents(daemon) == bytes(len(SECRET))
        there.keeper.runs = False
        with pytest.raises(XlFailed):
            await there.tools.create(there.config("a", wanted(there)))
        there.keeper.runs = True
        a = await there.tools.create(there.config("a", wanted(there)))
        view = mapped(there, a)
        there.keeper.end()
        with pytest.raises(Conflict, match="keeps nothing"):
            await contents(daemon)
        view.write(0, b"alone")
        await daemon.kill()
        with capture_logs() as said:
            daemon = await there.start()
        assert [one["region"] for one in said if one["event"] == "contents lost"] == ["l"]
        view.close()
        await there.tools.end(a)
        b = await there.tools.create(there.config("a", wanted(there)))
        assert mapped(there, b).read(0, 5) == bytes(5)
        await there.tools.end(b)
        await remove(there, daemon)


async def test_what_was_lent_to_a_guest_that_nobody_knows_is_taken_back(
    autojump_clock: MockClock,
) -> None:
    """As to one whose record went because it ran before it had its regions."""
    async with world() as there:
        daemon = await with_region(there)
        stranger = await there.tools.create(there.config("b", file=False))
        (region,) = daemon.engine.snapshot().regions
        name = "lent.l.0123456789abcdef"
        there.keeper.lend(name, region.kept, stranger.domid, FRAMES, readonly=False)
        await daemon.engine._ledger.put_region(dataclasses.replace(region, kept=name))
        there.keeper.drop(region.kept, wipe=True)
        await there.tools.end(stranger)  # anything that has the daemon look
        await there.until(lambda: not there.xen.by_domid[DOM0].grants)
        assert await contents(daemon) == SECRET
        await remove(there, daemon)


async def test_it_ends_with_its_members_where_that_is_said(autojump_clock: MockClock) -> None:
    async with world() as there:
        daemon = await there.start()
        request = dataclasses.replace(
            there.request("l", FRAMES), terms=dataclasses.replace(TERMS, lifetime=Lifetime.MEMBERS)
        )
        a = await there.tools.create(there.config("a", request))
        mapped(there, a).write(0, SECRET)
        assert daemon.engine.snapshot().regions[0].owner == "a"
        await there.tools.end(a)
        await there.check_clean()
