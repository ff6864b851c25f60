# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest with a whole emulated PC: hvmloader and SeaBIOS are between the memory map and Linux."""

from __future__ import annotations

import pytest

from integration.scenarios.guest import PAGE, Entry, Guest
from integration.scenarios.host import Host

pytestmark = [pytest.mark.image("libvirt"), pytest.mark.arch("x86_64")]

SIZE = 16 * PAGE
PC = ('vga = "none"', "vnc = 0", "usb = 0")
"""As little of a PC as there is: each of its devices costs time under emulation."""


@pytest.fixture(scope="module", autouse=True)
def first_device_model(session_host: Host) -> None:
    """What the first device model leaves is there before anybody looks: libxl makes the node below
    this one, and this with it, and removes only that (device_model_launch() and
    libxl__destroy_device_model() in libxl_dm.c)."""
    session_host.dom0.run(["xenstore-write", "/local/domain/0/device-model", ""])


def writer(host: Host, region: str, at: int) -> Guest:
    """A bare-metal guest that has filled the region, and answers."""
    guest = host.guest("metal", Entry(region, at, SIZE), do="fill,pong", seed=9, ticks=3)
    host.create(guest)
    host.wait_said(guest, "filled .*")
    return guest


def pc(host: Host, region: str, at: int, do: str, *lines: str, shm: str | None = None) -> Guest:
    """Linux, by way of hvmloader, SeaBIOS and what QEMU loads a kernel with."""
    return host.guest(
        "pc", Entry(region, at, SIZE, role="borrower"), do=do, slot=1, seed=9, ticks=3, shm=shm,
        linux=True, type="hvm", memory_mib=256, lines=(*PC, *lines),
    )  # fmt: skip


def published(host: Host, guest: Guest, region: str) -> dict[str, str]:
    """What the guest can read of its region in xenstore."""
    node = f"/local/domain/{host.domid(guest)}/xshm/{region}"
    words = host.dom0.run(["xenstore-read", node]).text.split()
    return dict(word.split("=") for word in words)


def test_a_pc_finds_its_region_in_its_memory_map(host: Host) -> None:
    """What is set before hvmloader runs is a reserved range of the BIOS's map, which Linux sees;
    nothing else says where the region is.  And a save of the guest is refused before QEMU hears
    of it."""
    region = host.unique("demo")
    since = host.mark
    metal = writer(host, region, host.at)
    linux = pc(host, region, host.at, "find-memory-map,await-fill,check,ping", shm="")
    host.create(linux)
    assert published(host, linux, region)["memory_map"] == "reserved"
    host.wait_said(linux, f"found by=memory-map shm={host.at:#x},{SIZE:#x}")
    host.wait_said(linux, "checked pages=16 bad=0 seed=9")
    host.wait_said(linux, "ping rounds=3 .*")
    assert "memory map unchanged" not in host.log(since)
    file = f"/tmp/{linux.name}.save"
    done = host.xl("save", linux.name, file, check=False)
    assert done.status != 0
    assert "Suspend event channel initialization failed" in done.stderr.decode()
    host.dom0.run(["rm", "-f", file])
    host.destroy(linux, metal)


def test_a_memory_map_that_is_to_be_left_alone(host: Host) -> None:
    """Then the BIOS says nothing of the region: what it says otherwise is xshmd's doing."""
    region = host.unique("demo")
    metal = writer(host, region, host.at)
    leave = 'static_shm_memory_map = "leave"'
    linux = pc(host, region, host.at, "find-memory-map", leave, shm="")
    host.create(linux)
    assert published(host, linux, region)["memory_map"] == "unchanged"
    host.wait_said(linux, "nothing reserved above 4 GiB")
    host.destroy(linux, metal)


def test_a_region_between_ram_and_the_pci_window(host: Host) -> None:
    """hvmloader lays its PCI window out around a reserved range below 4 GiB, if it is one that
    xshmd lets a guest have."""
    region, at = host.unique("demo"), host.at_elsewhere
    metal = writer(host, region, at)
    linux = pc(host, region, at, "await-fill,check,ping")
    host.create(linux)
    assert published(host, linux, region)["memory_map"] == "reserved"
    host.wait_said(linux, "checked pages=16 bad=0 seed=9")
    host.wait_said(linux, "ping rounds=3 .*")
    host.destroy(linux, metal)
