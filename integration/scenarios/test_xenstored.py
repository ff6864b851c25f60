# SPDX-License-Identifier: LGPL-2.1-or-later
"""xenstored is updated, stands still or is killed: guests notice nothing, and nothing is lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from integration.scenarios.conftest import booted
from integration.scenarios.guest import MIB, Entry
from integration.scenarios.host import (
    XEN_BIN,
    XENSTORED,
    XENSTORED_PID,
    Host,
    add,
    attach,
    detach,
    names,
    remove,
)

pytestmark = pytest.mark.alike


@contextmanager
def xenstored_stopped(host: Host) -> Iterator[None]:
    """Run the body while xenstored answers nobody."""
    host.dom0.run(f"kill -STOP {XENSTORED_PID}")
    try:
        yield
    finally:
        host.dom0.run(f"kill -CONT {XENSTORED_PID}")


def test_xenstored_is_updated(host: Host) -> None:
    """Two guests talk and a third is being made: xshmd's watches go on, so the third has its
    region, another is attached and detached, and every end is seen."""
    since = host.mark
    region, beater, watcher = host.beater_and_watcher()
    host.create_all(beater, watcher)
    host.wait_beats(watcher, 0)
    before = host.regions()
    host.update_xenstored()
    assert host.regions() == before
    host.wait_beats(watcher, 0)
    third = host.guest("third", Entry(region, host.at, role="borrower"), do="check", slot=2)
    creating = host.start_creating(third)
    host.update_xenstored()
    creating.wait(600, check=True)
    host.wait_said(third, "checked pages=256 bad=0 seed=7")
    more = host.unique("more")
    host.apply(add(more, MIB))
    late = host.guest("late")
    host.create(late)
    domid = host.domid(late)
    assert domid is not None
    host.apply(attach(domid, more, host.at, MIB))
    host.update_xenstored()
    host.apply(detach(domid, more), remove(more))
    host.destroy(beater, watcher, third, late)
    host.wait(lambda: not host.regions(), "every end was seen")
    assert "xenstored lost" not in host.log(since)


def test_xenstored_stands_still(host: Host) -> None:
    """A guest is being made as xenstored stops: who asks for a change is told so within seconds,
    who only looks is answered, guests talk on; then all goes on where it was."""
    region, beater, watcher = host.beater_and_watcher()
    host.create_all(beater, watcher)
    host.wait_beats(watcher, 0)
    third = host.guest("third", Entry(region, host.at, role="borrower"), do="check", slot=2)
    more = host.unique("more")
    creating = host.start_creating(third)
    with xenstored_stopped(host):
        said = host.refused(add(more, MIB))
        assert "StoreTimedOut: xenstored did not answer" in said
        assert "within 5 s" in said
        assert region in host.xshmctl("list", "--no-legend").text
        host.wait_beats(watcher, 0)
        assert host.daemon_runs
    creating.wait(600, check=True)
    host.wait_said(third, "checked pages=256 bad=0 seed=7")
    # What was asked for may have been done meanwhile: it can be asked for again, or taken back.
    if more not in names(host.regions()):
        host.apply(add(more, MIB))
    host.apply(remove(more))
    host.destroy(beater, watcher, third)


@pytest.mark.own_boot
def test_xenstored_is_killed(arch: str) -> None:
    """All that it knew is lost, which no Xen can mend: xshmd says so, refuses changes and touches
    nothing. To an empty one in its place it writes its records, by which its next life goes on; one
    that finds none leaves the holder alone, and with it the guests' memory."""
    with booted(arch, "store-killed") as host:
        _, beater, watcher = host.beater_and_watcher()
        host.create_all(beater, watcher)
        host.wait_beats(watcher, 0)
        before, domains, since = host.regions(), host.ask("domains"), host.mark
        host.dom0.run(f"kill -KILL {XENSTORED_PID}")
        host.wait_log(r"^<4>xenstored lost reason=", since)
        said = host.refused(add("more", MIB))
        assert "StoreLost: not connected to xenstored" in said
        assert host.regions() == before
        host.wait_beats(watcher, 0)
        start_empty(host)
        host.wait_log(r"^<3>xenstored lost its nodes reason=", since)
        check_untouched(host, domains)
        host.stop_daemon(signal.SIGKILL)
        host.start_daemon()
        assert host.regions() == before
        check_untouched(host, domains)
        host.wait_beats(watcher, 0)
        host.stop_daemon(signal.SIGKILL)
        host.dom0.run(f"kill -KILL {XENSTORED_PID}")
        start_empty(host)
        since = host.mark
        host.start_daemon()
        host.wait_log(r"^<4>holder without a record left alone", since)
        check_untouched(host, domains)
        host.wait_beats(watcher, 0)


def start_empty(host: Host) -> None:
    """Start a xenstored that knows of dom0 alone."""
    host.dom0.run(f"{XENSTORED} --pid-file /run/xenstored.pid && {XEN_BIN}/xen-init-dom0")


def check_untouched(host: Host, domains: list[dict[str, object]]) -> None:
    """Every domain is there as it was, has its pages and is not paused."""
    watched = ("domid", "uuid", "tot_pages", "paused", "dying")
    now = [[one[key] for key in watched] for one in host.ask("domains")]
    assert now == [[one[key] for key in watched] for one in domains]
