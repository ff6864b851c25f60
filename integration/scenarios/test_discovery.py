# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that was told nothing finds its region: by xenstore, its memory map, its device tree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from integration.cache import Cache
from integration.scenarios.guest import PAGE, Entry, Guest
from integration.scenarios.host import CONFIGS, Host
from integration.toolroot import ToolRoot
from xshmd.config.artefacts import memmap_arguments, partial_devicetree
from xshmd.config.guest import guest_config

SIZE = 16 * PAGE
KEEP_OUT = ('static_shm_memory_map = "leave"',)


def writer(host: Host, region: str) -> Guest:
    """A bare-metal guest that has filled the region, and answers."""
    entry = Entry(region, host.at, SIZE)
    guest = host.guest("metal", entry, do="fill,pong", seed=9, ticks=3)
    host.create(guest)
    host.wait_said(guest, "filled .*")
    return guest


def finder(host: Host, region: str, how: str, **more: Any) -> Guest:
    """A Linux guest that finds the region by itself and then uses it, with nothing but that."""
    entry = Entry(region, host.at, SIZE, role="borrower")
    told = {"shm": "", **more}
    return host.guest(
        "linux", entry, do=f"find-{how},await-fill,check,ping", slot=1, seed=9, ticks=3,
        linux=True, **told,
    )  # fmt: skip


def uses_it(host: Host, linux: Guest, how: str) -> None:
    """It found the region, sees what the other wrote, and is seen."""
    host.wait_said(linux, f"found by={how} shm={host.at:#x},{SIZE:#x}")
    host.wait_said(linux, "checked pages=16 bad=0 seed=9")
    host.wait_said(linux, "ping rounds=3 .*")


def test_linux_finds_its_region_in_xenstore(host: Host) -> None:
    region = host.unique("demo")
    metal, linux = writer(host, region), finder(host, region, "xenstore")
    host.create(linux)
    uses_it(host, linux, "xenstore")
    memory_map = "reserved" if host.arch == "x86_64" else "unchanged"
    host.wait_said(
        linux,
        f"node {region}: begin={host.at:#x} size={SIZE:#x} role=borrower prot=rw "
        f"transport=physmap offset=0x0 backing=holder cache=write-back memory_map={memory_map} "
        "peer=1 ?",
    )
    host.destroy(linux, metal)


@pytest.mark.arch("x86_64")
def test_linux_finds_its_region_in_its_memory_map(host: Host) -> None:
    """It is a reserved range there, from Linux's first look at its memory on."""
    region = host.unique("demo")
    metal, linux = writer(host, region), finder(host, region, "memory-map")
    host.create(linux)
    uses_it(host, linux, "memory-map")
    host.destroy(linux, metal)


@pytest.mark.arch("x86_64")
def test_a_memory_map_that_is_to_be_left_alone(host: Host) -> None:
    """It says nothing of the region then, until a memmap= argument does."""
    region = host.unique("demo")
    metal = writer(host, region)
    plain = finder(host, region, "memory-map", lines=KEEP_OUT)
    host.create(plain)
    host.wait_said(plain, "nothing reserved above 4 GiB")
    node = host.dom0.run(["xenstore-read", f"/local/domain/{host.domid(plain)}/xshm/{region}"])
    assert node.text.split()[-2] == "memory_map=unchanged"
    host.destroy(plain)
    config = guest_config(finder(host, region, "memory-map").config(), file="linux.cfg")
    argued = finder(
        host, region, "memory-map", lines=KEEP_OUT, shm=memmap_arguments(config).strip()
    )
    host.create(argued)
    uses_it(host, argued, "memory-map")
    host.destroy(argued, metal)


@pytest.mark.arch("arm64")
def test_linux_finds_its_region_in_its_device_tree(host: Host, tmp_path: Path) -> None:
    """libxl copies the nodes of ``device_tree=`` into the tree it makes for the guest."""
    region = host.unique("demo")
    metal, path = writer(host, region), f"{CONFIGS}/{region}.dtb"
    config = guest_config(finder(host, region, "devicetree").config(), file="linux.cfg")
    (tmp_path / "linux.dts").write_text(partial_devicetree(config))
    compile_it = ["dtc", "-I", "dts", "-O", "dtb", "-o", "/rig/dt/linux.dtb", "/rig/dt/linux.dts"]
    ToolRoot.get(Cache()).run(compile_it, binds={tmp_path: "/rig/dt"})
    host.dom0.put(path, (tmp_path / "linux.dtb").read_bytes())
    linux = finder(host, region, "devicetree", lines=(f'device_tree = "{path}"',))
    host.create(linux)
    uses_it(host, linux, "devicetree")
    host.wait_said(linux, f"node {region} ?")
    host.destroy(linux, metal)
