# SPDX-License-Identifier: LGPL-2.1-or-later
"""The holder's recipe, on real Xen: what each part of it is there to prevent is in DESIGN.md."""

from __future__ import annotations

import errno
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from integration.scenarios.guest import MIB, PAGE, Entry, Guest
from integration.scenarios.host import Host

ANCHOR_FRAMES = 1
MARK = b"xshmd\x01"


@pytest.fixture
def member(host: Host) -> Iterator[tuple[Guest, dict[str, Any]]]:
    """A running guest with two regions, and what Xen says of their holder."""
    guest = host.guest(
        "member", Entry(host.unique("one"), host.at, 2 * MIB),
        Entry(host.unique("two"), host.at_elsewhere, 3 * PAGE), do="fill:0,beat",
    )  # fmt: skip
    host.create(guest)
    holder = host.domain(host.regions()[0]["holderDomainId"])
    assert holder is not None
    yield guest, holder
    host.destroy(guest)


def test_recipe(host: Host, member: tuple[Guest, dict[str, Any]]) -> None:
    """Paused for ever with a real vCPU 0, HVM and HAP, exactly its pages and no right to more."""
    _, holder = member
    assert holder["paused"]
    assert holder["cpu_time_ns"] == 0
    assert not holder["dying"]
    assert not holder["shut_down"]
    assert holder["hvm"]
    assert holder["hap"]
    assert holder["max_vcpu_id"] == 0
    assert holder["nr_online_vcpus"] == 0  # allocated, and never brought up
    frames = sum(region["frameCount"] for region in host.regions())
    assert frames == 512 + 3
    assert holder["tot_pages"] == ANCHOR_FRAMES + frames
    assert holder["max_pages"] == 0


def test_identity(host: Host, member: tuple[Guest, dict[str, Any]]) -> None:
    """The holder carries our mark in its handle, and both regions of a guest are in one holder."""
    _, holder = member
    assert uuid.UUID(holder["uuid"]).bytes.startswith(MARK)
    assert {region["holderUuid"] for region in host.regions()} == {holder["uuid"]}


def test_no_event_channels(host: Host, member: tuple[Guest, dict[str, Any]]) -> None:
    """max_evtchn_port=0: no event channel can be allocated in a holder."""
    assert host.ask("event_channel_errno", member[1]["domid"]) == errno.ENOSPC


def test_no_more_memory(host: Host, member: tuple[Guest, dict[str, Any]]) -> None:
    """A holder gets no page beyond its regions, whoever asks."""
    domid = member[1]["domid"]
    assert host.ask("populate", domid, 0x80000, 1) == "OutOfMemory"
    after = host.domain(domid)
    assert after is not None
    assert after["tot_pages"] == member[1]["tot_pages"]


def test_no_domain_of_xenstored(host: Host, member: tuple[Guest, dict[str, Any]]) -> None:
    """A holder is not introduced to xenstored, though it has a name there that xl shows."""
    guest, holder = member
    assert not host.ask("is_introduced", holder["domid"])
    assert host.ask("is_introduced", host.domid(guest))  # the question can be answered with yes
    listed = {line.split()[1]: line.split()[0] for line in host.xl("list").text.splitlines()}
    assert listed[str(holder["domid"])].startswith("xshm-")


def test_guest_reads_nothing_of_the_holder(
    host: Host, member: tuple[Guest, dict[str, Any]]
) -> None:
    """The holder's nodes are dom0's alone."""
    node = f"/local/domain/{member[1]['domid']}"
    listed = host.dom0.run(["xenstore-ls", "-fp", node]).text.splitlines()
    assert len(listed) > 1
    assert all(line.endswith("(n0)") for line in listed)


def test_shutdown_of_everything_finishes(host: Host) -> None:
    """`xl shutdown -a -w` neither fails nor waits because of a holder: it ends when the guests
    have, and then region and holder go.  Until then they have their memory."""
    guest = host.guest("linux", Entry(host.unique("demo"), host.at), do="stay", linux=True)
    region = guest.entries[0]
    assert isinstance(region, Entry)
    host.create(guest)
    host.wait_said(guest, "hello .*")
    holder = host.region(region.region)["holderDomainId"]
    done = host.xl("shutdown", "-a", "-w")
    said = done.text + done.stderr.decode()
    assert "failed" not in said
    # Of the holder too it was told that it shut down: that is what it would have waited for.
    assert f"Domain {holder} has been shut down" in said
    assert said.count(" has been shut down") == 2
    host.wait(lambda: host.domid(guest) is None, "the guest is destroyed")
    host.wait(lambda: not host.regions(), "the region is freed")


def test_a_holder_that_was_asked_to_shut_down_goes_on(host: Host) -> None:
    """It acknowledges, and holds as before: guests that do not shut down keep their memory, and
    others can join them."""
    region, beater, watcher = host.beater_and_watcher()
    host.create(beater)
    before = host.region(region)
    holder = str(before["holderDomainId"])
    host.xl("shutdown", holder)
    request = ["xenstore-read", f"/local/domain/{holder}/control/shutdown"]
    host.wait(lambda: host.dom0.run(request).text == "", "the request is acknowledged")
    host.create(watcher)
    host.wait_beats(watcher, 0)
    assert host.region(region)["holderUuid"] == before["holderUuid"]
    host.destroy(watcher, beater)


def test_holder_destroyed_by_an_admin(host: Host) -> None:
    """`xl destroy` of a holder is survived: running guests keep their memory, which comes back when
    they end, and the next guests get a new region."""
    region, beater, watcher = host.beater_and_watcher("beat")
    host.create_all(beater, watcher)
    host.wait_beats(watcher, 0)
    since = host.mark
    host.xl("destroy", str(host.region(region)["holderDomainId"]))
    host.wait_log("<3>holder destroyed by somebody else", since)
    host.wait_beats(watcher, 0)
    host.destroy(beater, watcher)
    host.wait(lambda: not host.guests(), "both are forgotten")
    again = host.guest("again", Entry(region, host.at), do="boots")
    host.create(again)
    host.wait_said(again, "boots=1")
    host.destroy(again)
