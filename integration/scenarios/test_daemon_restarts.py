# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon may die at any moment: guests keep their memory, and its next life goes on."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from integration.scenarios.guest import FILLED, MIB, Entry, filled
from integration.scenarios.host import WAIT_S, Host


def _without_change(regions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(regions, key=lambda region: str(region["id"]))


@pytest.mark.either_store
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_guests_go_on_without_the_daemon(host: Host, number: signal.Signals) -> None:
    """Guests talk on while the daemon is down; its next life lists the same regions, a third guest
    can join, and at the end everything is given back."""
    region, other = host.unique("demo"), host.unique("other")
    beater = host.guest(
        "beater", Entry(region, host.at), Entry(other, host.at_elsewhere), do="fill,beat"
    )
    watcher = host.guest("watcher", Entry(region, host.at, role="borrower"), do="watch", slot=1)
    host.create(beater)
    host.create(watcher)
    host.wait_beats(watcher, 0)
    before = _without_change(host.regions())
    done = host.stop_daemon(number)
    assert done.status == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    host.wait_beats(watcher, 0)
    host.start_daemon()
    assert _without_change(host.regions()) == before
    assert {guest["state"] for guest in host.guests()} == {"attached"}
    host.wait_beats(watcher, 0)
    third = host.guest("third", Entry(region, host.at, role="borrower"), do="check", slot=2)
    host.create(third)
    host.wait_said(third, "checked pages=256 bad=0 seed=7")
    host.destroy(third, watcher, beater)


@pytest.mark.alike
def test_killed_the_instant_a_guest_is_seen(host: Host) -> None:
    """Between its record and its pause a guest is not held yet: killed there, the daemon was as
    good as not running. Either the guest gets its region after all, or the next start says that
    it has none; it is never paused for ever, and nothing is left of it."""
    guest = host.guest("victim", Entry(host.unique("demo"), host.at), do="fill,check,stay")
    words = ["python3", "-I", "/rig/xen-probe.py", "kill-when", str(host.daemon_pid), "held"]
    killer = host.dom0.spawn(words, timeout_s=WAIT_S)
    host.wait(lambda: b"watching\n" in killer.stdout, "the killer is ready")
    creating = host.start_creating(guest)
    assert killer.wait(WAIT_S).status == 0
    host.await_killed()
    since = host.mark
    host.start_daemon()
    assert creating.wait(2 * WAIT_S).status == 0
    host.wait(
        lambda: (
            any(line.startswith("checked pages=256 bad=0") for line in host.said(guest))
            or "guest runs without its regions" in host.log(since)
            or host.domid(guest) is None
        ),
        "it has its region, or xshmd says that it has not",
    )
    domid = host.domid(guest)
    if domid is not None:
        info = host.domain(domid)
        assert info is None or not info["paused"]
        host.destroy(guest)


MOMENTS = (
    "holder",
    pytest.param("populating", marks=pytest.mark.alike),
    pytest.param("populated", marks=pytest.mark.alike),
    pytest.param("mapping", marks=pytest.mark.either_store),
    pytest.param("published", marks=pytest.mark.alike),
)


@pytest.mark.alike
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_a_guest_is_created(host: Host, moment: str) -> None:
    """`kill -9` between a domain's first node and its regions: started again, the daemon finishes
    what it began. `xl create` ends well, the guest has its region and runs."""
    # Large enough that making it takes a while: the moments lie apart.
    entry = Entry(host.unique("demo"), host.at, 48 * MIB)
    guest = host.guest("victim", entry, do="fill,check")
    words = ["python3", "-I", "/rig/xen-probe.py", "kill-when", str(host.daemon_pid), moment]
    killer = host.dom0.spawn(words, timeout_s=WAIT_S)
    host.wait(lambda: b"watching\n" in killer.stdout, "the killer is ready")
    creating = host.start_creating(guest)
    killed = killer.wait(WAIT_S)
    assert killed.status == 0, killed.describe()
    host.await_killed()
    since = host.mark
    host.start_daemon()
    created = creating.wait(2 * WAIT_S)
    assert created.status == 0, f"{created.describe()}\n{host.log(since)}"
    host.wait_said(guest, "checked pages=12288 bad=0 seed=7")
    host.wait(lambda: [g["state"] for g in host.guests()] == ["attached"], "it is attached")
    domid = host.domid(guest)
    assert domid is not None
    info = host.domain(domid)
    assert info is not None
    assert not info["paused"]
    host.destroy(guest)


@pytest.mark.alike
@pytest.mark.either_store
def test_guest_ends_while_the_daemon_is_down(host: Host) -> None:
    """A member that ends unseen is found out at the next start, and what only it had is freed."""
    region, own = host.unique("demo"), host.unique("own")
    stays = host.guest("stays", Entry(region, host.at), do="beat")
    goes = host.guest(
        "goes", Entry(region, host.at, role="borrower"), Entry(own, host.at_elsewhere), slot=1
    )
    host.create(stays)
    host.create(goes)
    host.stop_daemon(signal.SIGKILL)
    host.destroy(goes)
    host.start_daemon("--reboot-grace", "3")
    host.wait(lambda: [r["id"] for r in host.regions()] == [region], f"{own} is freed")
    host.destroy(stays)
    host.wait(lambda: not host.guests(), "it is forgotten")
    host.stop_daemon()  # the next scenario has one with the usual options


@pytest.mark.alike
def test_all_guests_end_while_the_daemon_is_down(host: Host) -> None:
    """With every member gone unseen, the next start leaves no region, no holder and no node."""
    guest = host.guest("goes", Entry(host.unique("demo"), host.at), do="stay")
    host.create(guest)
    host.wait_said(guest, "hello .*")
    host.stop_daemon(signal.SIGKILL)
    host.destroy(guest)
    host.start_daemon("--reboot-grace", "3")
    host.wait(lambda: not host.regions(), "the region is freed")
    host.wait(lambda: len(host.ask("domains")) == 1, "the holder is gone")
    host.stop_daemon()


@pytest.mark.either_store
def test_guest_reboots_while_the_daemon_is_down(host: Host) -> None:
    """A guest made anew while nobody is at the gate runs without its region. Started again, the
    daemon says so, leaves it alone, and frees what the guest no longer has."""
    region = host.unique("demo")
    guest = host.guest(
        "phoenix", Entry(region, host.at), do="boots,await-fill,reboot",
        lines=('on_crash = "preserve"',),
    )  # fmt: skip
    host.create(guest)
    host.wait_said(guest, "boots=1")
    domid = host.domid(guest)
    host.poke(region, 0, FILLED, filled(7))
    host.stop_daemon(signal.SIGKILL)
    host.wait(lambda: host.domid(guest) not in (None, domid), "it is made anew")
    domid = host.domid(guest)
    assert domid is not None
    # It has come so far that it cannot be held any more.
    host.wait(lambda: (host.domain(domid) or {"cpu_time_ns": 0})["cpu_time_ns"], "it runs")
    since = host.mark
    host.start_daemon("--reboot-grace", "3")
    host.wait_log(rf"left alone.* domid={domid}\b", since)
    host.wait(lambda: not host.regions(), "the region is freed")
    host.destroy(guest)
    host.stop_daemon()


@pytest.mark.alike
def test_a_second_daemon_ends_at_once(host: Host) -> None:
    """Started beside one that runs, even on another socket, it says so and touches nothing."""
    region = host.unique("demo")
    guest = host.guest("member", Entry(region, host.at), do="fill,stay")
    host.create(guest)
    host.wait_said(guest, "filled .*")
    before, state = host.regions(), host.state()
    done = host.dom0.run(["xshmd", "--socket", "/run/second/socket"], check=False)
    assert done.status == 5, done.describe()
    assert "another xshmd runs on this machine" in done.stderr.decode()
    assert host.regions() == before
    assert state.difference(host.state()) == ""
    host.destroy(guest)


@pytest.mark.alike
def test_the_time_of_day_is_set(host: Host) -> None:
    """A guest that reboots while somebody sets the clock finds its region with its contents."""
    region = host.unique("demo")
    guest = host.guest("phoenix", Entry(region, host.at), do="boots,reboot-once,stay")
    host.create(guest, "-p")
    before = host.dom0.run(["date", "+%s"]).text
    try:
        host.xl("unpause", guest.name)
        host.wait_said(guest, "reboot")
        host.dom0.run(["date", "-s", f"@{int(before) + 10 * 365 * 86400}"])
        host.wait_said(guest, "boots=2")
    finally:
        host.dom0.run(["date", "-s", f"@{before}"])
    host.destroy(guest)
