# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests without an operating system wake each other, and none ever waits for a ring that is lost.

Whoever waits here sleeps in Xen until it is rung: a lost ring is a scenario that does not end.
"""

from __future__ import annotations

import os
import re
import signal

import pytest

from integration.scenarios.guest import MIB, Entry, Guest
from integration.scenarios.host import Host

RINGS = int(os.environ.get("XSHMD_RINGS", "20000"))
"""How many there are in the flood; `make rings` has a million of them."""
FLOOD_S = 180.0 + RINGS / 1000


def pair(
    host: Host, first: str, second: str, ticks: int = 100, route: str = ""
) -> tuple[Guest, Guest]:
    """An owner, which is peer 0, and a borrower, peer 1, of a region with doorbells for three."""
    region = host.unique("bells")
    owner = host.guest(
        "zero",
        Entry(region, host.at, MIB, more=f"doorbells=3{route}"),
        do=first,
        slot=0,
        ticks=ticks,
    )
    borrower = host.guest(
        "one", Entry(region, host.at, MIB, "borrower"), do=second, slot=1, ticks=ticks
    )
    return owner, borrower


def region_of(guest: Guest) -> str:
    entry = guest.entries[0]
    assert isinstance(entry, Entry)
    return entry.region


def number(line: str, word: str) -> int:
    found = re.search(rf"\b{word}=(\d+)", line)
    assert found is not None, line
    return int(found[1])


def test_two_guests_ring_each_other(host: Host) -> None:
    """A round is a ring there and a ring back; each finds the number it waits for after each."""
    zero, one = pair(host, "peers,bell-ping", "peers,bell-pong", ticks=200)
    host.create_all(zero, one)
    # Debian's Xen has SILO on Arm, where guests talk to dom0 only, and no policy at all on x86.
    direct = int(host.arch != "arm64")
    host.wait_said(zero, rf"bell-ping rounds=200 last=\d+ wakes=\d+ direct={direct} us=\d+")
    host.wait_said(one, rf"bell-pong rounds=200 last=\d+ wakes=\d+ direct={direct} us=\d+")
    members = {member["guest"]: member for member in host.region(region_of(zero))["members"]}
    # Its own ports are the lowest that were free: what no guest need be told.
    first = 4 if host.arch == "arm64" else 3
    for peer_id, guest in enumerate((zero, one)):
        assert members[guest.name]["peerId"] == peer_id
        assert members[guest.name]["ports"] == [first, first + 1, first + 2]
        host.wait_said(guest, f"peer id={peer_id} of=3 first-port={first}")
    node = f"/local/domain/{host.domid(one)}/xshm/{region_of(one)}"
    words = host.dom0.run(["xenstore-read", node]).text.split()
    assert words[-2:] == ["peer=1", f"doorbells={first},{first + 1},{first + 2}"]
    host.destroy(zero, one)


def test_rings_that_are_to_go_by_dom0(host: Host) -> None:
    """doorbell_route=relayed: no guest rings another past dom0, whatever Xen would allow."""
    zero, one = pair(host, "peers,bell-ping", "peers,bell-pong", route=", doorbell_route=relayed")
    before = host.ask("call", "Status", {})["status"]["counters"]["doorbell_rings"]
    host.create_all(zero, one)
    host.wait_said(zero, r"bell-ping rounds=100 .* direct=0 us=\d+")
    host.wait_said(one, r"bell-pong rounds=100 .* direct=0 us=\d+")
    after = host.ask("call", "Status", {})["status"]["counters"]["doorbell_rings"]
    assert after - before >= 200
    host.destroy(zero, one)


def test_no_ring_is_lost_in_a_flood(host: Host) -> None:
    """One rings as fast as it can; the other sleeps in between, and sees the last in any case."""
    zero, one = pair(host, "await-peer,flood", "peers,await-peer,flooded", ticks=RINGS)
    host.create_all(zero, one)
    began, before = host.mark, host.ask("call", "Status", {})["status"]["counters"]
    rang = host.wait_said(zero, rf"flood rings={RINGS} .*", timeout_s=FLOOD_S)
    line = host.wait_said(one, rf"flooded last={RINGS} .*", timeout_s=FLOOD_S)
    assert 1 <= number(line, "wakes") <= RINGS
    assert "doorbell lost" not in host.log(began)
    after = host.ask("call", "Status", {})["status"]["counters"]
    by_dom0 = after["doorbell_rings"] - before["doorbell_rings"]
    print(
        f"{RINGS} rings in {number(rang, 'us') / 1e6:.1f} s, "
        f"{by_dom0} of them looked at in dom0; the peer was woken {number(line, 'wakes')} times"
    )
    host.destroy(zero, one)


@pytest.mark.alike
def test_a_counter_wakes_at_zero(host: Host) -> None:
    """Of a hundred triggers of a watched address the last one wakes: the counter is 0 then."""
    zero, one = pair(host, "triggered", "trigger", ticks=100)
    host.create_all(zero, one)
    host.wait_said(zero, "watching left=100")
    host.wait_said(one, "trigger times=100 woken=1")
    host.wait_said(zero, "triggered left=0 .*")
    host.destroy(zero, one)


def test_messages_arrive_whole_and_in_order(host: Host) -> None:
    """The ring of messages, which both ends sleep on when it is full or empty."""
    zero, one = pair(host, "send", "peers,receive", ticks=2_000)
    host.create_all(zero, one)
    host.wait_said(one, "receive messages=2000 bad=0")
    host.wait_said(zero, "send messages=2000 bytes=64 .*")
    host.destroy(zero, one)


def test_doorbells_outlive_the_daemon(host: Host) -> None:
    """Rings stop while no daemon runs, and guests that wait for one are rung by the next."""
    route = ", doorbell_route=relayed"
    zero, one = pair(host, "peers,bell-ping", "peers,bell-pong", ticks=5_000, route=route)
    host.create_all(zero, one)
    host.wait_said(one, "peer id=1 .*")
    ports = {}
    host.stop_daemon(signal.SIGKILL)
    assert not [line for line in host.said(zero) if line.startswith("bell-ping")]
    host.start_daemon()
    for guest in (zero, one):
        members = host.region(region_of(guest))["members"]
        ports[guest.name] = next(m["ports"] for m in members if m["guest"] == guest.name)
    host.wait_said(zero, r"bell-ping rounds=5000 .*")
    host.wait_said(one, r"bell-pong rounds=5000 .*")
    assert ports[zero.name] == ports[one.name]
    host.destroy(zero, one)


def test_a_peer_reboots_and_is_rung_again(host: Host) -> None:
    """It has its number and its ports again, and the other its doorbell."""
    zero, one = pair(host, "boots,reboot-once,peers,bell-ping", "peers,bell-pong", ticks=100)
    host.create_all(zero, one)
    host.wait_said(zero, "reboot")
    host.wait_said(zero, "peer id=0 .*")
    host.wait_said(zero, r"bell-ping rounds=100 .*")
    host.wait_said(one, r"bell-pong rounds=100 .*")
    host.destroy(zero, one)


@pytest.mark.alike
def test_a_peer_that_lies_harms_nobody(host: Host) -> None:
    """It writes anything into the control page and rings all the while: its peers go on, the
    daemon answers, and a region that it has nothing to do with does not notice."""
    zero, one = pair(host, "scribble", "survive", ticks=3_000)
    two, three = pair(host, "peers,bell-ping", "peers,bell-pong", ticks=300)
    host.create_all(zero, one, two, three)
    host.wait_said(one, r"survived rounds=3000 .*")
    host.wait_said(zero, r"scribbled rounds=3000")
    host.wait_said(two, r"bell-ping rounds=300 .*")
    host.wait_said(three, r"bell-pong rounds=300 .*")
    assert host.ask("call", "Trigger", {"id": region_of(zero), "offsetBytes": 0})["woken"] <= 4
    host.destroy(zero, one, two, three)


@pytest.mark.alike
def test_dom0_triggers_and_is_triggered(host: Host) -> None:
    """A client of the daemon wakes a guest that watches, counting down with it."""
    zero, _ = pair(host, "triggered", "stay", ticks=3)
    host.create(zero)
    host.wait_said(zero, "watching left=3")
    place = {"id": region_of(zero), "offsetBytes": 0x800}
    woken = [host.ask("call", "Trigger", place)["woken"] for _ in range(4)]
    assert woken == [0, 0, 1, 0]
    host.wait_said(zero, "triggered left=0 .*")
    members = host.region(region_of(zero))["members"]
    assert [member["peerState"] for member in members] == ["ready"]
    host.destroy(zero)


def test_event_channel_contract_on_real_xen(host: Host) -> None:
    """What the model says of event channels the unit tests believe; here Xen says it."""
    guest = host.guest("still", do="stay")
    host.create(guest)
    done = host.dom0.run(
        ["python3", "-m", "tests.contract.event_cases", str(host.domid(guest))],
        cwd="/rig", check=False, timeout_s=300,
    )  # fmt: skip
    assert done.status == 0, done.describe()
    host.destroy(guest)
