# SPDX-License-Identifier: LGPL-2.1-or-later
"""No frame of a region goes while a process of dom0 has a lease of it; and no lease is for ever."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import trio
from fakes.world import world
from hot_changes import add, remove
from lease_words import PROCESS, Program, leased, leased_of_guest, leased_of_system, regions
from trio.testing import MockClock

from xshmd.engine import leases, reconciler
from xshmd.errors import Conflict, NoSuchRegion, Refused
from xshmd.events import EventKind
from xshmd.model import Isolation, Lifetime, Prot, RegionTerms


@pytest.mark.parametrize("end", [Program.let_go, Program.die], ids=["lets go", "dies"])
async def test_a_region_stays_for_its_last_lease(
    autojump_clock: MockClock, end: Callable[[Program], None]
) -> None:
    async with leased_of_guest(Prot.RW) as (host, daemon, program, a):
        (lease,) = leased(daemon)
        assert (lease.region_id, lease.prot, lease.process) == ("r", Prot.RW, PROCESS)
        await host.tools.destroy(a)
        await trio.sleep(100)
        assert regions(daemon) == ["r"]
        assert program.has
        assert program.told == ""  # a member as good as any
        end(program)


async def test_an_owner_that_ends_has_the_region_asked_back(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with world() as host:
        daemon = await host.start()
        owner = host.request("r", lifetime=Lifetime.OWNER)
        a = await host.tools.create(host.config("a", owner))
        b = await host.tools.create(host.config("b", host.borrow("r")))
        program = await Program(host, nursery).lease(daemon, "r")
        program.lets_go = False
        del host.finder.files["b"]  # or it would be missed where it is taken away
        await host.tools.destroy(a)
        await host.until(lambda: bool(program.told), "the program is told")
        assert program.told == "owner gone"
        assert host.xen.foreign_frames(b.domid) == {}  # a guest needs not be asked
        assert regions(daemon) == ["r"]
        program.let_go()
        await host.until(lambda: regions(daemon) == [], "the region is freed")
        await host.tools.destroy(b)
        await host.check_clean()


async def test_remove_names_the_process_and_force_asks_it(autojump_clock: MockClock) -> None:
    async with leased_of_system() as (_, daemon, program):
        with pytest.raises(Conflict, match=r"process 77 \(viewer\)"):
            await daemon.engine.apply([remove("r")])
        await daemon.engine.apply([remove("r", force=True)], dry_run=True)
        assert program.told == ""
        await daemon.engine.apply([remove("r", force=True)])
        assert program.told == "removed by an administrator"
        assert regions(daemon) == []


async def test_one_whose_last_member_is_the_process_goes_with_it(autojump_clock: MockClock) -> None:
    async with leased_of_guest() as (host, daemon, program, a):
        await host.tools.destroy(a)
        await host.until(lambda: not daemon.engine.snapshot().guests, "the guest is gone")
        (step,) = await daemon.engine.apply([remove("r", force=True)])
        assert (step.verb, step.region) == ("remove", "r")
        assert program.told


async def test_a_process_that_does_not_let_go_is_not_overruled(autojump_clock: MockClock) -> None:
    async with leased_of_system() as (_, daemon, program):
        program.lets_go = False
        before = trio.current_time()
        with pytest.raises(Conflict, match="still mapped by process 77") as refusal:
            await daemon.engine.apply([remove("r", force=True)])
        assert trio.current_time() - before == pytest.approx(leases.LET_GO_S)
        assert refusal.value.facts["pid"] == 77
        assert regions(daemon) == ["r"]
        program.die()
        await daemon.engine.apply([remove("r", force=True)])


async def test_a_region_that_is_asked_back_gets_no_new_lease(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with leased_of_system() as (host, daemon, program):
        program.lets_go = False

        async def ask_back() -> None:
            await daemon.engine.apply([remove("r", force=True)])

        nursery.start_soon(ask_back)
        await host.until(lambda: bool(program.told), "the program is told")
        other = dataclasses.replace(PROCESS, pid=78)
        with pytest.raises(Conflict, match="about to be removed"):
            async with daemon.engine.lease("r", Prot.RO, other):
                pass
        program.let_go()


async def test_a_leased_region_stays_in_its_holder(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """A region that nobody has may move to where it is wanted; a mapping would be left behind."""
    async with world() as host:
        daemon = await host.start()
        await daemon.engine.apply([add("s")])
        home = {one.region_id: one.holder_uuid for one in daemon.engine.snapshot().regions}
        program = await Program(host, nursery).lease(daemon, "s")
        a = await host.tools.create(host.config("a", host.request("r")))
        b = host.config("b", host.borrow("r"), host.borrow("s", at=64), file=False)
        with pytest.raises(Conflict):
            await daemon.engine.declare(b)
        now = {one.region_id: one.holder_uuid for one in daemon.engine.snapshot().regions}
        assert now["s"] == home["s"]
        program.let_go()
        await host.until(lambda: not leased(daemon), "the lease is over")
        await daemon.engine.declare(b)
        await host.tools.destroy(a)
        await daemon.engine.apply([remove("s")])
        await host.check_clean()


async def test_a_lease_outlives_the_daemon_with_its_process(autojump_clock: MockClock) -> None:
    async with leased_of_guest(Prot.RW) as (host, daemon, program, a):
        await daemon.kill()
        program.let_go()
        await host.tools.destroy(a)
        daemon = await host.start(reboot_grace_s=1)
        await trio.sleep(100)
        assert regions(daemon) == ["r"]
        assert [lease.process for lease in leased(daemon)] == [PROCESS]
        # Taken up again, it is one lease and not two; and it ends as any other.
        await program.lease(daemon, "r")
        assert [lease.prot for lease in leased(daemon)] == [Prot.RO]
        program.let_go()


@pytest.mark.parametrize("started", [None, 4712], ids=["dead", "another"])
async def test_a_process_that_died_while_the_daemon_was_away(
    autojump_clock: MockClock, started: int | None
) -> None:
    async with leased_of_guest() as (host, daemon, program, a):
        await daemon.kill()
        program.die()
        if started:
            host.processes.living[PROCESS.pid] = started
        daemon = await host.start()
        await host.until(lambda: not leased(daemon), "the lease is over")
        await host.tools.destroy(a)


async def test_a_dead_process_whose_connection_somebody_keeps_open(
    autojump_clock: MockClock,
) -> None:
    async with leased_of_guest() as (host, _, program, a):
        program.lets_go = False
        del host.processes.living[PROCESS.pid]
        await host.tools.destroy(a)
        await host.check_clean()
        assert program.told == "process ended"
        program.scope.cancel()


async def test_the_death_of_a_process_is_noticed_though_nothing_else_happens(
    autojump_clock: MockClock,
) -> None:
    async with leased_of_system() as (host, daemon, program):
        program.lets_go = False
        await trio.sleep(100)
        assert program.has
        del host.processes.living[PROCESS.pid]
        await trio.sleep(reconciler.PROCESSES_S + 1)
        assert leased(daemon) == ()
        program.scope.cancel()
        await daemon.engine.apply([remove("r")])


async def test_a_holder_that_somebody_destroys_ends_its_leases(autojump_clock: MockClock) -> None:
    async with leased_of_guest() as (host, daemon, program, a):
        (holder,) = host.holders()
        host.xen.destroy(holder)
        await host.tools.destroy(a)
        await host.until(lambda: bool(program.told), "the program is told")
        assert program.told == "its region is lost"
        assert leased(daemon) == ()


async def test_what_no_lease_is_given_of(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        await daemon.engine.apply([add("r")])
        ledger = daemon.engine._ledger
        (region,) = ledger.regions
        for terms, prot, why in (
            (RegionTerms(prot=Prot.RO), Prot.RW, "prot=ro"),
            (RegionTerms(isolation=Isolation.SEALED), Prot.RO, "sealed"),
        ):
            await ledger.put_region(dataclasses.replace(region, terms=terms))
            with pytest.raises(Refused, match=why):
                async with daemon.engine.lease("r", prot, PROCESS):
                    pass
        await ledger.put_region(region)
        with pytest.raises(NoSuchRegion):
            async with daemon.engine.lease("s", Prot.RO, PROCESS):
                pass
        assert leased(daemon) == ()
        await daemon.engine.apply([remove("r")])
        await host.check_clean()


async def test_there_is_always_a_connection_left_for_the_admin(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with world() as host:
        daemon = await host.start()
        await daemon.engine.apply([add("r")])
        programs = [
            await Program(host, nursery, dataclasses.replace(PROCESS, pid=pid)).lease(daemon, "r")
            for pid in range(100, 100 + leases.MOST)
        ]
        with pytest.raises(Refused, match="already"):
            async with daemon.engine.lease("r", Prot.RO, PROCESS):
                pass
        for program in programs:
            program.let_go()
        await host.until(lambda: not leased(daemon), "the leases are over")
        await daemon.engine.apply([remove("r")])
        await host.check_clean()


async def test_everybody_hears_of_it(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    async with world() as host:
        daemon = await host.start()
        await daemon.engine.apply([add("r")])
        async with daemon.engine.monitor() as events:
            program = await Program(host, nursery).lease(daemon, "r")
            program.let_go()
            heard = [await events.receive() for _ in range(2)]
        assert [event.kind for event in heard] == [EventKind.LEASE_BEGAN, EventKind.LEASE_ENDED]
        assert [event.lease.process for event in heard if event.lease] == [PROCESS] * 2
        await daemon.engine.apply([remove("r")])
        await host.check_clean()
