# SPDX-License-Identifier: LGPL-2.1-or-later
"""Killed at any step, the daemon starts again, guests keep their memory, and nothing leaks."""

from __future__ import annotations

import pytest
from crash import Lives, Scenario, play, sweep, sweep_twice
from fakes.toolstack import Made, XlFailed
from fakes.world import World

from xshmd.model import Arch


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


SCENARIOS: list[Scenario] = [
    two_guests, reboot, refusal, no_regions, late_owner_and_one_that_ends_early,
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


@pytest.mark.parametrize("scenario", [two_guests, refusal], ids=lambda scenario: scenario.__name__)
def test_a_cut_in_the_recovery_from_a_cut(scenario: Scenario) -> None:
    count, failed = sweep_twice(scenario)
    assert failed == []
    assert count > 10
