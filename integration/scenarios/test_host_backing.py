# SPDX-License-Identifier: LGPL-2.1-or-later
"""Regions in the machine's own memory: here that of a PCI device which nobody drives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from integration.scenarios.guest import MIB, PAGE, Entry, Guest
from integration.scenarios.host import Host

REGIONS = "/etc/xshmd/regions.d"
SIZE = 64 * PAGE


@contextmanager
def defined(host: Host, address: int, size: int = SIZE) -> Iterator[str]:
    """Define a host-backed region while the body runs; its id."""
    region = host.unique("bar")
    path = f"{REGIONS}/{region}.toml"
    lines = [
        f"[region.{region}]", f"size = {size}", 'lifetime = "members"', 'backing = "host"',
        f"host_address = {address:#x}", "",
    ]  # fmt: skip
    host.dom0.put(path, "\n".join(lines))
    try:
        yield region
    finally:
        host.dom0.run(["rm", path])


def borrower(host: Host, base: str, region: str, **more: Any) -> Guest:
    return host.guest(base, Entry(region, host.at, SIZE, role="borrower"), **more)


def test_two_guests_talk_through_a_devices_memory(host: Host) -> None:
    """And what is in it stays there: xshmd neither clears nor wipes what may be a device's."""
    with defined(host, host.plain_memory_at() + MIB) as region:
        writer = borrower(host, "writer", region, do="fill,ping")
        reader = borrower(host, "reader", region, do="await-fill,check,pong", slot=1)
        host.create(writer)
        host.create(reader)
        host.wait_said(reader, "checked pages=64 bad=0 seed=7")
        host.wait_said(writer, "ping rounds=100 .*")
        host.wait_said(reader, "pong rounds=100 .*")
        node = f"/local/domain/{host.domid(reader)}/xshm/{region}"
        told = host.dom0.run(["xenstore-read", node]).text.split()
        assert {"backing=host", "cache=none"} <= set(told)
        host.destroy(writer, reader)
        host.wait(lambda: not host.regions(), "the region went with its last member")
        later = borrower(host, "later", region, do="check")
        host.create(later)
        host.wait_said(later, "checked pages=64 bad=0 seed=7")
        host.destroy(later)
        host.wait(lambda: not host.regions(), "the region went with its last member")


@pytest.mark.alike
def test_beside_a_region_of_fresh_memory(host: Host) -> None:
    """A guest may have both kinds, and each is its own."""
    fresh = host.unique("fresh")
    with defined(host, host.plain_memory_at()) as region:
        both = (
            Entry(region, host.at, SIZE, role="borrower"),
            Entry(fresh, host.at_elsewhere, SIZE),
        )
        writer = host.guest("writer", *both, do="fill:0,beat")
        reader = host.guest(
            "reader", both[0], Entry(fresh, host.at_elsewhere, SIZE, "borrower"),
            do="await-fill:0,check:0,check:1", slot=1,
        )  # fmt: skip
        host.create(writer)
        host.create(reader)
        host.wait_said(reader, "checked pages=64 bad=0 seed=7")
        host.wait_said(reader, "checked pages=64 bad=64 seed=7")
        host.destroy(writer, reader)
        host.wait(lambda: not host.regions(), "the regions went with their last members")


def test_memory_that_is_somebodys_is_refused(host: Host) -> None:
    """dom0's RAM, a device's registers and what nothing is known of: the guest must not run."""
    registers = int(host.dom0.run(f"cat {host.plain_memory()}/resource").text.split()[0], 16)
    nothing_known = "nothing there is known to be memory"
    ram = "RAM that Xen" if host.arch == "x86_64" else nothing_known
    beyond = host.plain_memory_at() + 4 * MIB - PAGE
    behind = "driver virtio-pci uses it" if host.arch == "x86_64" else nothing_known
    cases = ((0x4800_0000, ram), (registers, "not prefetchable"), (beyond, behind))
    for address, reason in cases:
        with defined(host, address) as region:
            guest, since = borrower(host, "greedy", region, do="peek"), host.mark
            assert host.create(guest, check=False).status != 0
            host.wait_gone(guest)
            ((name, why),) = host.refusals(since)
            assert name == guest.name
            assert reason in why, why
            assert host.said(guest) == []
            host.wait(lambda: not host.regions(), "nothing is left")


@pytest.mark.alike
def test_a_device_that_is_switched_off_is_refused(host: Host) -> None:
    """Switched off, its memory answers nothing; the refusal says how to switch it on."""
    device = host.plain_memory()
    address = host.plain_memory_at()
    write_command = f"dd of={device}/config bs=1 seek=4 conv=notrunc"  # PCI_COMMAND
    host.dom0.run(f"printf '\\000\\000' | {write_command}")
    try:
        with defined(host, address) as region:
            guest, since = borrower(host, "early", region, do="peek"), host.mark
            assert host.create(guest, check=False).status != 0
            host.wait_gone(guest)
            ((_, why),) = host.refusals(since)
            assert "the device is switched off" in why
            host.wait(lambda: not host.regions(), "nothing is left")
    finally:
        host.dom0.run(f"printf '\\002\\000' | {write_command}")
