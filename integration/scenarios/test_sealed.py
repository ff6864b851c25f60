# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sealed groups: who has a region is changed in windows, in which all of its group stand still."""

from __future__ import annotations

import json
import re
import signal

import pytest

from integration.scenarios.guest import FREE_WORD, MIB, PAGE, Entry
from integration.scenarios.host import POLICY, Host, add, attach, detach, remove

SEALED = "isolation=sealed"


def is_empty(host: Host, region: str) -> bool:
    """Whether nobody, not even dom0, can map a frame of the region's holder."""
    found = host.region(region)
    frames = range(found["holderFirstFrame"], found["holderFirstFrame"] + found["frameCount"])
    left: list[int] = host.ask("populated", found["holderDomainId"], list(frames))
    return not left


def dumped(host: Host, region: str, offset: int = 0, size: int = 8) -> bytes:
    """Some bytes of a region, as dom0 reads them."""
    where = ["--offset", str(offset), "--length", str(size)]
    return host.xshmctl("dump", *where, region).stdout


def test_guests_join_and_leave_while_others_talk(host: Host) -> None:
    """Three guests find the same contents, one after the other, each with fresh pages for all of
    them; nobody could have mapped a page by itself; who is detached is out."""
    region, since = host.unique("sealed"), host.mark
    first = host.guest("first", Entry(region, host.at, more=SEALED), do="boots,fill,beat")
    host.create(first)
    host.wait_said(first, "filled .*")
    assert is_empty(host, region)
    second = host.guest(
        "second", Entry(region, host.at, role="borrower"), do="await-fill,check,beat-watch", slot=1
    )
    host.create(second)
    host.wait_said(second, "checked pages=256 bad=0 seed=7")
    host.wait_beats(second, 0)
    assert is_empty(host, region)
    # It sleeps when it has looked: without its region a guest that went on would fault.
    third = host.guest(
        "third", Entry(region, host.at, role="borrower"), do="await-fill,check", slot=2
    )
    host.create(third)
    host.wait_said(third, "checked pages=256 bad=0 seed=7")
    host.wait_beats(second, 0)
    holder = host.domain(host.region(region)["holderDomainId"])
    assert holder is not None
    assert (holder["max_pages"], holder["tot_pages"]) == (0, 257)
    assert host.region(region)["pauseMicroseconds"] > 0
    host.apply(detach(third, region))
    host.wait_beats(second, 0)
    # The third has nothing any more, and the same target for as long as it runs.
    host.wait_log("group paused .*why='admin; 3 guests stood still'", since)
    assert is_empty(host, region)
    host.destroy(first, second, third)


def test_contents_outlive_reboot_and_daemon(host: Host) -> None:
    """The only member reboots, so no guest has the region for a while; the daemon is killed; what
    was in it is there for who comes next."""
    region = host.unique("sealed")
    guest = host.guest("boots", Entry(region, host.at, more=SEALED), do="boots,reboot-once,fill")
    host.create(guest)
    host.wait_said(guest, "boots=2")
    host.wait_said(guest, "filled .*")
    host.stop_daemon(signal.SIGKILL)
    host.start_daemon()
    assert dumped(host, region, 128, 4) == (2).to_bytes(4, "little")
    other = host.guest(
        "other", Entry(region, host.at_elsewhere, role="borrower"), do="await-fill,check", slot=1
    )
    host.create(other)
    host.wait_said(other, "checked pages=256 bad=0 seed=7")
    host.destroy(guest, other)


@pytest.mark.alike
def test_regions_of_one_group_are_not_each_others(host: Host) -> None:
    """Two that share nothing with each other have the same target, and the window for one region
    leaves the pages of the other as they are."""
    one, two = host.unique("one"), host.unique("two")
    both = host.guest(
        "both", Entry(one, host.at, more=SEALED), Entry(two, host.at_elsewhere, more=SEALED),
        do="fill:0,fill:1",
    )  # fmt: skip
    left = host.guest("left", Entry(one, host.at, role="borrower"), do="await-fill,check", slot=1)
    right = host.guest("right", Entry(two, host.at, role="borrower"), do="await-fill,check", slot=2)
    host.create_all(both, left, right)
    host.wait_said(left, "checked pages=256 bad=0 seed=7")
    host.wait_said(right, "checked pages=256 bad=0 seed=7")
    assert host.region(one)["holderUuid"] == host.region(two)["holderUuid"]
    assert is_empty(host, one)
    assert is_empty(host, two)
    host.destroy(both, left, right)


@pytest.mark.alike
def test_filled_beforehand_and_given_to_guests_that_run(host: Host) -> None:
    """A sealed region of the system is loaded before anybody has it, attached to two that run,
    detached and dumped."""
    region = host.unique("sealed")
    a, b = host.guest("a"), host.guest("b", slot=1)
    host.create(a)
    host.create(b)
    made = add(region, MIB)
    made["add"]["terms"] = {"isolation": "sealed"}
    host.apply(made)
    host.dom0.run(f"printf 12345678 | xshmctl load --offset {FREE_WORD} {region}")
    assert dumped(host, region) == b"12345678"
    host.apply(attach(a, region, host.at, MIB), attach(b, region, host.at, MIB))
    assert is_empty(host, region)
    host.apply(detach(a, region), detach(b, region))
    assert dumped(host, region) == b"12345678"
    host.apply(remove(region))
    host.destroy(a, b)


@pytest.mark.alike
def test_a_pause_that_is_too_long_is_refused(host: Host) -> None:
    """What may not stand still for so long goes on with what it has."""
    region, since = host.unique("sealed"), host.mark
    first = host.guest("first", Entry(region, host.at, more=SEALED), do="fill,beat")
    host.create(first)
    host.wait_said(first, "filled .*")
    with host.policy('[limits]\npause = "0 ms"\n'):
        refused = host.guest("refused", Entry(region, host.at, role="borrower"), slot=1)
        assert host.create(refused, check=False).status
        ((_, reason),) = host.refusals(since)
        assert "1 guest of its group would stand still for about" in reason
        assert f"raise {POLICY}:2: limits.pause" in reason
    watcher = host.guest("watcher", Entry(region, host.at, role="borrower"), do="watch", slot=2)
    host.create(watcher)
    host.wait_beats(watcher, 0)
    host.destroy(first, watcher)


@pytest.mark.alike
@pytest.mark.parametrize("moment", ["window-preparing", "window-swapping"])
def test_killed_in_a_window(host: Host, moment: str) -> None:
    """kill -9 in a window: the next daemon undoes it, or finishes it if members may have been given
    their new pages; all go on."""
    region = host.unique("sealed")
    first = host.guest("first", Entry(region, host.at, 24 * MIB, more=SEALED), do="fill,beat")
    second = host.guest(
        "second", Entry(region, host.at, 24 * MIB, role="borrower"),
        do="await-fill,check,watch", slot=1,
    )  # fmt: skip
    host.create(first)
    host.wait_said(first, "filled .*")
    words = ["python3", "-I", "/rig/xen-probe.py", "kill-when", str(host.daemon_pid), moment]
    killer = host.dom0.spawn(words)
    host.wait(lambda: b"watching" in killer.stdout, "the killer watches")
    creating = host.start_creating(second)
    done = killer.wait(150)
    assert done.status == 0, done.stdout
    host.await_killed()
    host.start_daemon()
    creating.wait(300)
    host.wait_said(second, "checked pages=6144 bad=0 seed=7")
    host.wait_beats(second, 0)
    assert is_empty(host, region)
    host.destroy(first, second)


@pytest.mark.alike
@pytest.mark.alike
def test_the_pause_is_told(host: Host) -> None:
    """How long the group stood still is in the log, in the record, and in what show says."""
    region = host.unique("sealed")
    one = host.guest("one", Entry(region, host.at, 64 * PAGE, more=SEALED))
    other = host.guest("other", Entry(region, host.at, 64 * PAGE, "borrower"), slot=1)
    host.create(one)
    assert host.region(region)["pauseMicroseconds"] is None, "nobody had to stand still"
    host.create(other)
    shown = host.xshmctl("show", region).text
    assert re.search(r"Isolation: sealed", shown)
    assert "ms a MiB" in shown
    found = json.loads(host.xshmctl("-j", "show", region).text)["region"]
    assert found["pauseMicroseconds"] == host.region(region)["pauseMicroseconds"] > 0
    host.destroy(one, other)
