# SPDX-License-Identifier: LGPL-2.1-or-later
"""A back-end in dom0 gets at a guest's region by vhost-user, and answers the guest's requests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from integration.dom0 import Running
from integration.scenarios.guest import MASK, MIB, PAGE, Entry, tag
from integration.scenarios.host import Host

SOCKET = "/run/vhost-user.sock"
DISK = "/srv/disk"
SECTORS = 16


class Offered:
    """`xshmctl vhost-user`, and what it has said."""

    def __init__(self, host: Host, *words: str) -> None:
        self._host = host
        self._said = bytearray()
        command = ["xshmctl", "vhost-user", "--json=short", *words]
        self.running: Running = host.dom0.spawn(command, on_output=self._heard, timeout_s=600)

    def _heard(self, stream: int, data: bytes) -> None:
        if stream == 1:
            self._said += data

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What happened so far."""
        *whole, _ = bytes(self._said).split(b"\n")
        return [json.loads(line) for line in whole]

    def wait(self, event: str, times: int = 1) -> dict[str, Any]:
        """Wait until something has happened so often; what it was at last."""

        def seen() -> list[dict[str, Any]] | None:
            found = [line for line in self.lines if line["event"] == event]
            return found if len(found) >= times else None

        return self._host.wait(seen, f"vhost-user says {event}")[times - 1]

    def stop(self) -> None:
        """End it."""
        self.running.kill()
        assert self.running.wait(60).status == 128 + 15


@contextmanager
def disk(host: Host, size_sectors: int = SECTORS) -> Iterator[Running]:
    """A disk that is served at the socket, until the block ends; then it is gone."""
    host.dom0.run(f"truncate -s {size_sectors * 512} {DISK}; rm -f {SOCKET}")
    words = ["python3", "-m", "xshmd.vhost_user.block", "--socket", SOCKET, "--file", DISK]
    running = host.dom0.spawn(words, timeout_s=600)
    host.wait(lambda: b"serving" in running.stdout, "the disk is served")
    try:
        yield running
    finally:
        running.kill()
        done = running.wait(60)
        host.dom0.run(f"rm -f {DISK}")
        assert done.status == 0, done.describe()


def queue_at(address: int) -> str:
    """Where the guest's verb `disk` has its queue (integration/guests/disk.c)."""
    pages = {"descriptors": 16, "available": 17, "used": 18}
    said = (f"{name}={address + page * PAGE:#x}" for name, page in pages.items())
    return f"--queue=size=8,{','.join(said)}"


def sector(number: int, seed: int) -> bytes:
    """What `disk` writes into a sector."""
    words = (tag(number * 64 + i, seed) & MASK for i in range(64))
    return b"".join(word.to_bytes(8, "little") for word in words)


def test_a_guest_without_drivers_has_a_disk(host: Host) -> None:
    """A virtqueue in the guest's region, walked by a back-end that has it by foreign mapping."""
    region = host.unique("queue")
    guest = host.guest("disk", Entry(region, host.at), do="disk", ticks=SECTORS)
    with disk(host):
        offered = Offered(
            host, "connect", SOCKET, f"--guest={guest.name}", "--addresses=guest",
            queue_at(host.at),
        )  # fmt: skip
        offered.wait("connected")
        host.create(guest)
        given = offered.wait("given")
        record = host.region(region)
        assert given["guestAddress"] == given["userAddress"] == host.at
        assert given["sizeBytes"] == MIB
        assert given["domainId"] == record["holderDomainId"]
        assert given["offset"] == record["holderFirstFrame"] * PAGE
        host.wait_said(guest, f"disk sectors={SECTORS} bad=0")
        written = host.dom0.get(DISK)
        assert written == b"".join(sector(number, 7) for number in range(SECTORS))
        host.destroy(guest)
        withdrawn = offered.wait("withdrawn")
        assert withdrawn["guestAddress"] == host.at
        # The back-end has let go of the frames: the holder dies while it still runs.
        host.wait(lambda: len(host.ask("domains")) == 1, "the holder is gone")
        host.create(guest)
        assert offered.wait("given", times=2)["guestAddress"] == host.at
        host.wait_said(guest, f"disk sectors={SECTORS} bad=0", times=2)
        host.destroy(guest)
        offered.wait("withdrawn", times=2)
        offered.stop()


def test_a_program_of_a_linux_guest_has_a_disk(host: Host) -> None:
    """Its kernel has no part in it; the queue is the same."""
    region = host.unique("linux-queue")
    entry = Entry(region, host.at)
    guest = host.guest("linux-disk", entry, do="disk", ticks=SECTORS, linux=True)
    with disk(host):
        offered = Offered(
            host, "connect", SOCKET, f"--guest={guest.name}", "--addresses=guest",
            queue_at(host.at),
        )  # fmt: skip
        host.create(guest)
        host.wait_said(guest, f"disk sectors={SECTORS} bad=0")
        written = host.dom0.get(DISK)
        assert written == b"".join(sector(number, 7) for number in range(SECTORS))
        host.destroy(guest)
        offered.wait("withdrawn")
        offered.stop()


@pytest.mark.alike
def test_a_region_is_offered_while_it_is_there(host: Host) -> None:
    """A region of its own, at its holder's addresses; what cannot be offered is said."""
    region = host.unique("alone")
    definition = {"id": region, "sizeBytes": 16 * PAGE}
    with disk(host):
        refused = host.dom0.run(
            ["xshmctl", "vhost-user", "connect", SOCKET, f"--region={region}"], check=False
        )
        assert refused.status == 4
        host.apply({"add": definition})
        offered = Offered(host, "connect", SOCKET, f"--region={region}")
        given = offered.wait("given")
        record = host.region(region)
        assert given["guestAddress"] == record["holderFirstFrame"] * PAGE
        assert (given["userAddress"], given["offset"]) == (0, 0)
        # It is a member as a guest is: asked to let go of it only if that is forced.
        assert "xshmctl" in host.refused({"remove": {"region": region}})
        host.apply({"remove": {"region": region, "force": True}})
        offered.wait("withdrawn")
        host.wait(lambda: not host.regions(), "the region is gone")
        offered.stop()


@pytest.mark.alike
def test_a_descriptor_is_good_for_one_domain_only(host: Host) -> None:
    """What a back-end is handed maps its holder and nobody else, whatever it asks for."""
    region, other = host.unique("ours"), host.unique("theirs")
    host.apply({"add": {"id": region, "sizeBytes": 4 * PAGE}})
    guest = host.guest("other", Entry(other, host.at))
    host.create(guest)
    mine, theirs = host.region(region), host.region(other)
    host.poke(region, 1, 0, 0x1234)
    done = host.dom0.run(
        [
            "python3", "-m", "tests.vhost_user_on_xen", str(mine["holderDomainId"]),
            str(mine["holderFirstFrame"]), str(theirs["holderDomainId"]),
            str(theirs["holderFirstFrame"]), str(host.domid(guest)),
        ],
        cwd="/rig",
    )  # fmt: skip
    assert re.fullmatch(r"mapped 0x1234\nrefused 1\nrefused 1\nabsent 22", done.text), done.text
    host.destroy(guest)
    host.apply({"remove": {"region": region}})


def test_granted_memory_and_memory_on_demand(host: Host) -> None:
    """A back-end maps what its front-end names by grant references: at once and till the end, or,
    if the description says so in either of the two ways, each part for as long as it uses it."""
    done = host.dom0.run(["python3", "-m", "tests.vhost_user_ways_on_xen"], cwd="/rig")
    assert done.text.splitlines() == [
        "flags 0x2: mapped 16, right True, mapped 16, left 0",
        "flags 0x102: mapped 0, right True, mapped 0, left 0",
        "flags 0xa: mapped 0, right True, mapped 0, left 0",
        "flags 0x101: mapped 0, right True, mapped 0, left 0",
        "0 in use at the end",
    ]
