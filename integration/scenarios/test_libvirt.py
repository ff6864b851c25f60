# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt starts guests by libxl in a process of its own: the gate is there for them too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from integration.scenarios.guest import Entry, Guest
from integration.scenarios.host import Host, names
from integration.scenarios.libvirt import LOG, OWN, Libvirt

pytestmark = [pytest.mark.image("libvirt"), pytest.mark.arch("x86_64")]

SHIPPED = "/usr/lib/python3/dist-packages/xshmd/resources/hooks"
HOOK = "/etc/libvirt/hooks/libxl"


@pytest.fixture(scope="module")
def libvirt(session_host: Host) -> Iterator[Libvirt]:
    libvirt = Libvirt(session_host)
    yield libvirt
    libvirt.stop()
    logs = session_host.dom0.run(f"tail -n +1 -v {LOG} /var/log/libvirt/libxl/*", check=False)
    (session_host.artefacts / "libvirt.log").write_bytes(logs.stdout)


@pytest.fixture
def hook(host: Host, libvirt: Libvirt) -> Iterator[None]:
    """The hook is where libvirt looks for it; it does so once, when it starts."""
    libvirt.stop()
    host.dom0.run(["install", "-D", "-m", "755", f"{SHIPPED}/libvirt-libxl", HOOK])
    libvirt.start()
    yield
    libvirt.stop()
    host.dom0.run(["rm", HOOK])
    libvirt.start()


def heard(host: Host, base: str, *entries: Entry, do: str, **more: Any) -> Guest:
    """A bare-metal guest for libvirt; what it says is in Xen's log."""
    return host.guest(base, *entries, do=do, slot=1, seed=9, ticks=3, **more)


def writer(host: Host, region: str) -> Guest:
    """A guest of xl's that has filled the region, and answers."""
    guest = host.guest("metal", Entry(region, host.at), do="fill,pong", seed=9, ticks=3)
    host.create(guest)
    host.wait_said(guest, "filled .*")
    return guest


def test_guest_has_its_regions_before_its_first_instruction(host: Host, libvirt: Libvirt) -> None:
    """What it reads first is what a guest of xl's has written; holders are none of libvirt's."""
    region = host.unique("demo")
    metal = writer(host, region)
    guest = heard(host, "virt", Entry(region, host.at, role="borrower"), do="check,ping")
    libvirt.create(guest)
    host.wait_said(guest, "checked pages=256 bad=0 seed=9")
    host.wait_said(guest, "ping rounds=3 .*")
    assert names(host.region(region)["members"], "state") == ["attached"] * 2
    assert libvirt.state(guest) == "running"
    assert libvirt.names() == [guest.name]
    libvirt.destroy(guest)
    assert libvirt.names() == []
    host.wait(lambda: len(host.region(region)["members"]) == 1, "its part is withdrawn")
    host.destroy(metal)


def test_a_refusal_is_a_failed_start(host: Host, libvirt: Libvirt) -> None:
    """libvirt says no more than that libxl failed; xshmd's log has the reason."""
    region, since = host.unique("nobodys"), host.mark
    guest = heard(host, "refused", Entry(region, host.at, role="borrower"), do="stay")
    done = libvirt.create(guest, check=False)
    assert done.status != 0
    said = f"libxenlight failed to create new domain '{guest.name}'"
    assert said in done.stderr.decode()
    assert host.domid(guest) is None
    assert libvirt.names() == []
    (refused,) = host.refusals(since)
    assert refused[0] == guest.name
    assert f"{region!r}, which nobody defines" in refused[1]


def test_hook_refuses_with_the_reason(host: Host, libvirt: Libvirt, hook: None) -> None:
    """What is wrong in the files, or that no daemon runs, is in virsh's own words."""
    region = host.unique("demo")
    wrong = heard(host, "wrong", Entry(region, host.at + 1), do="stay")
    done = libvirt.create(wrong, check=False)
    assert done.status != 0
    assert f"{OWN}/{wrong.name}.cfg:3: static_shm[0]" in done.stderr.decode()
    host.dom0.run(["rm", f"{OWN}/{wrong.name}.cfg"])
    right = heard(host, "right", Entry(region, host.at), do="fill")
    host.stop_daemon()
    done = libvirt.create(right, check=False)
    assert done.status != 0
    assert f"guest {right.name} is not started" in done.stderr.decode()
    assert host.domid(right) is None
    host.start_daemon()
    libvirt.create(right)
    host.wait_said(right, "filled pages=256 seed=9")
    libvirt.destroy(right)


def test_saving_is_refused_and_harms_nobody(host: Host, libvirt: Libvirt) -> None:
    """The guest runs on, and its peer notices nothing."""
    region = host.unique("demo")
    beater = host.guest("beater", Entry(region, host.at), do="fill,beat")
    watcher = host.guest("watcher", Entry(region, host.at, role="borrower"), do="watch", slot=2)
    libvirt.create(beater)
    host.create(watcher)
    host.wait_beats(watcher, 0)
    file = "/srv/virsh.save"
    done = libvirt.virsh("save", beater.name, file, check=False)
    assert done.status != 0
    assert "with libxenlight" in done.stderr.decode()
    host.dom0.run(["rm", "-f", file])
    assert libvirt.state(beater) == "running"
    host.wait_beats(watcher, 0)
    libvirt.destroy(beater)
    host.destroy(watcher)


def test_a_reboot_by_libvirt(host: Host, libvirt: Libvirt) -> None:
    """libvirt makes a domain of the same name and UUID again, and it has what it had."""
    region = host.unique("demo")
    guest = heard(host, "again", Entry(region, host.at, lifetime=""), do="boots,reboot-once,ping")
    libvirt.create(guest)
    host.wait_said(guest, "boots=1")
    host.wait_said(guest, "boots=2")
    libvirt.destroy(guest)


def test_libvirtd_comes_back(host: Host, libvirt: Libvirt) -> None:
    """It finds its guests again, and takes no holder for one."""
    guest = heard(host, "virt", Entry(host.unique("demo"), host.at), do="fill")
    libvirt.create(guest)
    host.wait_said(guest, "filled .*")
    libvirt.stop()
    libvirt.start()
    assert libvirt.names() == [guest.name]
    assert libvirt.state(guest) == "running"
    libvirt.destroy(guest)
