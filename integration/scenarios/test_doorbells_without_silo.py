# SPDX-License-Identifier: LGPL-2.1-or-later
"""On an Arm machine whose Xen lets guests talk to each other, they ring each other without dom0."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from integration import Machine
from integration.scenarios.conftest import CONFIG_FOLDERS
from integration.scenarios.guest import MIB, Entry
from integration.scenarios.host import Host, artefacts

pytestmark = [pytest.mark.arch("arm64"), pytest.mark.own_boot]

LIMIT_S = 1800


@pytest.fixture
def open_host(arch: str) -> Iterator[Host]:
    """A machine with ``xsm=dummy``, which Debian's Xen on Arm does not have of itself."""
    folder = artefacts(arch, "xsm-dummy")
    with Machine(arch, artefacts=folder, time_limit_s=LIMIT_S, xen_args=("xsm=dummy",)) as machine:
        machine.dom0.run(f"mkdir -p {CONFIG_FOLDERS}")
        host = Host(machine)
        host.start_daemon()
        try:
            yield host
        finally:
            host.close()


def test_guests_ring_each_other_without_dom0(open_host: Host) -> None:
    """Each binds what the other offers, or hears it, and a reboot makes a new channel."""
    host, region = open_host, open_host.unique("bells")
    entry = Entry(region, host.at, MIB, more="doorbells=2")
    zero = host.guest("zero", entry, do="boots,reboot-once,peers,bell-ping", slot=0)
    one = host.guest("one", Entry(region, host.at, MIB, "borrower"), do="peers,bell-pong", slot=1)
    for guest in (zero, one):
        host.create(guest)
    host.wait_said(zero, r"bell-ping rounds=100 .* direct=1 us=\d+")
    host.wait_said(one, r"bell-pong rounds=100 .* direct=1 us=\d+")
    host.destroy(zero, one)
