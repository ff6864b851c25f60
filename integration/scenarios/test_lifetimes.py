# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ends a region: its owner, its members, or an administrator."""

from __future__ import annotations

import pytest

from integration.scenarios.guest import FILLED, MIB, Entry, filled
from integration.scenarios.host import Host, add, names, remove
from integration.scenarios.test_hot_changes import end, members, wait_nothing_there


@pytest.mark.alike
def test_an_owner_that_is_gone_takes_its_region_along(host: Host, short_grace: None) -> None:
    """The usual lifetime: the owner is destroyed, and the region is withdrawn from its borrower,
    which runs on with what else it has, and freed."""
    own, lent = host.unique("own"), host.unique("lent")
    borrower = host.guest(
        "borrower", Entry(own, host.at_elsewhere), Entry(lent, host.at, role="borrower"),
        do="await-fill:1,check:1,await-fill:0,peek:1", etc=True,
    )  # fmt: skip
    owner = host.guest(
        "owner", Entry(own, host.at_elsewhere, role="borrower"),
        Entry(lent, host.at, lifetime=""), do="fill:1", slot=1, etc=True,
    )  # fmt: skip
    host.create(owner, etc=True)
    host.create(borrower, etc=True)
    host.wait_said(borrower, "checked pages=256 bad=0 seed=7")
    since = host.mark
    host.destroy(owner)
    host.wait(lambda: names(host.regions()) == [own], f"{lent} is freed")
    host.wait_log("memory withdrawn .*owner gone", since)
    assert members(host, own) == [borrower.name]
    assert host.domid(borrower) is not None
    host.poke(own, 0, FILLED, filled(7))
    wait_nothing_there(host, borrower, host.at)
    end(host, borrower)


@pytest.mark.alike
def test_an_owner_that_reboots_is_not_gone(host: Host) -> None:
    """The usual lifetime again: the owner reboots under its borrower, and they meet again."""
    region = host.unique("demo")
    owner = host.guest(
        "owner", Entry(region, host.at, lifetime=""), do="boots,reboot-once,beat-watch"
    )
    borrower = host.guest(
        "borrower", Entry(region, host.at, role="borrower"), do="beat-watch", slot=1
    )
    host.create(owner, "-p")
    host.create(borrower)
    host.xl("unpause", owner.name)
    host.wait_said(owner, "boots=2")
    host.wait_beats(borrower, 0)
    host.destroy(borrower, owner)


@pytest.mark.alike
def test_an_owner_that_ends_while_the_daemon_is_down(host: Host) -> None:
    """Its end is found out at the next start; its region is withdrawn when the grace is over."""
    region = host.unique("demo")
    owner = host.guest("owner", Entry(region, host.at, lifetime=""), do="fill")
    borrower = host.guest("borrower", Entry(region, host.at, role="borrower"), do="stay", slot=1)
    host.create(owner)
    host.create(borrower)
    host.stop_daemon()
    host.destroy(owner)
    host.start_daemon("--reboot-grace", "2")
    host.wait(lambda: not host.regions(), "the region is freed")
    assert host.domid(borrower) is not None
    assert [guest["regions"] for guest in host.guests()] == [[]]
    host.destroy(borrower)
    host.wait(lambda: not host.guests(), "the borrower is forgotten")
    host.stop_daemon()


@pytest.mark.alike
def test_a_systems_region_outlives_all_guests(host: Host) -> None:
    """A region without an owner is there before the first guest and after the last, with its
    contents, over a restart of the daemon; until an administrator removes it."""
    region = host.unique("sys")
    host.apply(add(region, MIB))
    first = host.guest("first", Entry(region, host.at, role="borrower"), do="fill")
    host.create(first)
    host.wait_said(first, "filled .*")
    host.destroy(first)
    host.wait(lambda: not host.guests(), "the guest is forgotten")
    host.stop_daemon()
    host.start_daemon()
    assert names(host.regions()) == [region]
    second = host.guest("second", Entry(region, host.at, role="borrower"), do="check", slot=1)
    host.create(second)
    host.wait_said(second, "checked pages=256 bad=0 seed=7")
    assert f"has members: {second.name}" in host.refused(remove(region))
    host.destroy(second)
    host.wait(lambda: not host.guests(), "the guest is forgotten")
    host.apply(remove(region))
    assert host.regions() == []
