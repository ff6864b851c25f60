# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program of dom0 has a region's bytes: exactly those, for as long as anything refers to them."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from fakes.dom0_memory import Dom0Memory
from varlink_fakes import OWNER, SNAPSHOT, FakeRegions, daemon

from xshmd import client
from xshmd.client import on_trio
from xshmd.client.ranges import Part, Whereabouts, part_of
from xshmd.daemon.processes import ProcProcesses
from xshmd.errors import Conflict, DaemonUnreachable, NoSuchRegion, Refused, UsageError
from xshmd.model import Lifetime, Prot
from xshmd.units import PAGE_SIZE

REGION = SNAPSHOT.regions[0]
PATIENCE_S = 60


@pytest.fixture
def api() -> FakeRegions:
    return FakeRegions()


@pytest.fixture
def path(tmp_path: Path, api: FakeRegions) -> Iterator[str]:
    with daemon(tmp_path / "socket", api):
        yield str(tmp_path / "socket")


@pytest.fixture
def memory() -> Dom0Memory:
    return Dom0Memory(OWNER.holder_uuid, 3, REGION.holder_first_gfn, REGION.nr_frames)


@pytest.fixture
def xshmd(path: str, memory: Dom0Memory) -> Iterator[client.Connection]:
    with client.connect(path, xen=memory) as connection:
        yield connection


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_there_is(xshmd: client.Connection) -> None:
    (region,) = xshmd.regions()
    assert (region.id, region.size_bytes, region.owner) == ("r0", 1 << 20, "ctl")
    assert region.lifetime is Lifetime.MEMBERS
    assert region.members == ("ctl", "log")
    assert region.processes == ()
    assert xshmd.region("r0").id == "r0"
    with pytest.raises(NoSuchRegion):
        xshmd.region("nothing")


def test_bytes_are_the_regions(
    xshmd: client.Connection, memory: Dom0Memory, api: FakeRegions
) -> None:
    with xshmd.region("r0").map("rw") as bytes_of_it:
        assert len(bytes_of_it) == 1 << 20
        bytes_of_it[PAGE_SIZE - 1 : PAGE_SIZE + 1] = b"ab"
        assert [held.is_over for held in api.leases] == [False]
        assert api.leases[0].lease.prot is Prot.RW
        process = api.leases[0].lease.process
        assert (process.pid, process.uid) == (os.getpid(), os.getuid())
        assert ProcProcesses().started_at(process.pid) == process.started
    assert memory.content[PAGE_SIZE - 1 : PAGE_SIZE + 1] == b"ab"
    assert (memory.nr_open, memory.nr_mapped) == (0, 0)
    until(lambda: api.leases[0].is_over)


def test_a_part_and_no_byte_more(xshmd: client.Connection, memory: Dom0Memory) -> None:
    memory.content[:] = bytes(number % 251 for number in range(len(memory.content)))
    for offset, size in ((0, 1), (4095, 2), (4096, 4096), (8191, 4098), ((1 << 20) - 1, None)):
        with xshmd.region("r0").map(offset_bytes=offset, size_bytes=size) as part:
            end = offset + (size or 1)
            assert bytes(part) == memory.content[offset:end]
            assert part.readonly
    assert memory.nr_mapped == 0


def test_read_only_is_read_only(xshmd: client.Connection) -> None:
    with xshmd.region("r0").map() as part, pytest.raises(TypeError):
        part[0] = 1


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 0),
        (-1, 1),
        (1 << 20, None),
        (0, (1 << 20) + 1),
        ((1 << 20) - 1, 2),
        (1 << 64, 1),
        (1, (1 << 64) - 1),
        (0, -1),
    ],
)
def test_what_is_beyond_the_region_is_out_of_reach(
    xshmd: client.Connection, memory: Dom0Memory, offset: int, size: int | None
) -> None:
    with (
        xshmd.region("r0").attach() as lease,
        pytest.raises(UsageError),
        lease.map(offset_bytes=offset, size_bytes=size),
    ):
        pass
    assert memory.nr_open == 0


def test_numbers_are_whole_ones() -> None:
    with pytest.raises(TypeError):
        part_of(4096, 0.5, None)  # type: ignore[arg-type]
    assert part_of(3 * PAGE_SIZE, PAGE_SIZE + 1, PAGE_SIZE) == Part(
        first_frame=1, nr_frames=2, skip_bytes=1, nr_bytes=PAGE_SIZE
    )


GOOD = {
    "holderDomainId": 3, "holderUuid": "u", "holderFirstFrame": 7, "frameCount": 2,
    "transport": "physmap",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("holderDomainId", 0),
        ("holderDomainId", 0x7FF0),
        ("holderDomainId", True),
        ("holderDomainId", "3"),
        ("holderFirstFrame", -1),
        ("holderFirstFrame", 1 << 40),
        ("holderFirstFrame", (1 << 64) + 7),
        ("frameCount", 0),
        ("frameCount", 1 << 40),
        ("frameCount", None),
    ],
)
def test_a_daemon_that_talks_nonsense_is_not_believed(name: str, value: object) -> None:
    assert Whereabouts.of(GOOD).nr_frames == 2
    with pytest.raises(DaemonUnreachable, match=name):
        Whereabouts.of(GOOD | {name: value})


def test_a_slice_that_is_left_keeps_memory_and_lease(
    xshmd: client.Connection, memory: Dom0Memory, api: FakeRegions
) -> None:
    left = None
    with pytest.raises(BufferError, match="r0"), xshmd.region("r0").map("rw") as whole:
        left = whole[4:8]
    assert left is not None
    left[:] = b"late"
    assert memory.content[4:8] == b"late"
    assert memory.nr_mapped == 1
    xshmd.regions()
    assert not api.leases[0].is_over
    del left
    gc.collect()
    assert (memory.nr_open, memory.nr_mapped) == (0, 0)
    until(lambda: api.leases[0].is_over)


def test_an_error_in_the_body_is_what_comes_out(
    xshmd: client.Connection, memory: Dom0Memory
) -> None:
    with pytest.raises(ZeroDivisionError), xshmd.region("r0").map() as whole:
        1 // len(whole[:0])
    assert memory.nr_mapped == 0


def test_several_at_a_time(xshmd: client.Connection, memory: Dom0Memory) -> None:
    with xshmd.region("r0").attach("rw") as lease:
        with lease.map(size_bytes=8) as one, lease.map(size_bytes=8) as other:
            one[0] = 7
            assert other[0] == 7
            assert memory.nr_mapped == 2
        assert memory.nr_mapped == 0


def test_a_holder_that_is_another_by_now(xshmd: client.Connection, memory: Dom0Memory) -> None:
    memory.uuid = "another"
    with pytest.raises(Conflict), xshmd.region("r0").map():
        pass
    assert (memory.nr_open, memory.nr_mapped) == (0, 0)


def test_a_refusal_comes_out_and_leaves_nothing(
    xshmd: client.Connection, api: FakeRegions, memory: Dom0Memory
) -> None:
    region = xshmd.region("r0")
    api.refusal = Refused("no", hint="ask nicely")
    with pytest.raises(Refused, match="no"), region.map():
        pass
    with pytest.raises(UsageError, match="prot"):
        region.attach("wr")
    assert memory.nr_open == 0


def test_a_transport_that_nothing_serves(
    xshmd: client.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xshmd.client.mapping.MAPPERS", {})
    with pytest.raises(Refused, match="physmap"), xshmd.region("r0").map():
        pass


def test_a_copy_of_the_connection_keeps_no_lease(
    xshmd: client.Connection, api: FakeRegions
) -> None:
    """As a child has that was forked meanwhile."""
    lease = xshmd.lease("r0")
    copy = os.dup(lease.fileno())
    lease.close()
    until(lambda: api.leases[0].is_over)
    os.close(copy)


def test_a_child_that_unwinds_ends_no_lease(
    xshmd: client.Connection, api: FakeRegions, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = xshmd.lease("r0")
    copy = os.dup(lease.fileno())  # the parent's
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: 1)
        lease.close()
    xshmd.regions()
    assert not api.leases[0].is_over
    os.close(copy)
    until(lambda: api.leases[0].is_over)


def test_being_asked_to_let_go(xshmd: client.Connection, api: FakeRegions) -> None:
    with xshmd.region("r0").attach() as lease:
        assert lease.wait_ending(0) == ""
        api.leases[0].want_back("owner gone")
        assert lease.wait_ending() == "owner gone"
        assert lease.wait_ending(0) == "owner gone"
        assert not api.leases[0].is_over
    until(lambda: api.leases[0].is_over)
    with pytest.raises(UsageError, match="closed"):
        lease.map_until_unused()


def test_a_daemon_that_is_started_anew_finds_the_lease(tmp_path: Path, memory: Dom0Memory) -> None:
    path = tmp_path / "socket"
    connection = client.connect(str(path), xen=memory)
    with daemon(path, FakeRegions()):
        lease = connection.lease("r0", "rw")
    second = FakeRegions()
    with daemon(path, second), lease, lease.map() as whole:
        asked = threading.Timer(0, lambda: until(lambda: bool(second.leases)))
        asked.start()
        assert lease.wait_ending(1) == ""
        asked.join()
        assert [held.lease.prot for held in second.leases] == [Prot.RW]
        whole[0] = 1
        second.leases[0].want_back("enough")
        assert lease.wait_ending() == "enough"
    connection.close()


def test_a_lease_that_is_closed_when_the_daemon_was_started_anew_is_closed_there(
    tmp_path: Path,
) -> None:
    path = tmp_path / "socket"
    with daemon(path, FakeRegions()):
        lease = client.connect(str(path)).lease("r0")
    second = FakeRegions()
    with daemon(path, second):
        lease.close()
        until(lambda: bool(second.leases) and second.leases[0].is_over)
    client.connect(str(path)).close()


def test_without_a_daemon(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachable):
        client.connect(str(tmp_path / "nothing")).regions()


async def test_the_same_on_trio(path: str, memory: Dom0Memory, api: FakeRegions) -> None:
    async with on_trio.connect(path, xen=memory) as xshmd:
        (region,) = await xshmd.regions()
        assert (await xshmd.region("r0")).size_bytes == region.size_bytes
        async with region.map("rw", offset_bytes=4090, size_bytes=10) as part:
            part[:] = b"0123456789"
        assert memory.content[4090:4100] == b"0123456789"
        assert (memory.nr_open, memory.nr_mapped) == (0, 0)
        async with region.attach() as lease:
            with trio.move_on_after(0.01):
                await lease.wait_ending()
            api.leases[1].want_back("owner gone")
            assert await lease.wait_ending() == "owner gone"
        with pytest.raises(BufferError):
            async with region.map() as whole:
                left = whole[:1]
        assert memory.nr_mapped == 1
        assert left.nbytes == 1


async def test_trio_takes_a_lease_up_again(tmp_path: Path, memory: Dom0Memory) -> None:
    path = tmp_path / "socket"
    async with on_trio.connect(str(path), xen=memory) as xshmd:
        with daemon(path, FakeRegions()):
            region = await xshmd.region("r0")
            attached = region.attach("rw")
            lease = await attached.__aenter__()
        second = FakeRegions()
        with daemon(path, second):

            async def ask_back() -> None:
                while not second.leases:  # noqa: ASYNC110 - it is in another thread
                    await trio.sleep(0.01)
                second.leases[0].want_back("enough")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask_back)
                assert await lease.wait_ending() == "enough"
            await attached.__aexit__(None, None, None)


# -- watches --------------------------------------------------------------------------------------


def test_a_byte_that_is_watched(xshmd: client.Connection, api: FakeRegions) -> None:
    region = xshmd.region("r0")
    with region.watch(64, counter_offset_bytes=8) as watch:
        assert [place for place, _ in api.watched] == [("r0", 64, 8)]
        assert watch.wait(0) is False
        assert region.trigger(64) == 1
        assert watch.wait(PATIENCE_S) is True
        assert watch.wait(0) is False
        assert region.trigger(65) == 1
    until(lambda: not api.watched)


def test_what_cannot_be_watched(xshmd: client.Connection, api: FakeRegions) -> None:
    region = xshmd.region("r0")
    api.refusal = Refused("region r0 has no doorbells, so nobody can watch it")
    with pytest.raises(Refused):
        region.watch(64)
    with pytest.raises(Refused):
        region.trigger(64)


def test_a_watch_ends_with_the_daemon(tmp_path: Path, api: FakeRegions) -> None:
    path = str(tmp_path / "socket")
    with daemon(tmp_path / "socket", api), client.connect(path) as connection:
        watch = connection.region("r0").watch(0)
    with watch, pytest.raises(DaemonUnreachable):
        watch.wait(PATIENCE_S)


async def test_a_watch_on_trio(path: str, api: FakeRegions) -> None:
    async with on_trio.connect(path) as connection:
        region = await connection.region("r0")
        async with region.watch(64) as watch:
            with trio.move_on_after(0.01) as early:
                await watch.wait()
            assert early.cancelled_caught
            assert await region.trigger(64) == 1
            with trio.fail_after(PATIENCE_S):
                await watch.wait()
