# SPDX-License-Identifier: LGPL-2.1-or-later
"""Regions come to guests that run, and go from them; a set of changes is made whole or not."""

from __future__ import annotations

import pytest

from integration.scenarios.guest import FILLED, MIB, Entry, Guest, filled
from integration.scenarios.host import Host, add, attach, detach, names, remove

ALL_ONES = (1 << 64) - 1


def told(*ranges: tuple[int, int]) -> str:
    """What a guest is told of places where it may have regions."""
    return " ".join(f"shm={at:#x},{size:#x}" for at, size in ranges)


def wait_nothing_there(host: Host, guest: Guest, at: int) -> None:
    """Wait until a guest that does peek has found that nothing is at an address.

    x86 answers an access that nothing is behind with all ones; Arm hands the guest a data abort.
    """
    if host.arch == "arm64":
        host.wait_said(guest, f"fault addr={at:#x} .*")
    else:
        host.wait_said(guest, f"peek addr={at:#x} word={ALL_ONES:#x}")


def end(host: Host, *guests: Guest) -> None:
    """Destroy guests, some of which may have ended by themselves."""
    for guest in guests:
        host.xl("destroy", guest.name, check=False)
        host.wait_gone(guest)


def members(host: Host, region: str) -> list[str]:
    """The names of the guests that have a region."""
    found: list[str] = names(host.region(region)["members"], "guest")
    return sorted(found)


def waiting(host: Host, go: str, do: str, *, role: str = "owner", slot: int = 0) -> Guest:
    """A guest with the region `go`, told of a second one that it has not; it waits for a word in
    the first before it touches that."""
    return host.guest(
        "app", Entry(go, host.at_elsewhere, role=role), slot=slot,
        shm=told((host.at_elsewhere, MIB), (host.at, MIB)), do=f"await-fill:0,{do}",
    )  # fmt: skip


def test_attach_to_a_running_guest(host: Host) -> None:
    """A guest that runs is given a region of another: it finds what is in it, and they hear each
    other; without a restart, without a driver."""
    go, more = host.unique("go"), host.unique("more")
    guest = waiting(host, go, "check:1,beat-watch:1")
    peer = host.guest(
        "peer", Entry(go, host.at_elsewhere, role="borrower"), Entry(more, host.at),
        do="fill:1,beat-watch:1", slot=1,
    )  # fmt: skip
    host.create(guest)
    host.create(peer)
    host.wait_said(peer, "filled pages=256 seed=7")
    before = host.domid(guest)
    (step,) = host.apply(attach(guest, more, host.at, MIB))
    assert step["text"] == f"pause {guest.name} and map 1 MiB of {more} at {host.at:#x}"
    assert members(host, more) == sorted([guest.name, peer.name])
    host.poke(go, 0, FILLED, filled(7))
    host.wait_said(guest, "checked pages=256 bad=0 seed=7")
    host.wait_beats(guest, 1)
    host.wait_beats(peer, 0)
    assert host.domid(guest) == before
    node = host.dom0.run(["xenstore-read", f"/local/domain/{before}/xshm/{more}"]).text
    assert f"begin={host.at:#x}" in node
    host.destroy(guest, peer)


def test_detach_from_a_running_guest(host: Host, short_grace: None) -> None:
    """A region is taken from a guest that runs: nothing is at its frames any more, the guest runs
    on until it touches them, and the other member notices nothing."""
    go, more = host.unique("go"), host.unique("more")
    guest = host.guest(
        "app", Entry(go, host.at_elsewhere), Entry(more, host.at),
        do="fill:1,await-fill:0,peek:1",
    )  # fmt: skip
    peer = host.guest(
        "peer", Entry(more, host.at, role="borrower"), do="await-fill,check,beat", slot=1
    )
    host.create(guest)
    host.create(peer)
    host.wait_said(peer, "checked pages=256 bad=0 seed=7")
    domid = host.domid(guest)
    host.apply(detach(guest, more))
    assert members(host, more) == [peer.name]
    gone = f"/local/domain/{domid}/xshm/{more}"
    assert host.dom0.run(["xenstore-exists", gone], check=False).status
    assert host.domid(guest) == domid
    host.poke(go, 0, FILLED, filled(7))
    wait_nothing_there(host, guest, host.at)
    assert host.domid(peer) is not None
    end(host, guest, peer)


def test_late_join(host: Host) -> None:
    """A guest that was made without regions is given one, by its domain's number: paused by its
    admin as it is, it stays so, and then finds what is there."""
    region = host.unique("demo")
    owner = host.guest("owner", Entry(region, host.at), do="fill,beat-watch")
    late = host.guest("late", shm=told((host.at, MIB)), do="check,beat-watch", slot=1)
    host.create(owner)
    host.wait_said(owner, "filled .*")
    host.create(late, "-p")
    domid = host.domid(late)
    assert domid is not None
    assert late.name not in names(host.guests(), "name")
    host.apply(attach(domid, region, host.at, MIB))
    assert members(host, region) == sorted([owner.name, late.name])
    assert host.ask("pause_count", domid) == 1
    host.xl("unpause", late.name)
    host.wait_said(late, "checked pages=256 bad=0 seed=7")
    host.wait_beats(late, 0)
    host.wait_beats(owner, 1)
    host.destroy(late, owner)


@pytest.mark.arch("x86_64")
def test_late_join_of_a_guest_that_looks_for_it(host: Host) -> None:
    """The guest runs and looks at the address all the while: it sees nothing there, and then the
    region.  (An Arm guest cannot look: it would get a data abort.)"""
    region = host.unique("demo")
    owner = host.guest("owner", Entry(region, host.at), do="fill")
    late = host.guest("late", shm=told((host.at, MIB)), do="await-fill,check", slot=1)
    host.create(owner)
    host.create(late)
    host.wait_said(owner, "filled .*")
    host.wait_said(late, "hello .*")
    host.apply(attach(late, region, host.at, MIB))
    host.wait_said(late, "checked pages=256 bad=0 seed=7")
    host.destroy(late, owner)


@pytest.mark.alike
def test_a_region_made_and_given_in_one_set(host: Host) -> None:
    """Two guests and a region that is made for them: one request, one holder; and taken from them
    again by force, each paused meanwhile."""
    go, more = host.unique("go"), host.unique("more")
    one = waiting(host, go, "fill:1,peek:1,await-fill:1,stay")
    two = waiting(host, go, "await-fill:1,check:1,stay", role="borrower", slot=1)
    host.create(one)
    host.create(two)
    changes = (
        add(more, MIB), attach(one, more, host.at, MIB), attach(two, more, host.at, MIB)
    )  # fmt: skip
    planned = host.apply(*changes, dry_run=True)
    assert [step["verb"] for step in planned] == ["create", "attach", "attach"]
    assert names(host.regions()) == [go]
    assert host.apply(*changes) == planned
    host.poke(go, 0, FILLED, filled(7))
    host.wait_said(two, "checked pages=256 bad=0 seed=7")
    steps = host.apply(remove(more, force=True))
    assert [step["verb"] for step in steps] == ["detach", "detach", "remove"]
    assert names(host.regions()) == [go]
    end(host, one, two)


@pytest.mark.alike
def test_a_set_is_refused_as_a_whole(host: Host) -> None:
    """One of several changes cannot be: nothing of the others is done, and the guests run on."""
    region = host.unique("demo")
    one = host.guest("one", Entry(region, host.at), do="beat-watch")
    two = host.guest("two", Entry(region, host.at, role="borrower"), do="beat-watch", slot=1)
    host.create(one)
    host.create(two)
    host.wait_beats(one, 1)
    before, free = host.regions(), host.ask("free_pages")
    ram = 0x4000_0000 if host.arch == "arm64" else 0x10_0000
    refusal = host.refused(
        add("fresh", MIB), attach(one, "fresh", host.at_elsewhere, MIB),
        attach(two, "fresh", ram, MIB), detach(one, "nothing"),
    )  # fmt: skip
    assert "RAM" in refusal
    assert "has no region nothing" in refusal
    assert host.regions() == before
    assert host.ask("free_pages") == free
    host.wait_beats(one, 1)
    host.wait_beats(two, 0)
    host.destroy(one, two)


@pytest.mark.alike
def test_files_and_sighup(host: Host) -> None:
    """A file that names a guest which runs gives it a region when the daemon is told to reload, and
    takes it again when it is gone; a file that is wrong changes nothing."""
    go, more = host.unique("go"), host.unique("more")
    guest = waiting(host, go, "fill:1,stay")
    host.create(guest)
    good, bad = (f"/etc/xshmd/regions.d/{name}.toml" for name in (more, "wrong"))
    text = f'[region.{more}]\nsize = "1 MiB"\n[region.{more}.guest.{guest.name}]\n'
    host.dom0.run("mkdir -p /etc/xshmd/regions.d")
    try:
        host.dom0.put(good, f"{text}begin = {host.at:#x}\n")
        host.dom0.put(bad, "[region.]\n")
        since = host.mark
        host.reload()
        host.wait_log("not reloaded .*wrong.toml", since)
        assert names(host.regions()) == [go]
        host.dom0.run(["rm", bad])
        since = host.mark
        host.reload()
        host.wait_log("reloaded why='2 steps'", since)
        assert members(host, more) == [guest.name]
        host.poke(go, 0, FILLED, filled(7))
        host.wait_said(guest, "filled pages=256 seed=7")
        assert host.peek(more, 0, FILLED) == filled(7)
    finally:
        host.dom0.run(["rm", "-f", good, bad])
        since = host.mark
        host.reload()
    host.wait_log("reloaded why='2 steps'", since)
    assert names(host.regions()) == [go]
    host.destroy(guest)


@pytest.mark.alike
@pytest.mark.parametrize("moment", ["changing", "changing-maps"])
def test_killed_in_the_middle_of_a_set(host: Host, moment: str) -> None:
    """`kill -9` while a region is made for two guests and given to them: the next start leaves all
    of it done, or nothing; nobody stays paused, and what was not done can be asked for again."""
    go, more, size = host.unique("go"), host.unique("more"), 32 * MIB
    one = waiting(host, go, "fill:1,stay")
    two = waiting(host, go, "await-fill:1,check:1,stay", role="borrower", slot=1)
    host.create(one)
    host.create(two)
    words = ["python3", "-I", "/rig/xen-probe.py", "kill-when", str(host.daemon_pid), moment]
    killer = host.dom0.spawn(words, timeout_s=90)
    host.wait(lambda: b"watching\n" in killer.stdout, "the killer is ready")
    changes = (
        add(more, size), attach(one, more, host.at, size), attach(two, more, host.at, size)
    )  # fmt: skip
    host.refused(*changes)
    killed = killer.wait(90)
    assert killed.status == 0, killed.describe()
    host.await_killed()
    host.start_daemon()
    has = [more in guest["regions"] for guest in host.guests()]
    done = more in names(host.regions())
    assert has == [done, done]
    for guest in (one, two):
        domid = host.domid(guest)
        assert domid is not None
        info = host.domain(domid)
        assert info is not None
        assert not info["paused"]
    if not done:
        host.apply(*changes)
    host.poke(go, 0, FILLED, filled(7))
    host.wait_said(two, "checked pages=256 bad=0 seed=7")  # what it was told of
    host.apply(remove(more, force=True))
    end(host, one, two)
