# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest runs when its memory is there and not before; one that cannot have it does not run."""

from __future__ import annotations

import dataclasses
import errno

import pytest
import trio
from fakes.toolstack import Made, XlFailed
from fakes.world import world
from trio.testing import MockClock

from xshmd.engine.gate import ROOT
from xshmd.errors import ConfigError, Conflict, HypercallFailed, OutOfMemory, Refused, TimedOut
from xshmd.machine import Arch
from xshmd.model import GuestState, RegionRequest
from xshmd.units import DomId, address_of, bytes_of

UUID = "6f1c2a0e-58c3-4f0e-9f0c-2b7d7d0f9a11"


@pytest.mark.parametrize("arch", list(Arch), ids=str)
async def test_a_guest_runs_with_its_regions(autojump_clock: MockClock, arch: Arch) -> None:
    async with world(arch) as host:
        daemon = await host.start()
        config = host.config("a", host.request("r", 3), host.request("s", 1000, at=512))
        made = await host.tools.create(config)
        # xl has returned, so it has unpaused; nothing has been waited for since.
        assert host.running(made)
        assert host.ran == [(made.domid, "")]
        assert len(host.pages(made.domid, config.requests[1])) == 1000
        assert daemon.is_attached("a")
        assert [region.ready for region in daemon.engine.snapshot().regions] == [True, True]
        await host.tools.end(made)
        await host.check_clean()


async def test_fresh_regions_are_zero_and_freed_ones_are_wiped(autojump_clock: MockClock) -> None:
    async with world() as host:
        await host.start()
        config = host.config("a", host.request("r", 2), host.request("s", 2, at=8))
        made = await host.tools.create(config)
        for request in config.requests:
            for gfn in range(request.first_gfn, request.end_gfn):
                assert host.xen.guest_read(made.domid, gfn, 0, 4096) == bytes(4096)
                host.xen.guest_write(made.domid, gfn, 100, b"secret")
        await host.tools.end(made)
        await host.check_clean()
        assert host.xen.unwiped_frees == 0


async def test_a_guest_finds_its_regions_in_xenstore(autojump_clock: MockClock) -> None:
    async with world() as host:
        await host.start()
        request = host.request("r", 3)
        made = await host.tools.create(host.config("a", request))
        node = f"/local/domain/{made.domid}/xshm/r"
        assert host.server.read(node) == (
            f"begin={address_of(request.first_gfn):#x} size={bytes_of(3):#x} "
            "role=owner prot=rw transport=physmap offset=0x0 backing=holder cache=write-back "
            "memory_map=reserved peer=0"
        )
        assert host.server.permissions(node) == ("n0", f"r{made.domid}")
        assert host.server.permissions("/xshmd/guests") == ("n0",)


@pytest.mark.parametrize("config_found", [True, False])
async def test_a_guest_without_regions_is_let_go(
    autojump_clock: MockClock, config_found: bool
) -> None:
    async with world() as host:
        daemon = await host.start()
        made = await host.tools.create(host.config("a", file=config_found))
        assert host.running(made)
        assert daemon.engine.snapshot().guests == ()
        assert host.holders() == []
        await host.tools.end(made)
        await host.check_clean()


async def test_xl_waits_for_the_creation_lock(autojump_clock: MockClock) -> None:
    """However slow we are: xl reports success only when the guest has its memory."""
    async with world() as host:
        await host.start()
        host.server.faults.silent = lambda request: request.path.startswith("/xshmd/regions")
        config = host.config("a", host.request("r"))
        done = trio.Event()

        async def create() -> None:
            await host.tools.create(config)
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(create)
            await trio.sleep(3)
            assert host.tools.blocked == 1
            assert not done.is_set()
            host.server.faults.silent = lambda request: False
            host.server.answer_held()
            await done.wait()
        assert host.ran_wrongly == []


async def test_a_quick_xl_is_held_all_the_same(autojump_clock: MockClock) -> None:
    async with world() as host:
        await host.start()
        host.locks.take = lambda domid, uuid, who: True  # type: ignore[method-assign]
        for name in "abc":
            await host.tools.create(host.config(name, host.request(f"r{name}")))
        await host.until(lambda: len(host.ran) == 3)
        assert host.ran_wrongly == []


async def test_create_paused_stays_paused(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        made = await host.tools.create(host.config("a", host.request("r")), paused=True)
        assert daemon.is_attached("a")
        assert host.xen.by_domid[made.domid].pauses == 1
        host.xen.unpause(made.domid)
        assert host.ran == [(made.domid, "")]


async def test_two_guests_share_contents(autojump_clock: MockClock) -> None:
    async with world() as host:
        await host.start()
        one = host.config("a", host.request("r", 3))
        other = host.config("b", host.borrow("r", 2, at=100, offset=1))
        a, b = await host.tools.create(one), await host.tools.create(other)
        host.xen.guest_write(a.domid, one.requests[0].first_gfn + 2, 0, b"to b")
        assert host.xen.guest_read(b.domid, other.requests[0].first_gfn + 1, 0, 4) == b"to b"
        host.xen.guest_write(b.domid, other.requests[0].first_gfn, 9, b"to a")
        assert host.xen.guest_read(a.domid, one.requests[0].first_gfn + 1, 9, 4) == b"to a"
        assert len(host.holders()) == 1


async def test_a_borrower_may_come_before_the_owner(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        owner = host.config("a", host.request("r", 5))
        b = await host.tools.create(host.config("b", host.borrow("r", 2)))
        (region,) = daemon.engine.snapshot().regions
        assert (region.nr_frames, region.owner) == (5, "a")
        a = await host.tools.create(owner)
        assert host.pages(a.domid, owner.requests[0])[:2] == host.pages(
            b.domid, host.borrow("r", 2)
        )


async def test_guests_created_at_once(autojump_clock: MockClock) -> None:
    async with world() as host:
        await host.start()
        configs = [host.config("g0", host.request("r", 4), host.request("own0", 2, at=64))]
        configs += [
            host.config(f"g{i}", host.borrow("r", 4), host.request(f"own{i}", 2, at=64))
            for i in range(1, 6)
        ]
        async with trio.open_nursery() as nursery:
            for config in reversed(configs):
                nursery.start_soon(host.tools.create, config)
        assert len([1 for _, wrong in host.ran if not wrong]) == 6
        assert host.ran_wrongly == []
        assert len(host.holders()) == 1
        domids = [domid for domid, _ in host.ran]
        first = [host.pages(domid, configs[0].requests[0]) for domid in domids]
        assert all(pages == first[0] for pages in first)


# -- refusals -------------------------------------------------------------------------------------


async def test_a_refused_guest_is_destroyed_without_a_trace(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        config = host.config("b", host.borrow("nobodys"))
        with pytest.raises(XlFailed):
            await host.tools.create(config, devices=True)
        assert host.ran == []
        await host.check_clean()
        assert daemon.engine.snapshot().guests == ()


async def test_a_late_refusal_removes_devices_too(autojump_clock: MockClock) -> None:
    """xl has made all but the last step by then, and waits for the lock."""
    async with world() as host:
        await host.start()
        host.server.faults.silent = lambda request: request.path.startswith("/xshmd/regions")
        host.xen.fail("map_foreign", errno.EINVAL)
        failed = trio.Event()

        async def create() -> None:
            with pytest.raises(XlFailed):
                await host.tools.create(host.config("a", host.request("r")), devices=True)
            failed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(create)
            await host.until(lambda: host.tools.blocked == 1)
            assert "/local/domain/0/backend/vif/1/0" in host.server.nodes
            host.server.faults.silent = lambda request: False
            host.server.answer_held()
            await failed.wait()
        await host.until(lambda: "/local/domain/0/backend/vif/1/0" not in host.server.nodes)
        assert "/local/domain/1" not in host.server.nodes
        assert "/libxl/1" not in host.server.nodes
        assert host.holders() == []


async def test_a_wrong_configuration_refuses(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        config = host.config("a", host.request("r"))
        host.finder.files["a"] = ConfigError("it is wrong")
        with pytest.raises(XlFailed):
            await host.tools.create(config)
        with pytest.raises(ConfigError, match="it is wrong"):
            await daemon.engine.wait_guest("a", 1)
        await host.check_clean()


async def test_a_region_over_memory_that_is_there_refuses(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        config = host.config("a", host.request("r", 600))
        gfn = config.requests[0].first_gfn

        host.tools.at_step = lambda step, domid: (
            host.xen.populate(domid, gfn, 1) if step == "introduced" else None
        )
        with pytest.raises(XlFailed):
            await host.tools.create(config)
        with pytest.raises(Refused, match="memory"):
            await daemon.engine.wait_guest("a", 1)
        assert host.ran == []
        await host.check_clean()


async def test_too_little_memory_refuses(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        config = host.config("a", host.request("r", host.xen.free_pages))
        with pytest.raises(XlFailed):
            await host.tools.create(config)
        with pytest.raises(OutOfMemory):
            await daemon.engine.wait_guest("a", 1)
        await host.check_clean()


async def test_shadow_paged_guests_are_refused(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        config = dataclasses.replace(host.config("a", host.request("r"), file=False), hap=False)
        host.config("a", host.request("r"))  # the file says nothing of it
        with pytest.raises(XlFailed):
            await host.tools.create(config)
        with pytest.raises(Refused, match="hap"):
            await daemon.engine.wait_guest("a", 1)
        await host.check_clean()


async def test_a_guest_that_ran_before_us_is_refused(autojump_clock: MockClock) -> None:
    """The race that cannot be won against a toolstack that is quicker than a watch."""
    async with world() as host:
        daemon = await host.start()
        host.server.faults.silent = lambda request: request.path.startswith(ROOT)
        config = host.config("a", host.request("r"))
        made = await host.tools.create(config, fast=True)
        assert host.running(made)
        host.server.faults.silent = lambda request: False
        host.server.answer_held()
        await host.until(lambda: made.domid not in host.xen.by_domid)
        with pytest.raises(Conflict, match="ran before"):
            await daemon.engine.wait_guest("a", 1)


async def test_failures_may_leave_the_guest_to_the_admin(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start(destroy_on_failure=False)
        made = await host.tools.create(host.config("b", host.borrow("nobodys")))
        guest = daemon.guest("b")
        assert guest is not None
        assert guest.state is GuestState.DOOMED
        assert "nobodys" in guest.failure
        assert host.xen.by_domid[made.domid].pauses == 1
        await daemon.kill()
        daemon = await host.start(destroy_on_failure=False)
        await trio.sleep(10)
        assert host.xen.by_domid[made.domid].pauses == 1
        assert host.ran == []
        await host.tools.destroy(made)
        await host.check_clean()


@pytest.mark.parametrize("arch", list(Arch), ids=str)
async def test_a_failed_attach_leaves_the_guest_as_it_was(
    autojump_clock: MockClock, arch: Arch
) -> None:
    async with world(arch) as host:
        await host.start(destroy_on_failure=False)
        host.xen.fail("map_foreign", errno.EINVAL, nth=2)
        config = host.config("a", host.request("r", 3), host.request("s", 3, at=8))
        made = await host.tools.create(config)
        assert host.xen.by_domid[made.domid].pauses == 1
        assert host.xen.foreign_frames(made.domid) == {}
        await host.tools.destroy(made)
        await host.check_clean()


FAULTS = [
    ("create_holder_domain", 1), ("set_paging_pool_bytes", 1), ("set_paging_pool_bytes", 4),
    ("populate", 1), ("zero", 1), ("zero", 2), ("zero", 3), ("set_max_pages", 1),
    ("set_max_pages", 2), ("set_target", 1), ("map_foreign", 1), ("map_foreign", 2),
    ("map_pages", 1), ("host_info", 1), ("populated_frames", 1), ("paging_pool_bytes", 1),
]  # fmt: skip


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EINVAL, errno.EPERM, errno.EBUSY])
@pytest.mark.parametrize(("kind", "nth"), FAULTS)
async def test_any_call_may_fail(autojump_clock: MockClock, kind: str, nth: int, code: int) -> None:
    """Then the guest is refused, nothing is left, and the next one has its regions."""
    async with world() as host:
        await host.start()
        config = host.config("a", host.request("r", 3), host.request("s", 3, at=8))

        def inject(step: str, domid: int) -> None:
            if step == "memory":
                host.xen.fail(kind, code, nth=nth)

        host.tools.at_step = inject
        refused = False
        made = None
        try:
            made = await host.tools.create(config)
        except XlFailed:
            refused = True
        host.tools.at_step = lambda step, domid: None
        host.xen.faults.clear()
        assert host.ran_wrongly == []
        if made is not None:
            await host.tools.destroy(made)
        assert refused or made
        await host.check_clean()
        made = await host.tools.create(config)
        await host.tools.end(made)
        await host.check_clean()


@pytest.mark.parametrize("step", ["nodes", "pool", "memory", "introduced"])
async def test_a_build_that_fails_is_ended_by_libxl(autojump_clock: MockClock, step: str) -> None:
    """It removes the domain's nodes, and then takes the lock that we hold while it is made."""
    async with world() as host:
        daemon = await host.start()

        def fail(at: str, _domid: int) -> None:
            if at == step:
                raise ConfigError("Could not open kernel image")

        host.tools.at_step = fail
        with trio.fail_after(60), pytest.raises(XlFailed):
            await host.tools.create(host.config("a", host.request("r", 3)))
        await host.check_clean()
        assert daemon.engine.snapshot().guests == ()


async def test_what_a_killed_xl_leaves_can_be_destroyed(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        config = dataclasses.replace(host.config("a", host.request("r", 3)), uuid=UUID)
        left: list[DomId] = []
        with trio.CancelScope() as xl:

            def kill(at: str, domid: DomId) -> None:
                if at == "memory":
                    left.append(domid)
                    xl.cancel()

            host.tools.at_step = kill
            await host.tools.create(config)
        await host.until(lambda: len(daemon.engine.snapshot().regions) == 1)
        with trio.fail_after(60):
            await host.tools.destroy(Made(left[0], config))
        await host.check_clean()


@pytest.mark.parametrize("kind", ["set_target", "map_foreign", "populate", "unmap", "verify"])
async def test_a_guest_may_vanish_at_any_call(autojump_clock: MockClock, kind: str) -> None:
    async with world() as host:
        await host.start()
        config = host.config("a", host.request("r", 3), host.request("s", 3, at=8))
        kind = {"verify": "populated_frames"}.get(kind, kind)
        guests: list[int] = []

        def vanish(call: object) -> None:
            if getattr(call, "kind", "") == kind and guests:
                host.xen.before = lambda call: None
                host.xen.destroy(guests[0])  # type: ignore[arg-type]

        def note(step: str, domid: int) -> None:
            if step == "nodes":
                guests.append(domid)
                host.xen.before = vanish

        host.tools.at_step = note
        try:
            made = await host.tools.create(config)
        except XlFailed:
            for path in (f"/local/domain/{guests[0]}", f"/libxl/{guests[0]}"):
                host.server.remove(path)  # as an admin would: libxl left them
            for name in host.server.nodes["/vm"].children:
                host.server.remove(f"/vm/{name}")
        else:
            await host.tools.destroy(made)
        await host.check_clean()


# -- what clients ask -----------------------------------------------------------------------------


async def test_declare_and_wait(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        config = host.config("a", host.request("r"), file=False)
        await daemon.engine.declare(config)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.tools.create, config)
            guest = await daemon.engine.wait_guest("a", 60)
        assert guest.state is GuestState.ATTACHED
        assert guest.requests == config.requests
        assert host.missing(guest.domid, config) == ""


async def test_a_declaration_is_for_one_domain(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        config = host.config("a", host.request("r"), file=False)
        await daemon.engine.declare(config)
        made = await host.tools.create(config)
        assert host.missing(made.domid, config) == ""
        await host.tools.end(made)
        made = await host.tools.create(config)
        assert host.xen.foreign_frames(made.domid) == {}
        await host.tools.end(made)
        await host.check_clean()


async def test_declare_refuses_at_once_what_cannot_be(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        with pytest.raises(ConfigError, match="nobody defines"):
            await daemon.engine.declare(host.config("b", host.borrow("r"), file=False))
        made = await host.tools.create(host.config("b", file=False))
        assert host.running(made)


async def test_withdraw_and_expiry(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        config = host.config("a", host.request("r"), file=False)
        await daemon.engine.declare(config)
        await daemon.engine.withdraw("a")
        await daemon.engine.withdraw("a")
        made = await host.tools.create(config)
        assert host.xen.foreign_frames(made.domid) == {}
        await host.tools.end(made)
        await daemon.engine.declare(config)
        await trio.sleep(601)
        made = await host.tools.create(config)
        assert host.xen.foreign_frames(made.domid) == {}


async def test_waiting_has_an_end(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        with pytest.raises(TimedOut):
            await daemon.engine.wait_guest("nobody", 5)


async def test_a_second_attempt_does_not_hear_of_the_first_ones_failure(
    autojump_clock: MockClock,
) -> None:
    async with world() as host:
        daemon = await host.start()
        with pytest.raises(XlFailed):
            await host.tools.create(host.config("b", host.borrow("r")))
        host.config("a", host.request("r"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.tools.create, host.config("b", host.borrow("r")))
            await trio.sleep(1)
            guest = await daemon.engine.wait_guest("b", 60)
        assert guest.state is GuestState.ATTACHED


async def test_the_engine_with_real_threads() -> None:
    async with world(threads=True) as host:
        await host.start()
        a = await host.tools.create(host.config("a", host.request("r", 3)))
        b = await host.tools.create(host.config("b", host.borrow("r", 3)))
        assert host.pages(a.domid, host.request("r")) == host.pages(b.domid, host.borrow("r"))
        await host.tools.end(a)
        await host.tools.end(b)
        with trio.fail_after(10):
            while host.is_clean():  # noqa: ASYNC110 - this has no event
                await trio.sleep(0.01)
        host.check()


async def test_two_holders_cannot_be_joined(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(host.config("a", host.request("r")))
        b = await host.tools.create(host.config("b", host.request("s")))
        assert len(host.holders()) == 2
        with pytest.raises(XlFailed):
            await host.tools.create(host.config("c", host.borrow("r"), host.borrow("s", at=9)))
        with pytest.raises(Conflict, match="share groups"):
            await daemon.engine.wait_guest("c", 1)
        assert host.running(a)
        assert host.running(b)
        # One group from the start, since all of it is known beforehand.
        await host.tools.end(a)
        await host.tools.end(b)
        await host.check_clean()
        a, b, c = [await host.tools.create(found) for found in host.finder.known()]
        assert len(host.holders()) == 1
        for made in (c, b, a):
            await host.tools.end(made)
        await host.check_clean()


async def test_an_unexpected_pause_count_is_no_end(autojump_clock: MockClock) -> None:
    """One domain that cannot be held does not take the gate down."""
    async with world() as host:
        await host.start()
        host.xen.fail("pause", HypercallFailed("no", call="xc_domain_pause", errno=75))
        await host.tools.create(host.config("x"))
        made = await host.tools.create(host.config("a", host.request("r")))
        await host.until(lambda: host.running(made))
        assert host.missing(made.domid, made.config) == ""


async def test_more_regions_than_a_record_names(autojump_clock: MockClock) -> None:
    """Many is well; too many is refused, and so is nothing else held up by it."""
    async with world() as host:
        daemon = await host.start()

        def several(count: int) -> list[RegionRequest]:
            return [host.request(f"r{index}", 1, at=4 * index) for index in range(count)]

        a = await host.tools.create(host.config("a", *several(60)))
        assert len(host.xen.foreign_frames(a.domid)) == 60
        await host.tools.end(a)
        with pytest.raises(XlFailed):
            await host.tools.create(host.config("a", *several(1000)))
        with pytest.raises(Refused, match="1000 regions"):
            await daemon.engine.wait_guest("a", 1)
        await host.check_clean()
