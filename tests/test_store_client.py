# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio
from fakes import xenstored as xs
from fakes.xenstored import FakeXenstored, Request, everything
from trio.testing import MockClock, wait_all_tasks_blocked

from xshmd.errors import StoreError, StoreLost, TimedOut
from xshmd.units import DomId
from xshmd.xen.store import MAX_IN_FLIGHT, XenStore, open_store

# Each operation.


async def test_read_and_write(server: FakeXenstored, store: XenStore) -> None:
    await store.write("/a/b", "\u00e9 text")
    assert server.nodes["/a/b"].value == "\u00e9 text".encode()
    assert await store.read("/a/b") == "\u00e9 text"
    assert await store.read("/a") == ""
    assert await store.read("/x/y") is None


async def test_a_guest_cannot_break_a_read(server: FakeXenstored, store: XenStore) -> None:
    server.write("/a", b"\xff\x00ok")
    assert await store.read("/a") == "\\xff\x00ok"


async def test_remove(server: FakeXenstored, store: XenStore) -> None:
    server.write("/a/b/c", "1")
    await store.remove("/a/b")
    assert server.below("/a") == {"/a": ""}
    await store.remove("/a/b")  # its parent exists: OK
    await store.remove("/x/y/z")  # it does not: ENOENT
    with pytest.raises(StoreError, match="EINVAL"):
        await store.remove("/")


async def test_directory(server: FakeXenstored, store: XenStore) -> None:
    for name in ("z", "a", "m"):
        server.write(f"/d/{name}", "")
    assert await store.directory("/d") == ("z", "a", "m")
    assert await store.directory("/d/a") == ()
    assert await store.directory("/x") is None


def fill(server: FakeXenstored, count: int) -> tuple[str, ...]:
    names = tuple(f"domain-{n}" for n in range(count))
    for name in names:
        server.write(f"/d/{name}", "")
    return names


@pytest.mark.parametrize("count", [300, 400, 3000])
async def test_a_long_directory(server: FakeXenstored, store: XenStore, count: int) -> None:
    names = fill(server, count)
    assert await store.directory("/d") == names
    assert bool(server.requests(xs.DIRECTORY_PART)) == (count > 300)


async def test_a_long_directory_of_every_size_near_the_limit(
    server: FakeXenstored, store: XenStore
) -> None:
    # What ends a part, and what ends the list, differ by one byte (core.c send_directory_part).
    for total in range(8170, 8200):
        server.remove("/d") if "/d" in server.nodes else None
        names = [f"{n:03d}-{'x' * 95}" for n in range(total // 100)]
        names.append("y" * (total % 100 or 1))
        for name in names:
            server.write(f"/d/{name}", "")
        assert await store.directory("/d") == tuple(names)


async def test_a_long_directory_that_changes_meanwhile(
    server: FakeXenstored, store: XenStore
) -> None:
    fill(server, 1000)
    changes = 0

    def change(request: Request) -> None:
        nonlocal changes
        if request.op == xs.DIRECTORY_PART and request.strings[1] != "0" and changes < 3:
            changes += 1
            server.remove(f"/d/domain-{changes}")

    server.faults.refuse = change
    names = await store.directory("/d")
    assert changes == 3
    assert names == server.nodes["/d"].children


async def test_a_long_directory_that_always_changes(server: FakeXenstored, store: XenStore) -> None:
    fill(server, 1000)
    last = 0

    def change(request: Request) -> None:
        nonlocal last
        last += 1
        server.write(f"/d/new-{last}", "")

    server.faults.refuse = change
    with pytest.raises(TimedOut, match="/d changed"):
        await store.directory("/d")


async def test_a_long_directory_that_is_removed_meanwhile(
    server: FakeXenstored, store: XenStore
) -> None:
    fill(server, 1000)

    def remove(request: Request) -> None:
        if request.op == xs.DIRECTORY_PART:
            server.remove("/d") if "/d" in server.nodes else None

    server.faults.refuse = remove
    assert await store.directory("/d") is None


async def test_a_server_without_directory_part(server: FakeXenstored, store: XenStore) -> None:
    fill(server, 1000)
    server.faults.refuse = lambda request: "ENOSYS" if request.op == xs.DIRECTORY_PART else None
    with pytest.raises(StoreError, match="E2BIG"):
        await store.directory("/d")


async def test_set_permissions(server: FakeXenstored, store: XenStore) -> None:
    server.create_domain(7)
    server.write("/a", "")
    await store.set_permissions("/a", ["n0", "r7"])
    assert server.permissions("/a") == ("n0", "r7")
    await store.write("/a/b", "")
    assert server.permissions("/a/b") == ("n0", "r7")
    with pytest.raises(StoreError, match="ENOENT") as caught:
        await store.set_permissions("/a", ["n8"])
    assert caught.value.facts == {"path": "/a", "error": "ENOENT"}


async def test_a_directory_that_is_refused(server: FakeXenstored, store: XenStore) -> None:
    server.faults.refuse = lambda request: "EACCES" if request.op == xs.DIRECTORY else None
    with pytest.raises(StoreError, match="EACCES"):
        await store.directory("/tool")


async def test_is_introduced(server: FakeXenstored, store: XenStore) -> None:
    assert not await store.is_introduced(DomId(5))
    server.introduce(5)
    assert await store.is_introduced(DomId(5))
    server.release(5)
    assert not await store.is_introduced(DomId(5))


async def test_a_refusal_names_path_and_error(server: FakeXenstored, store: XenStore) -> None:
    server.faults.refuse = lambda request: "EQUOTA"
    with pytest.raises(StoreError, match="WRITE /a: EQUOTA") as caught:
        await store.write("/a", "1")
    assert caught.value.facts == {"path": "/a", "error": "EQUOTA"}
    assert "oxenstored" in caught.value.hint
    for call in (store.read("/a"), store.directory("/a"), store.remove("/a")):
        with pytest.raises(StoreError, match="EQUOTA"):
            await call


async def test_what_cannot_be_sent_is_not_sent(server: FakeXenstored, store: XenStore) -> None:
    for call in (
        store.write("/a", "v" * 4096),
        store.write("a", ""),
        store.read("/a/"),
        store.directory("@releaseDomain"),
        store.write_many([("/a", "1"), ("/b", "v" * 5000)]),
        store.set_permissions("/a", []),
    ):
        with pytest.raises(StoreError):
            await call
    assert server.log == []
    assert store.messages_sent == 0


async def test_messages_sent(store: XenStore) -> None:
    await store.write("/a", "1")
    await store.read_many(["/a", "/b"])
    assert store.messages_sent == 3


# Many requests at once.


async def test_many_are_in_flight_in_order(server: FakeXenstored, store: XenStore) -> None:
    server.write("/r/1", "one")
    paths = [f"/r/{n}" for n in range(3)]
    assert await store.read_many(paths) == (None, "one", None)
    assert [request.path for request in server.requests(xs.READ)] == paths
    assert await store.read_many([]) == ()
    items = [(f"/w/{n}", str(n)) for n in range(200)]
    await store.write_many(items)
    assert [request.path for request in server.requests(xs.WRITE)] == [path for path, _ in items]
    assert server.read("/w/199") == "199"


async def test_the_second_is_sent_before_the_first_is_answered(
    server: FakeXenstored, store: XenStore
) -> None:
    server.faults.silent = everything
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.read_many, ["/1", "/2", "/3"])
        await wait_all_tasks_blocked()
        assert len(server.log) == 3
        server.answer_held()


async def test_no_more_than_the_limit_in_flight(server: FakeXenstored, store: XenStore) -> None:
    server.faults.silent = everything
    async with trio.open_nursery() as nursery:
        for n in range(3 * MAX_IN_FLIGHT):
            nursery.start_soon(store.read, f"/{n}")
        for rounds in (1, 2, 3):
            await wait_all_tasks_blocked()
            assert len(server.log) == rounds * MAX_IN_FLIGHT
            server.answer_held()


async def test_request_ids_start_again_and_pass_over_those_in_flight(
    server: FakeXenstored, store: XenStore
) -> None:
    server.write("/a", "a")
    server.faults.silent = lambda request: request.path == "/held"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.read, "/held")
        await wait_all_tasks_blocked()
        assert store.connection.link is not None
        store.connection.link._last_rq_id = 0xFFFF_FFFE
        assert await store.read_many(["/a", "/a", "/a"]) == ("a", "a", "a")
        assert [request.rq_id for request in server.log] == [1, 0xFFFF_FFFF, 2, 3]
        server.answer_held()


async def test_answers_in_another_order(server: FakeXenstored, store: XenStore) -> None:
    for n in range(8):
        server.write(f"/{n}", str(n))
    server.faults.shuffle = 4
    values = await store.read_many([f"/{n}" for n in range(8)])
    assert values == tuple("01234567")


async def test_answers_in_pieces(server: FakeXenstored, store: XenStore) -> None:
    names = fill(server, 800)
    server.faults.piece_bytes = 7
    assert await store.directory("/d") == names


async def test_one_refusal_among_many(server: FakeXenstored, store: XenStore) -> None:
    server.faults.refuse = lambda request: "EACCES" if request.path == "/1" else None
    with pytest.raises(StoreError, match="/1"):
        await store.read_many(["/0", "/1", "/2"])
    with pytest.raises(StoreError, match="/1"):
        await store.write_many([("/0", "a"), ("/1", "b"), ("/2", "c")])
    assert server.read("/2") == "c"  # written, as it was sent; and the answer was awaited
    assert await store.read("/0") == "a"


# Deadlines and cancellation.


async def test_a_deadline_and_the_late_answer(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.write("/a", "late")
    server.faults.silent = lambda request: request.path == "/a"
    start = trio.current_time()
    with pytest.raises(TimedOut, match="READ /a within 5 s") as caught:
        await store.read("/a")
    assert trio.current_time() - start == pytest.approx(5)
    assert caught.value.facts == {"path": "/a"}
    server.write("/b", "now")
    server.answer_held()
    assert await store.read("/b") == "now"
    assert len(server.connections) == 1


async def test_the_wait_for_a_slot_ends_when_a_server_that_answers_nothing_is_left(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.faults.deaf = everything
    start = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def ends(path: str) -> None:
            with pytest.raises((TimedOut, StoreLost)):
                await store.read(path)
            assert trio.current_time() - start == pytest.approx(5)

        for n in range(MAX_IN_FLIGHT):
            nursery.start_soon(ends, f"/{n}")
        await trio.sleep(3)
        nursery.start_soon(ends, "/waiting")
    assert "/waiting" not in [request.path for request in server.log]


async def test_a_server_that_answers_nothing_is_left(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.faults.deaf = everything
    async with trio.open_nursery() as nursery:

        async def read(path: str) -> None:
            with pytest.raises((TimedOut, StoreLost)):
                await store.read(path)

        for n in range(MAX_IN_FLIGHT):
            nursery.start_soon(read, f"/{n}")
    server.faults.deaf = xs.nothing
    assert await store.read("/a") is None
    assert server.connection.number == 2


async def test_a_cancelled_caller_breaks_nothing(server: FakeXenstored, store: XenStore) -> None:
    server.write("/b", "b")
    server.faults.silent = lambda request: request.path == "/a"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.read, "/a")
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert await store.read("/b") == "b"
    server.answer_held()
    assert await store.read("/b") == "b"
    assert len(server.connections) == 1


async def test_cancelled_callers_give_their_slots_back(
    server: FakeXenstored, store: XenStore
) -> None:
    for _ in range(3 * MAX_IN_FLIGHT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.read, "/a")
            nursery.start_soon(store.read_many, ["/a", "/b"])
            await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        await wait_all_tasks_blocked()
    assert await store.read("/a") is None
    assert len(server.connections) == 1


async def test_a_large_write_is_whole_though_its_caller_is_cancelled(short: Path) -> None:
    # A server that does not read yet: what is being sent blocks with a frame cut in two.
    directory = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    path = str(short / "s")
    await directory.bind(path)
    directory.listen(1)
    with directory:
        async with open_store(path) as store, trio.open_nursery() as nursery:
            peer, _ = await directory.accept()
            with peer, trio.move_on_after(60) as scope:
                async with trio.open_nursery() as writers:
                    for n in range(MAX_IN_FLIGHT):
                        writers.start_soon(store.write, f"/{n}", "v" * 4000)
                    await wait_all_tasks_blocked()
                    writers.cancel_scope.cancel()
                left, received = MAX_IN_FLIGHT, bytearray()
                while left:
                    received += await peer.recv(65536)
                    while len(received) >= 16 and left:
                        op, _, _, length = xs.HEADER.unpack_from(received)
                        if len(received) < 16 + length:
                            break
                        assert op == xs.WRITE
                        assert received[16 + length - 4000 : 16 + length] == b"v" * 4000
                        del received[: 16 + length]
                        left -= 1
            assert not scope.cancelled_caught
            nursery.cancel_scope.cancel()
