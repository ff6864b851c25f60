# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests end, crash and come back in any order: regions live as long as somebody has them."""

from __future__ import annotations

import itertools

import pytest

from integration.scenarios.guest import FILLED, FREE_WORD, MIB, PAGE, Entry, filled
from integration.scenarios.host import WAIT_S, Host, names

pytestmark = pytest.mark.either_store

WORD = 0x0123456789ABCDEF


def test_reboot_finds_the_contents_again(host: Host) -> None:
    """A guest that reboots by itself, alone in its region, finds in it what was there before."""
    region = host.unique("demo")
    guest = host.guest("phoenix", Entry(region, host.at), do="boots,reboot-once,peek,stay")
    host.create(guest, "-p")
    host.poke(region, 0, FREE_WORD, WORD)
    before = host.region(region)
    host.xl("unpause", guest.name)
    host.wait_said(guest, "boots=2")
    host.wait_said(guest, f"peek addr={host.at:#x} word={WORD:#x}")
    after = host.region(region)
    assert after["holderUuid"] == before["holderUuid"]
    assert after["members"][0]["domainId"] != before["members"][0]["domainId"]
    assert names(after["members"], "state") == ["attached"]
    host.destroy(guest)


def test_reboot_beside_a_running_peer(host: Host) -> None:
    """A guest reboots while another uses the region: the peer goes on, and they meet again."""
    region = host.unique("demo")
    peer = host.guest("peer", Entry(region, host.at), do="fill,beat-watch")
    guest = host.guest(
        "phoenix", Entry(region, host.at, role="borrower"),
        do="await-fill,boots,reboot-once,check,beat-watch", slot=1,
    )  # fmt: skip
    host.create(peer)
    host.create(guest)
    host.wait_said(guest, "boots=2")
    host.wait_said(guest, "checked pages=256 bad=0 seed=7")
    host.wait_beats(peer, 1)
    host.wait_beats(guest, 0)
    host.destroy(guest, peer)


@pytest.mark.alike
def test_owner_reboots_under_its_borrower(host: Host) -> None:
    """The owner is a role: it may reboot while a borrower runs, and owns the same region again."""
    region = host.unique("demo")
    owner = host.guest("owner", Entry(region, host.at), do="boots,reboot-once,beat-watch")
    borrower = host.guest(
        "borrower", Entry(region, host.at, role="borrower"), do="beat-watch", slot=1
    )
    host.create(owner, "-p")
    host.create(borrower)
    host.xl("unpause", owner.name)
    host.wait_said(owner, "boots=2")
    host.wait_beats(borrower, 0)
    assert host.region(region)["owner"] == owner.name
    host.destroy(owner, borrower)


def test_crash_and_restart(host: Host) -> None:
    """A guest that crashes with on_crash="restart" comes back to its region and its contents."""
    region = host.unique("demo")
    guest = host.guest(
        "crasher", Entry(region, host.at), do="boots,peek,await-fill,crash",
        lines=('on_crash = "restart"',),
    )  # fmt: skip
    host.create(guest, "-p")
    host.poke(region, 0, FREE_WORD, WORD)
    host.xl("unpause", guest.name)
    host.wait_said(guest, "boots=1")
    host.poke(region, 0, FILLED, filled(7))  # what it waits for before it crashes
    host.wait_said(guest, "crash")
    host.poke(region, 0, FILLED, 0)  # so that it stays up the next time
    host.wait_said(guest, f"peek addr={host.at:#x} word={WORD:#x}", times=2)
    host.wait_said(guest, "boots=2")
    host.destroy(guest)


@pytest.mark.alike
def test_crash_for_good_frees_after_the_grace(host: Host) -> None:
    """The region of a guest that crashed and does not come back is kept for a while, then freed."""
    region = host.unique("demo")
    guest = host.guest("crasher", Entry(region, host.at), do="crash")
    with host.daemon_with("--reboot-grace", "3"):
        since = host.mark
        host.create(guest)
        host.wait_said(guest, "crash")
        host.wait_log(f"guest awaited guest='{guest.name}'", since)
        host.wait_log(f"guest no longer awaited guest='{guest.name}'", since)
        host.wait(lambda: not host.regions(), "the region is freed")


@pytest.mark.alike
def test_poweroff(host: Host) -> None:
    """A guest that powers off gives everything back at once, not after the reboot's grace."""
    region = host.unique("demo")
    guest = host.guest("leaver", Entry(region, host.at), do="boots,poweroff")
    since = host.mark
    host.create(guest)
    host.wait_log(f"guest ended guest='{guest.name}'", since)
    host.wait(lambda: not host.regions(), "the region is freed")
    assert "guest awaited" not in host.log(since)


ORDERS = ("owner first", "owner last")


@pytest.mark.parametrize("order", ORDERS)
def test_ends_in_any_order(host: Host, order: str) -> None:
    """Whoever ends first, the other goes on with the same memory; the last one takes it along."""
    region = host.unique("demo")
    owner = host.guest("owner", Entry(region, host.at, 4 * MIB), do="fill,beat-watch")
    borrower = host.guest(
        "borrower", Entry(region, host.at, 4 * MIB, "borrower"), do="await-fill,beat-watch", slot=1
    )
    host.create(owner)
    host.create(borrower)
    host.wait_said(borrower, "fill seen .*")
    first, last = (owner, borrower) if order == "owner first" else (borrower, owner)
    host.destroy(first)
    host.wait(lambda: names(host.guests(), "name") == [last.name], f"{first.name} is forgotten")
    assert host.peek(region, 0, FILLED) == filled(7)
    beat = 128 + 64 * last.slot + 4
    before = host.peek(region, 0, beat & ~7)
    host.wait(lambda: host.peek(region, 0, beat & ~7) != before, f"{last.name} beats on")
    # A third guest that comes now finds the very same memory.
    late = host.guest("late", Entry(region, host.at, 4 * MIB, "borrower"), do="check", slot=2)
    host.create(late)
    host.wait_said(late, "checked pages=1024 bad=0 seed=7")
    host.destroy(late, last)
    host.wait(lambda: not host.regions(), "the region is freed")


@pytest.mark.alike
def test_both_end_at_once(host: Host) -> None:
    """Two members destroyed at the same moment: nothing of the region is left."""
    region = host.unique("demo")
    one = host.guest("one", Entry(region, host.at), do="beat")
    two = host.guest("two", Entry(region, host.at, role="borrower"), do="beat", slot=1)
    host.create(one)
    host.create(two)
    running = [host.dom0.spawn(["xl", "destroy", g.name], timeout_s=WAIT_S) for g in (one, two)]
    for destroying in running:
        destroying.wait(WAIT_S, check=True)
    host.wait(lambda: not host.regions(), "the region is freed")


@pytest.mark.alike
def test_borrower_before_its_owner(host: Host) -> None:
    """Any order of starting: a borrower may come first if the owner's file says how large it is."""
    region = host.unique("demo")
    owner = host.guest("owner", Entry(region, host.at, 8 * PAGE), do="fill", etc=True)
    borrower = host.guest(
        "borrower", Entry(region, host.at, 4 * PAGE, "borrower"), do="await-fill,check", slot=1,
        etc=True,
    )  # fmt: skip
    host.create(borrower, etc=True)
    assert host.region(region)["sizeBytes"] == 8 * PAGE
    assert host.region(region)["owner"] == owner.name
    host.create(owner, etc=True)
    host.wait_said(borrower, "checked pages=4 bad=0 seed=7")
    host.destroy(owner, borrower)


@pytest.mark.alike
def test_many_generations(host: Host) -> None:
    """The same guest again and again, ended in every way: each finds a fresh, working region."""
    region = host.unique("demo")
    ways = itertools.cycle(("destroy", "poweroff"))
    for way in itertools.islice(ways, 4):
        do = "boots,poweroff" if way == "poweroff" else "boots,stay"
        guest = host.guest("again", Entry(region, host.at), do=do)
        host.create(guest)
        host.wait_said(guest, "boots=1")  # not 2: the memory is new
        if way == "destroy":
            host.destroy(guest)
        host.wait(lambda: not host.regions(), "the region is freed")
