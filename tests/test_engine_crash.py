# SPDX-License-Identifier: LGPL-2.1-or-later
"""Killed at any step, the daemon starts again, guests keep their memory, and nothing leaks."""

from __future__ import annotations

import pytest
from crash import SWEEP_STEP, Lives, Scenario, play, sweep, sweep_twice
from fakes.toolstack import Made, XlFailed
from fakes.world import World

from xshmd.changes import AddRegion, AttachRegion, DetachRegion, RemoveRegion
from xshmd.errors import Refused
from xshmd.machine import Arch
from xshmd.model import RegionConfig, RegionRequest

pytestmark = pytest.mark.sweep


async def _up(host: World, made: Made) -> None:
    await host.until(lambda: host.running(made), f"{made.config.name} running")
    assert host.missing(made.domid, made.config) == ""


async def two_guests(host: World, running: Lives) -> None:
    first = host.config("a", host.request("r", 3), host.request("s", 5, at=16))
    second = host.config("b", host.borrow("r", 2, at=64, offset=1))
    a = await host.tools.create(first)
    await _up(host, a)
    host.xen.guest_write(a.domid, first.requests[0].first_gfn + 1, 8, b"from a")
    b = await host.tools.create(second)
    await _up(host, b)
    # The very same pages, with what is in them, whatever happened to the daemon meanwhile.
    assert host.pages(b.domid, second.requests[0]) == host.pages(a.domid, first.requests[0])[1:]
    assert host.xen.guest_read(b.domid, second.requests[0].first_gfn, 8, 6) == b"from a"
    await host.tools.end(a)
    assert host.xen.guest_read(b.domid, second.requests[0].first_gfn, 8, 6) == b"from a"
    await host.tools.end(b)


async def reboot(host: World, running: Lives) -> None:
    config = host.config("a", host.request("r", 3))
    a = await host.tools.create(config)
    await _up(host, a)
    gfn = config.requests[0].first_gfn
    host.xen.guest_write(a.domid, gfn, 0, b"before")
    again = await host.tools.reboot(a)
    await _up(host, again)
    assert host.xen.guest_read(again.domid, gfn, 0, 6) == b"before"
    await host.tools.end(again)


async def refusal(host: World, running: Lives) -> None:
    """Its region lies over what the guest has there, which only Xen knows."""
    config = host.config("a", host.request("r", 3))
    gfn = config.requests[0].first_gfn

    def put_something_there(step: str, domid: int) -> None:
        domain = host.xen.by_domid.get(domid)  # type: ignore[call-overload]
        if step == "introduced" and domain is not None and not domain.dying:
            host.xen.populate(domain.domid, gfn, 1)

    host.tools.at_step = put_something_there
    try:
        await host.tools.create(config, devices=True)
    except XlFailed:
        return
    raise AssertionError("xl create was let by")


async def no_regions(host: World, running: Lives) -> None:
    a = await host.tools.create(host.config("a"))
    await _up(host, a)
    await host.tools.end(a)


async def late_owner_and_one_that_ends_early(host: World, running: Lives) -> None:
    owner = host.config("a", host.request("r", 4), host.request("only", 2, at=32))
    b = await host.tools.create(host.config("b", host.borrow("r", 4)))
    await _up(host, b)
    a = await host.tools.create(owner)
    await _up(host, a)
    await host.tools.end(a)
    await host.until(lambda: host.is_clean() != "", "")
    await host.tools.end(b)


async def _make(host: World, name: str, *requests: RegionRequest) -> Made:
    """Make a guest, whose file then does not matter any more."""
    made = await host.tools.create(host.config(name, *requests))
    await _up(host, made)
    host.config(name)
    return made


def _check_frames(host: World, made: Made, *requests: RegionRequest) -> None:
    wanted = {gfn for one in requests for gfn in range(one.first_gfn, one.end_gfn)}
    assert set(host.xen.foreign_frames(made.domid)) == wanted
    assert host.xen.by_domid[made.domid].pauses == 0
    told = host.server.nodes.get(f"/local/domain/{made.domid}/xshm")
    assert set(told.children if told else ()) == {request.region_id for request in requests}


async def attach_and_detach(host: World, running: Lives) -> None:
    r, s = host.request("r", 3), host.request("s", 5, at=16)
    a = await _make(host, "a", r)
    b = await _make(host, "b", host.borrow("r", 3), s)
    host.xen.guest_write(b.domid, s.first_gfn, 8, b"from b")
    more = host.borrow("s", 4, at=64)
    await running.apply(AttachRegion(guest="a", request=more))
    _check_frames(host, a, r, more)
    assert host.xen.guest_read(a.domid, more.first_gfn, 8, 6) == b"from b"
    await running.apply(
        DetachRegion(guest="a", region_id="r"), DetachRegion(guest="b", region_id="s")
    )
    _check_frames(host, a, more)
    _check_frames(host, b, r)
    await host.tools.end(a)
    await host.tools.end(b)


async def late_join_of_two(host: World, running: Lives) -> None:
    a = await _make(host, "a", host.request("r", 3))
    late, later = await _make(host, "late"), await _make(host, "later")
    n = host.borrow("n", 4, at=64)
    await running.apply(
        AddRegion(config=RegionConfig(region_id="n", nr_frames=4)),
        *(AttachRegion(guest=name, request=n) for name in ("late", "a", "later")),
    )
    _check_frames(host, a, host.request("r", 3), n)
    _check_frames(host, late, n)
    assert host.pages(late.domid, n) == host.pages(a.domid, n) == host.pages(later.domid, n)
    await host.tools.end(late)
    await running.apply(RemoveRegion(region_id="n", force=True))
    _check_frames(host, a, host.request("r", 3))
    _check_frames(host, later)
    await host.tools.end(a)
    await host.tools.end(later)


async def a_set_that_fails_in_its_middle(host: World, running: Lives) -> None:
    """Something is at a frame of the second guest, which only Xen knows."""
    a, b = await _make(host, "a", host.request("r", 3)), await _make(host, "b")
    n = host.borrow("n", 2, at=64)
    host.xen.set_max_pages(b.domid, 1 << 16)
    host.xen.populate(b.domid, n.first_gfn, 1)
    try:
        await running.apply(
            AddRegion(config=RegionConfig(region_id="n", nr_frames=2)),
            AttachRegion(guest="a", request=n),
            AttachRegion(guest="b", request=n),
        )
    except Refused:
        pass
    else:
        raise AssertionError("it was let by")
    _check_frames(host, a, host.request("r", 3))
    _check_frames(host, b)
    assert not host.xen.by_domid[b.domid].p2m[n.first_gfn].foreign
    await host.tools.end(a)
    await host.tools.end(b)


async def owner_gone(host: World, running: Lives) -> None:
    r = host.request("r", 3, lifetime=None)
    a = await _make(host, "a", r)
    own = host.request("own", 2, at=32)
    b, c = (
        await _make(host, "b", host.borrow("r", 3), own),
        await _make(host, "c", host.borrow("r")),
    )
    await host.tools.end(a)
    await host.until(lambda: not host.xen.foreign_frames(c.domid), "the region to be withdrawn")
    await running.settled()
    await host.until(lambda: len(host.xen.foreign_frames(b.domid)) == 2)
    await host.until(lambda: host.running(b) and host.running(c), "both to run on")
    _check_frames(host, b, own)
    _check_frames(host, c)
    await host.tools.end(b)
    await host.tools.end(c)


async def regions_that_move(host: World, running: Lives) -> None:
    """They were made before anybody wanted them: one goes to a guest's creation, one to a guest."""
    for region_id in ("x", "y", "z"):
        await running.apply(AddRegion(config=RegionConfig(region_id=region_id, nr_frames=2)))
        daemon = await running.settled()
        await daemon.engine.write_region(region_id, 0, region_id.encode())
    x, y, z = (host.borrow(one, 2, at=at) for one, at in (("x", 0), ("y", 16), ("z", 32)))
    a = await _make(host, "a", x, y)
    await running.apply(AttachRegion(guest="a", request=z))
    _check_frames(host, a, x, y, z)
    for request in (x, y, z):
        found = host.xen.guest_read(a.domid, request.first_gfn, 0, 1)
        assert found == request.region_id.encode()
    await host.tools.end(a)
    await host.until(lambda: running.guests() == (), "the guest to be forgotten")
    await running.apply(*(RemoveRegion(region_id=one) for one in ("x", "y", "z")))


async def changes_to_a_paused_guest(host: World, running: Lives) -> None:
    a = await _make(host, "a", host.request("r", 3), host.request("s", 2, at=16))
    host.xen.pause(a.domid)
    await running.apply(DetachRegion(guest="a", region_id="s"))
    await running.settled()
    assert set(host.xen.foreign_frames(a.domid)) == set(range(0x1000000, 0x1000003))
    assert host.xen.by_domid[a.domid].pauses == 1
    host.xen.unpause(a.domid)
    await host.tools.end(a)


SCENARIOS: list[Scenario] = [
    two_guests, reboot, refusal, no_regions, late_owner_and_one_that_ends_early,
    attach_and_detach, late_join_of_two, a_set_that_fails_in_its_middle, owner_gone,
    regions_that_move,
]  # fmt: skip


@pytest.mark.parametrize("arch", list(Arch), ids=str)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_without_a_cut(scenario: Scenario, arch: Arch) -> None:
    (boundaries,) = play(scenario, arch=arch)
    assert boundaries


@pytest.mark.parametrize("arch", list(Arch), ids=str)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_cut(scenario: Scenario, arch: Arch) -> None:
    count, failed = sweep(scenario, arch=arch)
    assert failed == []
    assert count > 3


def test_the_pauses_of_others_outlive_every_cut() -> None:
    """All that Xen allows are taken to count them, so there are a thousand places to be cut at."""
    count, failed = sweep(changes_to_a_paused_guest, step=9 * SWEEP_STEP)
    assert failed == []
    assert count > 10


@pytest.mark.parametrize(
    ("scenario", "share"),
    [(two_guests, 2), (refusal, 2), (late_join_of_two, 5)],
    ids=["two_guests", "refusal", "late_join_of_two"],
)
def test_a_cut_in_the_recovery_from_a_cut(scenario: Scenario, share: int) -> None:
    count, failed = sweep_twice(scenario, step=share * SWEEP_STEP)
    assert failed == []
    assert count > 10
