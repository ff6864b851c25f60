# SPDX-License-Identifier: LGPL-2.1-or-later
"""Xen or dom0 has no memory left: what cannot be given is refused, and what was given stays."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from integration.scenarios.guest import MIB, PAGE, Entry
from integration.scenarios.host import Host, add, attach, detach, names, remove

pytestmark = pytest.mark.alike


def test_no_free_memory(host: Host) -> None:
    """Another domain takes what is free: a new region, a guest with one and, at the end, even an
    attach are refused with what there is; guests talk on, and with memory again all of it works."""
    region, beater, watcher = host.beater_and_watcher()
    host.create_all(beater, watcher)
    small, large = host.unique("small"), host.unique("large")
    host.apply(add(small, 64 * PAGE))
    late, ballast = host.guest("late"), host.guest("ballast")
    host.create(late)
    host.create(ballast, "-p")
    domid, taker = host.domid(late), host.domid(ballast)
    assert domid is not None
    refused = host.guest("refused", Entry(large, host.at, 64 * MIB))
    host.ask("take_free_pages", taker, 32 * MIB // PAGE)
    said = host.refused(add(large, 64 * MIB))
    figures = r"64 MiB and the host has 3[12](\.\d+)? MiB free, of which 16 MiB stay free"
    assert re.search(rf"OutOfMemory: what is to be made \({large}\) needs {figures}", said), said
    since = host.mark
    assert host.create(refused, check=False).status
    host.wait_gone(refused)
    ((_, why),) = host.refusals(since)
    assert re.search(f"region {large} needs 64 MiB", why), why
    left = host.ask("take_free_pages", taker, 0)
    said = host.refused(attach(domid, small, host.at, 64 * PAGE))
    assert re.search(r"OutOfMemory: domain \d+ needs 8\d KiB for its page tables", said), said
    assert f"and the host has {left * 4} KiB free" in said or not left, said
    assert host.ask("free_pages") == left, "nothing was half done"
    assert names(host.regions()) == sorted([region, small])
    assert host.region(small)["members"] == []
    host.wait_beats(watcher, 0)
    host.destroy(ballast)
    host.wait(lambda: host.ask("free_pages") > 64 * MIB // PAGE, "its memory is free")
    host.apply(attach(domid, small, host.at, 64 * PAGE))
    host.apply(detach(domid, small), remove(small))
    host.create(refused)
    host.wait_said(refused, "hello .*")
    host.destroy(beater, watcher, late, refused)


LITTLE = "/sys/fs/cgroup/little"
IN_LITTLE = ("sh", "-c", f'echo $$ > {LITTLE}/cgroup.procs; exec xshmd "$@"', "xshmd")


@pytest.fixture
def little_memory(host: Host) -> Iterator[None]:
    """A daemon that is throttled (MemoryHigh= in a unit) as soon as it wants more than it has."""
    host.dom0.run(f"echo +memory > /sys/fs/cgroup/cgroup.subtree_control; mkdir {LITTLE}")
    host.stop_daemon()
    host.program = IN_LITTLE
    host.start_daemon()
    host.dom0.run(f"cat {LITTLE}/memory.current > {LITTLE}/memory.high")
    yield
    host.clean_up()
    host.stop_daemon()
    del host.program
    host.dom0.run(["rmdir", LITTLE])
    host.start_daemon()


def test_no_memory_for_the_daemon(host: Host, little_memory: None) -> None:
    """It serves all the same: guests are made and talk, a change is made."""
    region, beater, watcher = host.beater_and_watcher()
    host.create_all(beater, watcher)
    host.wait_beats(watcher, 0)
    more = host.unique("more")
    host.apply(add(more, MIB))
    assert names(host.regions()) == sorted([region, more])
    host.apply(remove(more))
    counted = host.dom0.run(f"cat {LITTLE}/memory.events").text
    assert re.search(r"^high [1-9]", counted, re.MULTILINE), counted
    host.destroy(beater, watcher)
