# SPDX-License-Identifier: LGPL-2.1-or-later
"""The gate holds a guest for exactly as long as its memory takes, and others not at all."""

from __future__ import annotations

import pytest

from integration.scenarios.guest import MIB, Entry
from integration.scenarios.host import CONFIGS, WAIT_S, Host, names

pytestmark = pytest.mark.either_store


def test_guest_without_regions_is_left_alone(host: Host) -> None:
    """`xl create` of a guest without static_shm works as ever and leaves no trace with us."""
    guest = host.guest("plain", do="stay")
    domains = len(host.ask("domains"))
    since = host.mark
    with_us = host.create(guest)
    host.wait_said(guest, "hello .*")
    domid = host.domid(guest)
    assert host.guests() == []
    assert host.regions() == []
    assert len(host.ask("domains")) == domains + 1  # it, and no holder
    left = host.dom0.run(f"xenstore-ls /local/domain/{domid}; xenstore-ls -f /xshmd").text
    assert "xshm" not in left.replace("/xshmd/", "").replace("/xshmd ", "")
    assert guest.name not in host.log(since)
    host.destroy(guest)
    host.stop_daemon()
    alone = host.guest("plain", do="stay")
    without_us = host.create(alone)
    host.destroy(alone)
    # A benchmark measures this; here only something like a time-out would show.
    assert with_us.seconds < 3 * without_us.seconds + 30
    print(f"xl create: {with_us.seconds:.2f} s with xshmd, {without_us.seconds:.2f} s without")


def test_created_paused_stays_paused(host: Host) -> None:
    """After `xl create -p` exactly one pause is left, xl's own: `xl unpause` starts the guest."""
    guest = host.guest("paused", Entry(host.unique("demo"), host.at), do="fill,check")
    host.create(guest, "-p")
    assert names(host.guests(), "state") == ["attached"]
    domid = host.domid(guest)
    assert host.ask("pause_count", domid) == 1
    assert host.said(guest) == []
    host.xl("unpause", guest.name)
    host.wait_said(guest, "checked pages=256 bad=0 seed=7")
    host.destroy(guest)


def test_region_is_there_when_xl_create_returns(host: Host) -> None:
    """`xl create` does not report success before the guest has what it was promised."""
    region = host.unique("demo")
    guest = host.guest("prompt", Entry(region, host.at, 64 * MIB), do="stay")
    host.create(guest)
    assert names(host.region(region)["members"], "state") == ["attached"]
    host.destroy(guest)


@pytest.mark.alike
def test_two_guests_created_at_once_different_regions(host: Host) -> None:
    """Two `xl create` at the same moment, each with a region of its own: both get theirs."""
    one = host.guest("one", Entry(host.unique("demo"), host.at, 16 * MIB), do="fill,check", seed=3)
    two = host.guest("two", Entry(host.unique("demo"), host.at, 16 * MIB), do="fill,check", seed=4)
    creating = [host.start_creating(guest) for guest in (one, two)]
    for running in creating:
        running.wait(2 * WAIT_S, check=True)
    host.wait_said(one, "checked pages=4096 bad=0 seed=3")
    host.wait_said(two, "checked pages=4096 bad=0 seed=4")
    holders = {region["holderUuid"] for region in host.regions()}
    assert len(holders) == 2  # nobody links them, so neither can reach the other's
    host.destroy(one, two)


def test_two_guests_created_at_once_same_region(host: Host) -> None:
    """Two `xl create` at the same moment for one new region: it is made once, and shared."""
    region = host.unique("demo")
    owner = host.guest("owner", Entry(region, host.at, 16 * MIB), do="fill", etc=True)
    borrower = host.guest(
        "borrower", Entry(region, host.at, 16 * MIB, "borrower"), do="await-fill,check", slot=1,
        etc=True,
    )  # fmt: skip
    creating = [host.start_creating(guest, etc=True) for guest in (borrower, owner)]
    for running in creating:
        running.wait(2 * WAIT_S, check=True)
    host.wait_said(borrower, "checked pages=4096 bad=0 seed=7")
    assert names(host.regions()) == [region]
    host.destroy(owner, borrower)


@pytest.mark.alike
def test_admin_pauses_a_member(host: Host) -> None:
    """`xl pause` and `xl unpause` of a running member change nothing of what it has."""
    region = host.unique("demo")
    beater = host.guest("beater", Entry(region, host.at), do="beat")
    watcher = host.guest("watcher", Entry(region, host.at, role="borrower"), do="watch", slot=1)
    host.create(beater)
    host.create(watcher)
    host.wait_beats(watcher, 0)
    before, since = host.regions(), host.mark
    host.xl("pause", beater.name)
    domid = host.domid(beater)
    assert host.ask("pause_count", domid) == 1
    host.ask("call", "Ping", {})
    assert host.regions() == before
    host.xl("unpause", beater.name)
    host.wait_beats(watcher, 0)
    assert host.regions() == before
    assert "<3>" not in host.log(since)
    host.destroy(beater, watcher)


@pytest.mark.alike
def test_a_guest_that_cannot_be_built(host: Host) -> None:
    """`xl create` fails as it does without us: libxl takes the lock that we hold to clean up."""
    lines = ('kernel = "/etc/passwd"',)
    guest = host.guest("bad", Entry(host.unique("demo"), host.at), do="stay", lines=lines)
    done = host.create(guest, check=False)
    assert done.status != 0
    assert "cannot (re-)build domain" in done.stderr.decode()
    assert host.domid(guest) is None
    host.wait(lambda: not host.regions(), "its region is freed")


@pytest.mark.alike
def test_configuration_of_our_own(host: Host) -> None:
    """A file in /etc/xshmd/guests.d gives regions to a guest whose xl configuration has none."""
    region = host.unique("demo")
    guest = host.guest("named", do="fill,check", shm=f"shm={host.at:#x},{MIB:#x}")
    text = f'static_shm = ["{Entry(region, host.at)}"]\nmemory = 8\ntype = "pvh"\n'
    host.dom0.put(f"/etc/xshmd/guests.d/{guest.name}.cfg", text)
    host.create(guest)
    host.wait_said(guest, "checked pages=256 bad=0 seed=7")
    assert names(host.regions()) == [region]
    host.destroy(guest)


@pytest.mark.alike
def test_configuration_on_the_command_line(host: Host) -> None:
    """What is appended on xl's command line counts, and relative paths are xl's own."""
    region = host.unique("demo")
    guest = host.guest("said", do="fill,check", shm=f"shm={host.at:#x},{MIB:#x}")
    host.created.append(guest)
    setting = f'static_shm=["{Entry(region, host.at)}"]'
    host.dom0.run(["xl", "create", f"{guest.name}.cfg", setting], cwd=CONFIGS)
    host.wait_said(guest, "checked pages=256 bad=0 seed=7")
    assert names(host.regions()) == [region]
    host.destroy(guest)


def test_guest_reads_its_regions_in_xenstore(host: Host) -> None:
    """A guest that can read xenstore finds its regions there, and cannot write them."""
    region = host.unique("demo")
    guest = host.guest("reader", Entry(region, host.at), do="stay")
    host.create(guest)
    domid = host.domid(guest)
    node = f"/local/domain/{domid}/xshm"
    text = host.dom0.run(["xenstore-read", f"{node}/{region}"]).text
    words = dict(word.split("=") for word in text.split())
    assert words["begin"] == f"{host.at:#x}"
    assert words["size"] == f"{MIB:#x}"
    assert (words["role"], words["prot"]) == ("owner", "rw")
    listed = host.dom0.run(["xenstore-ls", "-fp", node]).text
    assert {line.rpartition("(")[2] for line in listed.splitlines()} == {f"n0,r{domid})"}
    records = host.dom0.run(["xenstore-ls", "-fp", "/xshmd"]).text
    assert {line.rpartition("(")[2] for line in records.splitlines()} == {"n0)"}
    host.destroy(guest)
