# SPDX-License-Identifier: LGPL-2.1-or-later
"""What guests have of each other where Xen lets them: they map grants, and ring without dom0.

An Arm machine has to be booted for it: Debian's Xen keeps its guests apart there.
"""

from __future__ import annotations

import hashlib
import re
import signal
from collections.abc import Iterator

import pytest

from integration.scenarios.conftest import booted
from integration.scenarios.guest import MIB, Entry, Guest
from integration.scenarios.host import Host, add, attach, detach, remove

SIZE = 34 * MIB
"""More than one grant table serves four members with."""
SEED = 7
REFUSED = {
    "x86_64": "refused: the store was dropped",
    "arm64": "refused: the store never ends",
}
"""What comes of a store to what was granted for reading."""


@pytest.fixture(scope="module")
def host(arch: str, request: pytest.FixtureRequest) -> Iterator[Host]:
    """A machine whose guests may map grants of each other: Arm's Xen runs with SILO by itself."""
    if arch != "arm64":
        yield request.getfixturevalue("session_host")
        return
    with booted(arch, "xsm-dummy", xen_args=("xsm=dummy",)) as machine:
        yield machine


def entry(
    host: Host, region: str, role: str = "owner", *, prot: str = "rw", size: int = SIZE
) -> Entry:
    more = f"prot={prot}"
    if role == "owner":
        more += ", transport=grant"
    return Entry(region, host.at, size, role=role, more=more)


def linux(host: Host, name: str, *entries: Entry, do: str) -> Guest:
    return host.guest(name, *entries, linux=True, shm="", do=do, seed=SEED, etc=True)


@pytest.mark.counts_as(3)
def test_what_is_granted_for_reading_is_not_written(host: Host) -> None:
    """The owner writes, the borrower reads; Xen refuses it a writable map, and a forced store."""
    region = host.unique("granted")
    owner = linux(
        host,
        "giver",
        entry(host, region),
        do=f"granted-list,granted-put:{region},granted-hold:{region}",
    )
    reader = linux(
        host,
        "reader",
        entry(host, region, "borrower", prot="ro"),
        do=f"granted-await:{region},granted-get:{region},granted-try:{region},granted-sum:{region}",
    )
    host.create(owner, etc=True)
    host.create(reader, etc=True)
    told = host.wait_said(owner, rf"{region} begin=.*")
    assert "transport=grant" in told
    assert len(re.findall(r"\d+:\d+\+\d+", told)) == 2, "one range for each of two holders"
    host.wait_said(owner, rf"mapped {region} rw {SIZE}", times=2)
    host.wait_said(reader, f"seen {SEED} in {region}")
    host.wait_said(reader, r"xshm-guest: Xen refuses references .* to be written: Invalid argument")
    host.wait_said(reader, rf"mapped {region} ro {SIZE}")
    host.wait_said(reader, REFUSED[host.arch])
    content = SEED.to_bytes(8, "little") + bytes(SIZE - 8)
    host.wait_said(reader, f"sum {hashlib.md5(content).hexdigest()} of {region}")
    record = host.region(region)
    assert record["terms"]["transport"] == "grant"
    shown = host.xshmctl("show", region).text
    assert shown.count(f"maps {SIZE // 4096} grant references") == 2
    _check_withdrawal(host, owner, reader, region)


def _check_withdrawal(host: Host, owner: Guest, reader: Guest, region: str) -> None:
    """What is mapped stays mapped, which is said; when the guest has ended all is given back."""
    since = host.mark
    host.apply(detach(owner, region))
    host.wait_log(rf"^<4>withdrawn region still mapped .*{owner.name}", since)
    assert f"{region} (withdrawn, still mapped)" in host.xshmctl("list", "--guests").text
    assert f"still mapped by {owner.name}," in host.xshmctl("show", region).text
    host.apply(detach(reader, region))
    host.destroy(owner, reader)
    host.wait(lambda: not host.regions(), "the region is gone")


@pytest.mark.counts_as(2)
def test_a_guest_that_reboots_finds_its_region_anew(host: Host) -> None:
    """Its new domain has a new number, and references of its own.

    While it runs it is given another region, which it loses again to the next daemon.
    """
    region, more = host.unique("again"), host.unique("more")
    verbs = (
        f"granted-once:{region},granted-list,granted-await:{more},granted-await-withdrawal:{more}"
    )
    guest = linux(host, "again", entry(host, region, size=MIB), do=verbs)
    host.create(guest, etc=True)
    first = host.domid(guest)
    host.wait_said(guest, "reboot")
    host.wait_said(guest, f"got {SEED:#x}")
    told = host.wait_said(guest, rf"{region} begin=.*")
    second = host.domid(guest)
    assert second not in (None, first)
    assert host.region(region)["members"][0]["domainId"] == second
    assert "grants=" in told
    _check_transfer(host, guest, region)
    made = add(more, MIB)
    made["add"]["terms"] = {"transport": "grant"}
    host.apply(made, attach(guest, more, host.at + MIB, MIB))
    host.poke(more, 0, 0, SEED)
    host.wait_said(guest, f"seen {SEED} in {more}")
    host.stop_daemon(signal.SIGKILL)
    host.start_daemon()
    host.apply(detach(guest, more), remove(more))
    host.wait_said(guest, f"withdrawn {more}")
    host.destroy(guest)
    host.wait(lambda: not host.regions(), "the regions are gone")


def _check_transfer(host: Host, guest: Guest, region: str) -> None:
    """What the guest has written goes by Xen's own copy into a list that dom0 has posted."""
    room = [{"offsetBytes": 8192, "byteCount": 8}]
    host.ask("call", "RegisterList", {"region": region, "direction": "input", "ranges": room})
    source = [{"offsetBytes": 0, "byteCount": 64}]
    wanted = {"region": region, "guest": guest.name, "direction": "output", "ranges": source}
    assert host.ask("call", "Transfer", wanted) == {"byteCount": 8}
    assert host.peek(region, 2, 0) == SEED


@pytest.mark.arch("arm64")
def test_guests_ring_each_other_without_dom0(host: Host) -> None:
    """Each binds what the other offers, or hears it, and a reboot makes a new channel.

    On x86 all doorbells are like that, in test_doorbells.py.
    """
    region = host.unique("bells")
    bells = Entry(region, host.at, MIB, more="doorbells=2")
    zero = host.guest("zero", bells, do="boots,reboot-once,peers,bell-ping", slot=0)
    one = host.guest("one", Entry(region, host.at, MIB, "borrower"), do="peers,bell-pong", slot=1)
    host.create(zero)
    host.create(one)
    host.wait_said(zero, r"bell-ping rounds=100 .* direct=1 us=\d+")
    host.wait_said(one, r"bell-pong rounds=100 .* direct=1 us=\d+")
    host.destroy(zero, one)
