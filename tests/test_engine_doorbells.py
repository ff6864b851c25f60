# SPDX-License-Identifier: LGPL-2.1-or-later
"""Peers have numbers and doorbells, through reboots, changes and lives of the daemon."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import struct

import pytest
import trio
from crash import SWEEP_STEP, Lives, sweep
from fakes.toolstack import Made, XlFailed
from fakes.world import Daemon, World, world
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from xshmd.changes import AttachRegion, DetachRegion
from xshmd.errors import Conflict, NoSuchRegion, Refused, UsageError
from xshmd.model import DoorbellRoute, Guest, GuestConfig, PeerState, Region
from xshmd.ports import PortStatus
from xshmd.share import control_page
from xshmd.units import PAGE_SIZE, Gfn


def _pair(host: World, doorbells: int = 3) -> tuple[GuestConfig, GuestConfig]:
    a = host.config("a", host.request("r", 3, doorbells=doorbells))
    return a, host.config("b", host.borrow("r", 3))


def _guest(daemon: Daemon, name: str) -> Guest:
    found = daemon.guest(name)
    assert found is not None
    return found


def _ports(daemon: Daemon, name: str, region: str = "r") -> tuple[int, ...]:
    peer = _guest(daemon, name).peer(region)
    assert peer is not None
    return peer.ports


def _peer_id(daemon: Daemon, name: str, region: str = "r") -> int:
    peer = _guest(daemon, name).peer(region)
    assert peer is not None
    return peer.peer_id


def _region(daemon: Daemon, region_id: str = "r") -> Region:
    return next(one for one in daemon.engine.snapshot().regions if one.region_id == region_id)


def _page(host: World, daemon: Daemon) -> bytes:
    region = _region(daemon)
    (holder,) = host.holders()
    gfn = Gfn(region.holder_first_gfn + region.nr_frames - 1)
    page = host.xen.map_pages(holder, gfn, 1, writable=False)
    try:
        return page.read(0, PAGE_SIZE)
    finally:
        page.close()


def _rows(host: World, daemon: Daemon) -> list[tuple[int, int, int]]:
    """State, domain and lives of each peer, as the guests read them."""
    page = _page(host, daemon)
    magic, version, nr_peers, _ = control_page.HEADER.unpack_from(page)
    assert (magic, version) == (control_page.MAGIC, control_page.VERSION)
    return [
        control_page.DOM0S_WORDS.unpack_from(page, control_page.row_at(peer_id))
        for peer_id in range(nr_peers)
    ]


def _ring(host: World, daemon: Daemon, whose: Made, to: int) -> None:
    host.channels.guest_sends(whose.domid, _ports(daemon, whose.config.name)[to])


def _rung_by(host: World, daemon: Daemon, whose: Made) -> set[int]:
    """Which peers rang a guest, dom0 being its own number."""
    ports = _ports(daemon, whose.config.name)
    return {ports.index(port) for port in host.channels.guest_takes(whose.domid) if port in ports}


async def test_two_guests_ring_each_other(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a, b = [await host.tools.create(config) for config in _pair(host)]
        assert (_peer_id(daemon, "a"), _peer_id(daemon, "b")) == (0, 1)
        # The lowest free ones, in order of the peers: libxl has taken two for store and console.
        assert _ports(daemon, "a") == _ports(daemon, "b") == (3, 4, 5)
        for guest in (a, b):
            host.channels.guest_takes(guest.domid)
        _ring(host, daemon, a, 1)
        assert _rung_by(host, daemon, b) == {0}
        assert _rung_by(host, daemon, a) == set()
        _ring(host, daemon, b, 0)
        assert _rung_by(host, daemon, a) == {1}
        _ring(host, daemon, b, 2)  # nobody is there
        assert _rung_by(host, daemon, a) == _rung_by(host, daemon, b) == set()
        node = host.server.read(f"/local/domain/{b.domid}/xshm/r")
        assert node is not None
        assert node.split()[-2:] == ["peer=1", "doorbells=3,4,5"]
        for guest in (a, b):
            await host.tools.end(guest)
        await host.check_clean()


async def test_the_control_page_says_who_is_there_and_each_is_rung(
    autojump_clock: MockClock,
) -> None:
    async with world() as host:
        daemon = await host.start()
        first, second = _pair(host)
        a = await host.tools.create(first)
        assert _rows(host, daemon) == [(1, a.domid, 1), (0, 0, 0), (0, 0, 0)]
        host.channels.guest_takes(a.domid)
        b = await host.tools.create(second)
        assert _rows(host, daemon) == [(1, a.domid, 1), (1, b.domid, 1), (0, 0, 0)]
        # Its own number is dom0, who says that something has changed; the other rang at its bind.
        assert 0 in _rung_by(host, daemon, a)
        ports = control_page.PORTS.unpack_from(_page(host, daemon), control_page.PORTS_AT + 64)
        assert ports[:4] == (3, 4, 5, 0)
        await host.tools.end(b)
        await host.until(lambda: _rows(host, daemon)[1][0] == 2, "b is known to have left")
        assert _rung_by(host, daemon, a) == {0}
        await host.tools.end(a)
        await host.check_clean()


async def test_a_reboot_keeps_the_number_and_gets_new_ports(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a, b = [await host.tools.create(config) for config in _pair(host)]
        a = await host.tools.reboot(a)
        await host.until(lambda: daemon.is_attached("a"))
        assert (_peer_id(daemon, "a"), _peer_id(daemon, "b")) == (0, 1)
        assert _rows(host, daemon)[0] == (1, a.domid, 2)
        for guest in (a, b):
            host.channels.guest_takes(guest.domid)
        _ring(host, daemon, b, 0)
        assert _rung_by(host, daemon, a) == {1}
        _ring(host, daemon, a, 1)
        assert _rung_by(host, daemon, b) == {0}
        for guest in (a, b):
            await host.tools.end(guest)
        await host.check_clean()


async def test_nothing_is_lost_while_no_daemon_runs(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a, b = [await host.tools.create(config) for config in _pair(host)]
        ports = _ports(daemon, "a")
        await daemon.kill()
        for guest in (a, b):
            host.channels.guest_takes(guest.domid)
        host.channels.guest_sends(a.domid, ports[1])
        assert host.channels.guest_takes(b.domid) == set()
        daemon = await host.start()
        assert _ports(daemon, "a") == ports
        await host.until(lambda: 0 in _rung_by(host, daemon, b), "the ring comes")
        for guest in (a, b):
            await host.tools.end(guest)
        await host.check_clean()


async def test_detached_ports_ring_nobody_and_are_used_again(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a, b = [await host.tools.create(config) for config in _pair(host)]
        ports = _ports(daemon, "b")
        del host.finder.files["b"]  # it runs on without
        await daemon.engine.apply([DetachRegion(guest="b", region_id="r")])
        assert _rows(host, daemon)[1][0] == 2
        host.channels.guest_takes(a.domid)
        host.channels.guest_sends(b.domid, ports[0])
        assert host.channels.guest_takes(a.domid) == set()
        assert daemon.engine.snapshot().guests[1].peer("r") is None
        await daemon.engine.apply([AttachRegion(guest="b", request=host.borrow("r", 3))])
        assert _ports(daemon, "b") == ports
        assert _rows(host, daemon)[1][::2] == (1, 2)
        host.channels.guest_takes(a.domid)
        _ring(host, daemon, b, 0)
        assert _rung_by(host, daemon, a) == {1}
        for guest in (a, b):
            await host.tools.end(guest)
        await host.check_clean()


async def test_the_lowest_free_number_is_given(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a, b = [await host.tools.create(config) for config in _pair(host, 4)]
        c = await host.tools.create(host.config("c", host.borrow("r", 3)))
        assert _peer_id(daemon, "c") == 2
        await host.tools.end(b)
        d = await host.tools.create(host.config("d", host.borrow("r", 3)))
        assert _peer_id(daemon, "d") == 1
        assert _rows(host, daemon)[1] == (1, d.domid, 2)
        for guest in (a, c, d):
            await host.tools.end(guest)
        await host.check_clean()


async def test_one_peer_too_many_is_refused(autojump_clock: MockClock) -> None:
    async with world() as host:
        await host.start()
        made = [await host.tools.create(config) for config in _pair(host, 2)]
        with pytest.raises(XlFailed):
            await host.tools.create(host.config("c", host.borrow("r", 3)))
        for guest in made:
            await host.tools.end(guest)
        await host.check_clean()


async def test_a_guest_that_may_have_no_more_ports_is_refused(autojump_clock: MockClock) -> None:
    async with world() as host:
        await host.start()
        host.channels.max_port = lambda domid: 4
        with pytest.raises(XlFailed):
            await host.tools.create(_pair(host)[0])
        await host.check_clean()


async def test_a_line_that_cannot_be_had_now_is_had_later(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        host.channels.bind_errors = [errno.ENOSPC, errno.ENOMEM]
        a, b = [await host.tools.create(config) for config in _pair(host)]
        await trio.sleep(3)
        for guest in (a, b):
            host.channels.guest_takes(guest.domid)
        _ring(host, daemon, a, 1)
        assert _rung_by(host, daemon, b) == {0}
        _ring(host, daemon, b, 0)
        assert _rung_by(host, daemon, a) == {1}
        for guest in (a, b):
            await host.tools.end(guest)
        await host.check_clean()


async def test_a_guest_that_closes_a_port_harms_itself_alone(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a, b = [await host.tools.create(config) for config in _pair(host)]
        await daemon.kill()
        host.channels.guest_closes(b.domid, _ports(daemon, "b")[1])
        daemon = await host.start()
        await trio.sleep(1)
        for guest in (a, b):
            host.channels.guest_takes(guest.domid)
        _ring(host, daemon, a, 1)
        assert _rung_by(host, daemon, b) == {0}
        for guest in (a, b):
            await host.tools.end(guest)
        await host.check_clean()


def test_what_guests_write_into_the_page_cannot_break_it() -> None:
    rows = {0: control_page.Row(state=PeerState.JOINED, domid=7, ports=(3, 4))}
    for before in (bytes(PAGE_SIZE), b"\xff" * PAGE_SIZE):
        page = bytearray(before)
        for at, data in control_page.table(rows, 2, before):
            page[at : at + len(data)] = data
        assert control_page.HEADER.unpack_from(page)[:3] == (
            control_page.MAGIC,
            control_page.VERSION,
            2,
        )
        assert struct.unpack_from("<II", page, control_page.row_at(0)) == (1, 7)
        assert not control_page.is_ready(bytes(page), 0)


async def test_a_newcomer_offers_ports_that_peers_alone_may_bind(
    autojump_clock: MockClock,
) -> None:
    async with world() as host:
        daemon = await host.start()
        a, b = [await host.tools.create(config) for config in _pair(host)]
        offers = [
            control_page.OFFERS.unpack_from(_page(host, daemon), control_page.offers_at(peer))[:3]
            for peer in range(2)
        ]
        assert offers == [(0, 0, 0), (6, 0, 0)]
        assert host.channels.status(b.domid, 6) == PortStatus(a.domid, 0)
        a = await host.tools.reboot(a)
        await host.until(lambda: daemon.is_attached("a"))
        page = _page(host, daemon)
        assert control_page.OFFERS.unpack_from(page, control_page.offers_at(0))[:3] == (0, 6, 0)
        for guest in (a, b):
            await host.tools.end(guest)
        await host.check_clean()


async def test_rings_that_are_to_go_by_dom0_alone(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        owner = host.request("r", 3, doorbells=2)
        terms = dataclasses.replace(owner.terms, doorbell_route=DoorbellRoute.RELAYED)
        a = await host.tools.create(host.config("a", dataclasses.replace(owner, terms=terms)))
        b = await host.tools.create(host.config("b", host.borrow("r", 3)))
        page = _page(host, daemon)
        assert not any(page[control_page.OFFERS_AT : control_page.WATCHES_AT])
        for guest in (a, b):
            await host.tools.end(guest)
        await host.check_clean()


# -- ready, watched and triggered -----------------------------------------------------------------


def _write(host: World, daemon: Daemon, offset: int, data: bytes) -> None:
    """Write into the region as a guest of it does."""
    region = _region(daemon)
    (holder,) = host.holders()
    frame, inside = divmod(offset, PAGE_SIZE)
    page = host.xen.map_pages(holder, Gfn(region.holder_first_gfn + frame), 1, writable=True)
    page.write(inside, data)
    page.close()


def _control(daemon: Daemon, offset: int) -> int:
    return _region(daemon).size_bytes - PAGE_SIZE + offset


async def test_a_peer_says_that_it_is_ready(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a, b = [await host.tools.create(config) for config in _pair(host)]
        at = _control(daemon, control_page.row_at(1) + control_page.READY_AT)

        def ready(daemon: Daemon) -> list[bool]:
            found = [_guest(daemon, name).peer("r") for name in "ab"]
            return [peer is not None and peer.is_ready for peer in found]

        assert ready(daemon) == [False, False]
        _write(host, daemon, at, b"\x01")
        _ring(host, daemon, b, 1)
        await host.until(lambda: ready(daemon) == [False, True], "b is ready")
        await daemon.kill()
        daemon = await host.start()
        await host.until(lambda: ready(daemon) == [False, True], "b is still ready")
        b = await host.tools.reboot(b)
        await host.until(lambda: daemon.is_attached("b"))
        assert ready(daemon) == [False, False]
        for guest in (a, b):
            await host.tools.end(guest)
        await host.check_clean()


async def test_dom0_triggers_what_a_guest_watches(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a, b = [await host.tools.create(config) for config in _pair(host)]
        plain = control_page.encode_watch(100)
        counted = control_page.encode_watch(100, 64)
        _write(host, daemon, _control(daemon, control_page.watch_at(0, 3)), plain)
        _write(host, daemon, _control(daemon, control_page.watch_at(1, 0)), counted)
        _write(host, daemon, 64, struct.pack("<I", 2))
        for guest in (a, b):
            host.channels.guest_takes(guest.domid)
        assert await daemon.engine.trigger("r", 101) == 0
        assert await daemon.engine.trigger("r", 100) == 1
        assert _rung_by(host, daemon, a) == {0}
        assert _rung_by(host, daemon, b) == set()
        assert await daemon.engine.trigger("r", 100) == 2
        assert _rung_by(host, daemon, b) == {1}
        assert await daemon.engine.trigger("r", 100) == 1  # its counter stays at 0
        assert _rung_by(host, daemon, b) == set()
        for guest in (a, b):
            await host.tools.end(guest)
        await host.check_clean()


async def test_a_guest_triggers_what_dom0_watches(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a, b = [await host.tools.create(config) for config in _pair(host)]
        async with daemon.engine.watch("r", 200, 68) as wakes:
            page = _page(host, daemon)
            (watch,) = control_page.watches(page, _region(daemon).size_bytes)
            assert watch == control_page.Watch(control_page.DOM0, 200, 68)
            # What xshm_trigger does: one off the counter, and a ring once that is 0.
            _write(host, daemon, 68, struct.pack("<I", 1))
            _ring(host, daemon, a, 0)
            await trio.sleep(1)
            with pytest.raises(trio.WouldBlock):
                wakes.receive_nowait()
            _write(host, daemon, 68, struct.pack("<I", 0))
            _ring(host, daemon, b, 1)
            with trio.fail_after(10):
                await wakes.receive()
        assert list(control_page.watches(_page(host, daemon), 3 * PAGE_SIZE)) == []
        async with daemon.engine.watch("r", 200, None) as wakes:
            assert await daemon.engine.trigger("r", 200) == 1
            with trio.fail_after(10):
                await wakes.receive()
        for guest in (a, b):
            await host.tools.end(guest)
        await host.check_clean()


async def test_what_cannot_be_watched(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(_pair(host)[0])
        c = await host.tools.create(host.config("c", host.request("s", 3)))
        for region, address, counter, error in (
            ("none", 0, None, NoSuchRegion),
            ("s", 0, None, Refused),
            ("r", 3 * PAGE_SIZE, None, UsageError),
            ("r", 0, 2, UsageError),
            ("r", 0, 2 * PAGE_SIZE, UsageError),  # the control page
        ):
            with pytest.raises(error):
                async with daemon.engine.watch(region, address, counter):
                    pass
        async with contextlib.AsyncExitStack() as stack:
            for address in range(control_page.WATCHES_PER_PEER):
                await stack.enter_async_context(daemon.engine.watch("r", address, None))
            await stack.enter_async_context(daemon.engine.watch("r", 0, None))  # shared
            with pytest.raises(Conflict):
                async with daemon.engine.watch("r", 100, None):
                    pass
        for guest in (a, c):
            await host.tools.end(guest)
        await host.check_clean()


WORDS = st.one_of(st.integers(0, 1 << 18), st.integers(0, (1 << 64) - 1))


@given(words=st.lists(st.tuples(WORDS, WORDS), max_size=8), size=st.integers(2, 20))
def test_only_watches_inside_the_region_count(words: list[tuple[int, int]], size: int) -> None:
    size_bytes = size * PAGE_SIZE
    page = bytearray(PAGE_SIZE)
    for slot, pair in enumerate(words):
        control_page.WATCH.pack_into(page, control_page.watch_at(3, slot), *pair)
    found = list(control_page.watches(bytes(page), size_bytes))
    assert len(found) >= sum(0 < at <= size_bytes and not counter for at, counter in words)
    for watch in found:
        assert 0 <= watch.address < size_bytes
        assert watch.counter % 4 == 0
        assert watch.counter + 4 <= size_bytes - PAGE_SIZE or watch.counter == 0


# -- cut off at any step --------------------------------------------------------------------------


def _came(host: World, made: Made, port: int) -> bool:
    return port in host.channels.guest_takes(made.domid)


async def ringing_guests(host: World, running: Lives) -> None:
    """Whatever happened to the daemon: the ports that were promised, and no ring is lost."""
    made = []
    for config in _pair(host):
        made.append(await host.tools.create(config))
        await host.until(lambda: host.running(made[-1]), "it runs")
    made[0] = await host.tools.reboot(made[0])
    await host.until(lambda: host.running(made[0]), "it runs again")
    daemon = await running.settled()
    a, b = made
    assert _ports(daemon, "a") == _ports(daemon, "b") == (3, 4, 5)
    for whose, port, other, heard_at in ((a, 4, b, 3), (b, 3, a, 4)):
        host.channels.guest_takes(other.domid)
        host.channels.guest_sends(whose.domid, port)
        came = functools.partial(_came, host, other, heard_at)
        await host.until(came, "the ring to come")
    for guest in made:
        await host.tools.end(guest)


def test_doorbells_after_every_cut() -> None:
    count, failed = sweep(ringing_guests, step=2 * SWEEP_STEP)
    assert failed == []
    assert count > 3
