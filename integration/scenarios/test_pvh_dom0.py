# SPDX-License-Identifier: LGPL-2.1-or-later
"""A PVH dom0 maps nothing that is foreign in turn: only the keeper has what is sealed."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from integration.scenarios.conftest import booted
from integration.scenarios.guest import MIB, Entry
from integration.scenarios.host import Host, detach
from integration.scenarios.test_sealed import SEALED, is_empty

pytestmark = [pytest.mark.arch("x86_64"), pytest.mark.own_boot]


@pytest.fixture(scope="module")
def host(arch: str) -> Iterator[Host]:
    """A machine with such a dom0."""
    with booted(arch, "pvh-dom0", dom0="pvh") as booted_host:
        yield booted_host


def test_dom0_is_what_it_is_to_be(host: Host) -> None:
    """Its kernel took the PVH way, and Xen says that dom0 is no PV domain."""
    assert host.dom0.run("dmesg | grep -c 'Hypervisor detected: Xen HVM'").text == "1"
    dom0 = next(one for one in host.ask("domains") if one["domid"] == 0)
    assert (dom0["hvm"], dom0["hap"]) == (True, True)


def test_two_guests_share(host: Host) -> None:
    """One fills 16 MiB, dom0 reads it, and the other finds it; the daemon is killed meanwhile."""
    region = host.unique("shared")
    size = 16 * MIB
    owner = host.guest("owner", Entry(region, host.at, size), do="fill,beat")
    host.create(owner)
    host.wait_said(owner, f"filled pages={size // 4096} .*")
    data = host.xshmctl("dump", "--offset", "64", "--length", "8", region).stdout
    assert data == (0x5853484D << 32 | 7).to_bytes(8, "little")
    host.stop_daemon(signal.SIGKILL)
    host.start_daemon()
    borrower = host.guest(
        "borrower", Entry(region, host.at, size, "borrower"), do="check,watch", slot=1
    )
    host.create(borrower)
    host.wait_said(borrower, f"checked pages={size // 4096} bad=0 seed=7")
    host.wait_beats(borrower, 0)
    host.destroy(owner, borrower)


def test_sealed_contents_outlive_the_daemon(host: Host) -> None:
    """Windows copy what dom0 cannot map any more: the keeper has had it mapped all the time."""
    region = host.unique("sealed")
    owner = host.guest("owner", Entry(region, host.at, more=SEALED), do="fill,beat")
    host.create(owner)
    host.wait_said(owner, "filled .*")
    assert is_empty(host, region)
    host.stop_daemon(signal.SIGKILL)
    host.start_daemon()
    late = host.guest(
        "late", Entry(region, host.at, role="borrower"), do="await-fill,check,watch", slot=1
    )
    host.create(late)
    host.wait_said(late, "checked pages=256 bad=0 seed=7")
    host.wait_beats(late, 0)
    host.apply(detach(late, region))
    assert is_empty(host, region)
    host.destroy(owner, late)
