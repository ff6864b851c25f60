# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program of dom0 has a region's memory by xshmd.client, and nobody frees what it holds."""

from __future__ import annotations

import re
import signal

import pytest

from integration.dom0 import Running
from integration.scenarios.guest import FILLED, MIB, PAGE, Entry, filled, tag
from integration.scenarios.host import Host, add, remove

SEED = 7
BEAT = 128 + 4
"""Offset of the heartbeat of the guest with slot 0 (guests/region.h)."""
COMMON = """
import sys
from xshmd import client

def word(memory, at, nr_bytes=8):
    return int.from_bytes(memory[at : at + nr_bytes], "little")

def say(*words):
    print(*words, flush=True)

region = client.connect().region(sys.argv[1])
"""
SHARER = f"""{COMMON}
def put(memory, at, value):
    memory[at : at + 8] = value.to_bytes(8, "little")

with region.attach("rw") as lease, lease.map() as memory:
    for page, value in enumerate(map(int, sys.argv[2:])):
        put(memory, page * {PAGE} + 8, value)
        put(memory, (page + 1) * {PAGE} - 8, value)
    put(memory, {FILLED}, {filled(SEED)})
    say("filled", len(memory))
    before = word(memory, {BEAT}, 4)
    while word(memory, {BEAT}, 4) == before:
        pass
    say("the guest beats")
    say("asked for it:", lease.wait_ending())
say("unmapped")
"""
"""Fills the region as a guest does, sees a guest in it, and lets go when it is told to."""
READER = f"""{COMMON}
with region.map(offset_bytes={PAGE}, size_bytes={PAGE}) as part:
    say(f"{{word(part, 8):#x}} {{part.readonly}}")
    memoryview(part.obj)[0] = 1
    say("it was written to")
"""
"""Reads a word, and then writes past what the library allows."""
NR_PAGES = 4
SIZE = NR_PAGES * PAGE


def program(host: Host, text: str, region: str, *words: object) -> Running:
    """Run a program of dom0 with a region's id and other words as arguments."""
    return host.dom0.spawn(["python3", "-c", text, region, *map(str, words)], timeout_s=600)


def share(host: Host, region: str) -> Running:
    """Run the program that shares a region of NR_PAGES with a guest."""
    return program(host, SHARER, region, *(tag(page, SEED) for page in range(NR_PAGES)))


def wait_said(host: Host, running: Running, text: str) -> None:
    host.wait(lambda: text.encode() in running.stdout, f"it says {text}: {running.stderr.decode()}")


def pids(host: Host, region: str) -> list[int]:
    """The processes that have leases of a region."""
    return [lease["processId"] for lease in host.region(region)["leases"]]


def test_a_program_and_a_guest_share_memory(host: Host) -> None:
    """What a Python program writes a bare-metal guest reads, and the other way round; killed, the
    program's lease goes, and then the region with its guest."""
    region = host.unique("demo")
    guest = host.guest("app", Entry(region, host.at, SIZE), do="await-fill,check,beat", seed=SEED)
    host.create(guest)
    sharer = share(host, region)
    wait_said(host, sharer, f"filled {SIZE}")
    host.wait_said(guest, f"checked pages={NR_PAGES} bad=0 seed={SEED}")
    wait_said(host, sharer, "the guest beats")
    assert pids(host, region) == [sharer.pid]
    assert f"dom0:{sharer.pid}" in host.xshmctl("list", "--no-legend").text
    assert f"process {sharer.pid}, python3" in host.xshmctl("show", region).text
    host.destroy(guest)
    host.wait_gone(guest)
    assert pids(host, region) == [sharer.pid]  # a member as good as any
    sharer.kill(signal.SIGKILL)
    host.wait(lambda: not host.regions(), "lease and region are gone")


def test_read_only_is_kept_by_the_processor(host: Host) -> None:
    """A part of a region, mapped read-only: a program that writes nevertheless ends at once."""
    region = host.unique("demo")
    host.apply(add(region, 2 * PAGE))
    host.poke(region, 1, 8, tag(1, SEED))
    reader = program(host, READER, region)
    done = reader.wait(600)
    assert done.text == f"{tag(1, SEED):#x} True"
    assert done.status == -signal.SIGSEGV
    assert host.peek(region, 1, 0) == 0
    host.wait(lambda: not pids(host, region), "the lease is gone")
    host.apply(remove(region))


@pytest.mark.alike
def test_killed_daemon_keeps_its_leases(host: Host) -> None:
    """`kill -9` of the daemon: the next one frees nothing that a program still has mapped, and the
    program takes its lease up again; asked for the region by `remove --force`, it lets go."""
    region = host.unique("demo")
    guest = host.guest("app", Entry(region, host.at, SIZE), do="beat")
    host.create(guest)
    sharer = share(host, region)
    wait_said(host, sharer, "the guest beats")
    host.stop_daemon(signal.SIGKILL)
    host.destroy(guest)
    host.start_daemon("--reboot-grace", "1")
    host.wait(lambda: not host.guests(), "the guest is not awaited any more")
    assert pids(host, region) == [sharer.pid]
    assert host.peek(region, 0, FILLED) == filled(SEED)
    refusal = host.xshmctl("remove", region, check=False)
    assert refusal.status == 5
    assert re.search(rf"has members: process {sharer.pid} \(python3\)", refusal.stderr.decode())
    host.xshmctl("remove", "--force", region)
    done = sharer.wait(600)
    assert done.text.splitlines()[-2:] == ["asked for it: removed by an administrator", "unmapped"]
    assert host.regions() == []
    host.stop_daemon()
    host.start_daemon()


@pytest.mark.alike
def test_hexdump(host: Host) -> None:
    """`xshmctl hexdump` shows a region's bytes by their offset."""
    region = host.unique("demo")
    host.apply(add(region, MIB))
    host.poke(region, 1, 8, int.from_bytes(b"Xen\0\1\2\3\4", "little"))
    lines = host.xshmctl("hexdump", region, "--offset=4KiB", "--length=32").text.splitlines()
    assert lines == [
        "00001000  00 00 00 00 00 00 00 00  58 65 6e 00 01 02 03 04  |........Xen.....|",
        "00001010  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|",
        "00001020",
    ]
    host.apply(remove(region))
