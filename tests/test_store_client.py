# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from fakes import xenstored as xs
from fakes.xenstored import FakeXenstored, Request, everything, fake_xenstored, only
from trio.testing import MockClock, wait_all_tasks_blocked

from xshmd.errors import StoreError, StoreLost, TimedOut, XenUnavailable
from xshmd.ports import StoreTransaction, WatchEvent
from xshmd.units import DomId
from xshmd.xen import store as store_module
from xshmd.xen.store import MAX_IN_FLIGHT, MAX_PENDING_EVENTS, XenStore, open_store

Events = trio.MemoryReceiveChannel[WatchEvent]


@pytest.fixture
async def server() -> AsyncIterator[FakeXenstored]:
    async with fake_xenstored() as running:
        yield running


@pytest.fixture
async def store(server: FakeXenstored) -> AsyncIterator[XenStore]:
    async with open_store(str(server.path)) as opened:
        yield opened


@pytest.fixture
def short() -> Iterator[Path]:
    """tmp_path may be longer than the 107 bytes the name of a socket has."""
    with tempfile.TemporaryDirectory(prefix="xs") as directory:
        yield Path(directory)


async def next_paths(events: Events, count: int) -> list[str]:
    with trio.fail_after(60):
        return [(await events.receive()).path for _ in range(count)]


async def no_more(events: Events) -> None:
    await wait_all_tasks_blocked()
    with pytest.raises(trio.WouldBlock):
        events.receive_nowait()


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


# Losing the connection.


async def loses(store: XenStore, path: str) -> None:
    with pytest.raises(StoreLost, match=path) as caught:
        await store.read(path)
    assert caught.value.facts["path"] == path


async def test_all_waiters_hear_of_the_loss_at_once(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.faults.silent = everything
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for n in range(3 * MAX_IN_FLIGHT):  # a third waits for an answer, the rest for a slot
            nursery.start_soon(loses, store, f"/{n}")
        await wait_all_tasks_blocked()
        server.drop()
    assert trio.current_time() == start


@pytest.mark.parametrize("fault", ["drop_before", "drop_after"])
async def test_a_request_that_kills_the_connection(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore, fault: str
) -> None:
    setattr(server.faults, fault, only(xs.WRITE))
    with pytest.raises(StoreLost, match="WRITE /a"):
        await store.write("/a", "1")
    setattr(server.faults, fault, xs.nothing)
    assert await store.read("/a") == (None if fault == "drop_before" else "1")
    assert server.connection.number == 2


@pytest.mark.parametrize(
    "junk",
    [
        b"x",
        xs.HEADER.pack(99, 0, 0, 0),
        xs.HEADER.pack(xs.READ, 1, 0, 5000),
        xs.HEADER.pack(xs.READ, 12345, 0, 0),
        xs.HEADER.pack(xs.WATCH_EVENT, 0, 0, 2) + b"/a",
        xs.HEADER.pack(xs.WRITE, 1, 0, 3) + b"OK\0",
        xs.HEADER.pack(xs.READ, 1, 0, 10) + b"cut",
    ],
    ids=["cut header", "type", "length", "request id", "event", "answer type", "cut payload"],
)
async def test_junk_is_a_lost_connection(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore, junk: bytes
) -> None:
    server.faults.deaf = everything
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loses, store, "/a")
        await wait_all_tasks_blocked()
        server.connection.send_raw(junk)
        await wait_all_tasks_blocked()
        if junk in (b"x", xs.HEADER.pack(xs.READ, 1, 0, 10) + b"cut"):
            server.drop()
    server.faults.deaf = xs.nothing
    assert await store.read("/a") is None


@pytest.mark.parametrize(
    ("op", "answer"), [(xs.IS_DOMAIN_INTRODUCED, b"maybe\0"), (xs.TRANSACTION_START, b"-1\0")]
)
async def test_an_answer_that_makes_no_sense_is_a_lost_connection(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore, op: int, answer: bytes
) -> None:
    async def body(transaction: StoreTransaction) -> None:
        raise AssertionError

    async def call() -> None:
        if op == xs.TRANSACTION_START:
            await store.transact(body)
        else:
            await store.is_introduced(DomId(1))

    async def call_is_lost() -> None:
        with pytest.raises(StoreLost, match="broke the protocol"):
            await call()

    server.faults.deaf = everything
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call_is_lost)
        await wait_all_tasks_blocked()
        rq_id = server.log[0].rq_id
        server.connection.send_raw(xs.HEADER.pack(op, rq_id, 0, len(answer)) + answer)


async def test_a_request_waits_for_the_reconnect(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.write("/a", "1")
    server.stop()
    await wait_all_tasks_blocked()
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            assert await store.read("/a") == "1"

        nursery.start_soon(read)
        nursery.start_soon(store.read_many, ["/a", "/b"])
        await trio.sleep(3)
        server.start()


async def test_a_request_waits_no_longer_than_its_deadline(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.stop()
    await wait_all_tasks_blocked()
    start = trio.current_time()
    with pytest.raises(StoreLost, match="not connected"):
        await store.read("/a")
    assert trio.current_time() - start == pytest.approx(5)


async def test_reconnecting_backs_off_and_starts_afresh_once_answered(
    autojump_clock: MockClock,
    server: FakeXenstored,
    store: XenStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries: list[float] = []
    connect = store.connection.connect

    async def noted() -> trio.SocketStream:
        tries.append(trio.current_time())
        return await connect()

    monkeypatch.setattr(store.connection, "connect", noted)

    def waits() -> list[float]:
        return [round(b - a, 3) for a, b in zip([lost, *tries], tries, strict=False)]

    lost = trio.current_time()
    server.stop()
    await trio.sleep(30)
    assert waits()[:8] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    server.start()
    await trio.sleep(5)
    assert await store.read("/a") is None
    tries.clear()
    lost = trio.current_time()
    server.stop()
    await trio.sleep(1)
    assert waits()[:2] == [0.1, 0.2]


async def test_a_server_that_accepts_and_dies_is_not_hammered(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.faults.drop_before = everything
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(60):
            while True:
                nursery.start_soon(loses, store, "/a")
                await trio.sleep(0.5)
        await trio.sleep(5)
    assert server.connection.number < 22 if server.connections else True
    assert len({request.connection for request in server.log}) < 22


async def test_no_server_at_all() -> None:
    with pytest.raises(XenUnavailable, match="/nonexistent/socket: No such file") as caught:
        async with open_store("/nonexistent/socket"):
            raise AssertionError
    assert "xenstored" in caught.value.hint


def test_where_the_socket_is() -> None:
    assert store_module.socket_paths({}) == (
        "/run/xenstored/socket",
        "/var/run/xenstored/socket",
    )
    assert store_module.socket_paths({"XENSTORED_RUNDIR": "/r"}) == ("/r/socket",)
    both = {"XENSTORED_RUNDIR": "/r", "XENSTORED_PATH": "/p"}
    assert store_module.socket_paths(both) == ("/p",)


# The life of the store.


async def test_an_error_in_the_body_comes_out_as_it_is(server: FakeXenstored) -> None:
    with pytest.raises(StoreError, match="EINVAL") as caught:
        async with open_store(str(server.path)) as store:
            await store.remove("/")
    assert type(caught.value) is StoreError


async def test_an_error_in_a_cancelled_body_comes_out_too(server: FakeXenstored) -> None:
    async def fail() -> None:
        async with open_store(str(server.path)):
            scope.cancel()
            raise KeyError

    with trio.CancelScope() as scope, pytest.raises(KeyError):
        await fail()


async def test_cancelling_the_body_is_no_error(server: FakeXenstored) -> None:
    with trio.CancelScope() as scope:
        async with open_store(str(server.path)) as store:
            scope.cancel()
            await store.read("/a")
    assert scope.cancelled_caught


async def test_a_closed_store_is_lost(server: FakeXenstored) -> None:
    server.faults.silent = everything
    async with trio.open_nursery() as nursery, open_store(str(server.path)) as store:
        nursery.start_soon(loses, store, "/pending")
        await wait_all_tasks_blocked()
    with pytest.raises(StoreLost, match="closed"):
        await store.read("/a")
    with pytest.raises(StoreLost, match="closed"):
        async with store.watch("/a"):
            raise AssertionError
    await wait_all_tasks_blocked()
    assert server.connections == []


# Watches.


async def test_a_watch(server: FakeXenstored, store: XenStore) -> None:
    async with store.watch("/w") as events:
        assert await next_paths(events, 1) == ["/w"]
        server.write("/w/a/b", "1")
        assert await next_paths(events, 1) == ["/w/a/b"]
        await store.write("/w", "")
        await store.write("/wx", "")
        assert await next_paths(events, 1) == ["/w"]
        server.remove("/w")
        assert await next_paths(events, 1) == ["/w"]
        await no_more(events)


async def test_leaving_a_watch_removes_it(server: FakeXenstored, store: XenStore) -> None:
    async with store.watch("/w") as events:
        assert len(server.connection.watches) == 1
        assert await next_paths(events, 1) == ["/w"]
    assert server.connection.watches == []
    await wait_all_tasks_blocked()
    assert store.connection.nr_tasks == 0
    with pytest.raises(trio.ClosedResourceError):
        await events.receive()
    server.connection.send_event("/w", "xshmd/1")  # a late one
    assert await store.read("/a") is None


async def test_watches_of_one_path_are_apart(server: FakeXenstored, store: XenStore) -> None:
    async with store.watch("/w") as first:
        async with store.watch("/w") as second:
            assert await next_paths(first, 1) == ["/w"]
            assert await next_paths(second, 1) == ["/w"]
        server.write("/w/a", "")
        assert await next_paths(first, 1) == ["/w/a"]


async def test_special_watches(server: FakeXenstored, store: XenStore) -> None:
    async with store.watch("@introduceDomain") as new, store.watch("@releaseDomain") as gone:
        assert await next_paths(new, 1) == ["@introduceDomain"]
        assert await next_paths(gone, 1) == ["@releaseDomain"]
        server.introduce(5)
        assert await next_paths(new, 1) == ["@introduceDomain"]
        server.introduce(5)
        server.shut_down(5)
        assert await next_paths(gone, 1) == ["@releaseDomain"]
        server.release(5)
        assert await next_paths(gone, 1) == ["@releaseDomain"]
        await no_more(new)
        await no_more(gone)


async def test_a_watch_that_is_refused(server: FakeXenstored, store: XenStore) -> None:
    server.faults.refuse = lambda request: "ENOSPC"
    with pytest.raises(StoreError, match="WATCH /w: ENOSPC"):
        async with store.watch("/w"):
            raise AssertionError
    with pytest.raises(StoreError, match="not a xenstore path"):
        async with store.watch("/w/"):
            raise AssertionError


async def test_an_error_in_the_body_of_a_watch(server: FakeXenstored, store: XenStore) -> None:
    with pytest.raises(KeyError):
        async with store.watch("/w"):
            raise KeyError
    assert server.connection.watches == []


async def test_ten_thousand_equal_events_are_one(server: FakeXenstored, store: XenStore) -> None:
    async with store.watch("/w") as events, store.watch("/other") as other:
        assert await next_paths(events, 1) == ["/w"]
        assert await next_paths(other, 1) == ["/other"]
        token = server.connection.watches[0].token
        payload = f"/w/a\0{token}\0".encode()
        event = xs.HEADER.pack(xs.WATCH_EVENT, 0, 0, len(payload)) + payload
        server.connection.send_raw(event * 10_000)
        server.write("/w/b", "")
        server.write("/other", "")
        assert await next_paths(other, 1) == ["/other"]  # nobody waits for a slow reader
        paths: list[str] = []
        while paths[-1:] != ["/w/b"]:
            paths += await next_paths(events, 1)
        assert paths in (["/w/a", "/w/b"], ["/w/a", "/w/a", "/w/b"])
        await no_more(events)


async def test_events_keep_the_order_of_their_first(server: FakeXenstored, store: XenStore) -> None:
    async with store.watch("/w") as events:
        assert await next_paths(events, 1) == ["/w"]
        server.write("/w/0", "")  # this one the pump takes out at once
        await wait_all_tasks_blocked()
        for n in (3, 1, 2, 3, 1, 0):
            server.write(f"/w/{n}", "")
        await wait_all_tasks_blocked()
        assert await next_paths(events, 5) == ["/w/0", "/w/3", "/w/1", "/w/2", "/w/0"]
        await no_more(events)


async def test_too_many_different_events_become_one(server: FakeXenstored, store: XenStore) -> None:
    async with store.watch("/w") as events:
        assert await next_paths(events, 1) == ["/w"]
        count = 10_000
        for n in range(count):
            server.write(f"/w/{n}", "")
        await store.read("/done")  # its answer comes after all events
        seen: list[str] = []
        while not seen or seen[-1] != f"/w/{count - 1}":
            seen += await next_paths(events, 1)
        assert len(seen) <= MAX_PENDING_EVENTS + 1
        assert "/w" in seen  # which speaks for all that are not named
        await no_more(events)


async def test_each_watch_fires_again_after_a_reconnect(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    async with store.watch("/v") as v, store.watch("@releaseDomain") as gone:
        assert await next_paths(v, 1) == ["/v"]
        assert await next_paths(gone, 1) == ["@releaseDomain"]
        server.stop()
        await wait_all_tasks_blocked()
        server.start(fresh=True)
        assert await next_paths(v, 1) == ["/v"]
        assert await next_paths(gone, 1) == ["@releaseDomain"]
        server.write("/v/a", "")
        assert await next_paths(v, 1) == ["/v/a"]
        await no_more(v)
        await no_more(gone)
    assert server.connection.watches == []


async def test_many_watches_are_set_again(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    count = 3 * MAX_IN_FLIGHT
    ready = trio.Event()
    nr_ready = 0

    async def watch(n: int) -> None:
        nonlocal nr_ready
        async with store.watch(f"/{n}") as events:
            assert await next_paths(events, 1) == [f"/{n}"]
            nr_ready += 1
            if nr_ready == count:
                ready.set()
            assert await next_paths(events, 1) == [f"/{n}"]

    async with trio.open_nursery() as nursery:
        for n in range(count):
            nursery.start_soon(watch, n)
        await ready.wait()
        server.drop()
    assert server.connection.watches == []


async def test_a_watch_made_while_reconnecting_is_set_once(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    async with store.watch("/old") as old:
        assert await next_paths(old, 1) == ["/old"]
        server.stop()
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                async with store.watch("/new") as new:
                    assert await next_paths(new, 1) == ["/new"]
                    await no_more(new)

            nursery.start_soon(watch)
            await trio.sleep(1)
            server.start()
        assert await next_paths(old, 1) == ["/old"]
    assert server.connection.number == 2


async def test_watches_made_while_disconnected_are_set_once(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.stop()
    await wait_all_tasks_blocked()

    async def watch(n: int) -> None:
        async with store.watch(f"/{n}") as events:
            assert await next_paths(events, 1) == [f"/{n}"]

    async with trio.open_nursery() as nursery:
        for n in range(MAX_IN_FLIGHT):
            nursery.start_soon(watch, n)
        await trio.sleep(1)
        server.start()
    assert len(server.requests(xs.WATCH)) == MAX_IN_FLIGHT


async def test_watches_that_come_and_go_while_others_are_set_again(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    async with store.watch("/1") as first:
        assert await next_paths(first, 1) == ["/1"]
        server.stop()
        await wait_all_tasks_blocked()
        server.faults.silent = lambda request: request.strings[:2] == ("/1", "xshmd/1")
        async with contextlib.AsyncExitStack() as stack, trio.open_nursery() as nursery:
            leave = trio.Event()

            async def stay() -> None:
                events = await stack.enter_async_context(store.watch("/2"))
                assert await next_paths(events, 1) == ["/2"]
                leave.set()

            nursery.start_soon(stay)
            await trio.sleep(1)
            server.start()
            await leave.wait()
            server.faults.silent = xs.nothing
            server.answer_held()
            await trio.sleep(1)
        assert await store.read("/x") is None
    assert server.connection.number == 2
    assert [request.path for request in server.requests(xs.WATCH)].count("/2") == 1


async def test_a_watch_left_while_others_are_set_again(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    async with store.watch("/1") as first:
        assert await next_paths(first, 1) == ["/1"]
        async with store.watch("/2") as second:
            assert await next_paths(second, 1) == ["/2"]
            server.faults.silent = only(xs.WATCH)
            server.drop()
            await trio.sleep(1)
            assert [r.path for r in server.log if r.connection == 2] == ["/1"]
        server.faults.silent = xs.nothing
        server.answer_held()
        await trio.sleep(1)
        assert [watch.path for watch in server.connection.watches] == ["/1"]


async def test_a_watch_that_is_set_and_lost_at_one_stroke(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.faults.deaf = only(xs.WATCH)

    async def watch() -> None:
        with pytest.raises(StoreLost, match="WATCH /w"):
            async with store.watch("/w"):
                raise AssertionError

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await wait_all_tasks_blocked()
        answer = xs.HEADER.pack(xs.WATCH, server.log[0].rq_id, 0, 3) + b"OK\0"
        server.connection.send_raw(answer + xs.HEADER.pack(99, 0, 0, 0))


async def test_a_watch_left_while_disconnected(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    start = trio.current_time()
    async with store.watch("/w"):
        server.stop()
        await wait_all_tasks_blocked()
    assert trio.current_time() == start
    server.start()
    assert await store.read("/a") is None
    assert server.connection.watches == []


async def test_a_watch_whose_connection_is_lost_meanwhile(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.faults.drop_after = only(xs.WATCH)
    with pytest.raises(StoreLost, match="WATCH /w"):
        async with store.watch("/w"):
            raise AssertionError
    server.faults.drop_after = xs.nothing
    assert await store.read("/a") is None
    await wait_all_tasks_blocked()
    assert server.connection.watches == []


async def test_a_watch_that_cannot_be_set_again_is_tried_again(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    async with store.watch("/w") as events:
        assert await next_paths(events, 1) == ["/w"]
        server.faults.refuse = lambda request: "ENOMEM" if request.op == xs.WATCH else None
        server.drop()
        await trio.sleep(2)
        assert len(server.requests(xs.WATCH)) > 2
        server.faults.refuse = lambda request: None
        assert await next_paths(events, 1) == ["/w"]


async def test_a_cancelled_watch_leaves_none_behind(server: FakeXenstored, store: XenStore) -> None:
    server.faults.silent = only(xs.WATCH)

    async def watch() -> None:
        async with store.watch("/w"):
            raise AssertionError

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await wait_all_tasks_blocked()
        assert len(server.connection.watches) == 1
        nursery.cancel_scope.cancel()
    assert server.connection.watches == []


async def test_leaving_a_watch_is_bounded(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    with trio.CancelScope() as scope:
        async with store.watch("/w"):
            server.faults.deaf = everything
            scope.cancel()
            start = trio.current_time()
            await trio.lowlevel.checkpoint()
    assert trio.current_time() - start == pytest.approx(store_module.CLEANUP_S)


async def test_a_reader_that_closes_its_channel(server: FakeXenstored, store: XenStore) -> None:
    async with store.watch("/w") as events:
        events.close()
        server.write("/w/a", "")
        await wait_all_tasks_blocked()
    assert server.connection.watches == []


# Transactions.


async def test_a_transaction(server: FakeXenstored, store: XenStore) -> None:
    server.create_domain(7)
    server.write("/t/old", "1")

    async def body(transaction: StoreTransaction) -> str:
        value = await transaction.read("/t/old")
        await transaction.write("/t/new", f"{value}2")
        await transaction.remove("/t/old")
        await transaction.set_permissions("/t/new", ["n0", "r7"])
        assert await transaction.read("/t/old") is None
        assert await transaction.directory("/t") == ("new",)
        assert server.read("/t/new") is None
        return "result"

    async with store.watch("/t") as events:
        assert await next_paths(events, 1) == ["/t"]
        assert await store.transact(body) == "result"
        assert sorted(await next_paths(events, 2)) == ["/t/new", "/t/old"]
    assert server.below("/t") == {"/t": "", "/t/new": "12"}
    assert server.permissions("/t/new") == ("n0", "r7")
    assert server.connection.transactions == {}


async def test_a_conflict_runs_the_body_again(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.write("/n", "0")
    runs = 0

    async def increment(transaction: StoreTransaction) -> None:
        nonlocal runs
        runs += 1
        value = await transaction.read("/n")
        if runs <= 2:
            server.write("/n", "10")  # somebody else
        await transaction.write("/n", str(int(value or 0) + 1))

    await store.transact(increment)
    assert runs == 3
    assert server.read("/n") == "11"


async def test_concurrent_transactions_all_count(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.write("/n", "0")

    async def body(transaction: StoreTransaction) -> None:
        value = await transaction.read("/n")
        await transaction.write("/n", str(int(value or 0) + 1))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(store.transact, body)
    assert server.read("/n") == "5"


async def write_n(transaction: StoreTransaction) -> None:
    await transaction.write("/n", "1")


async def test_conflicts_end(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    server.faults.eagain = 10**6
    start = trio.current_time()
    with pytest.raises(TimedOut, match="/n conflicted") as caught:
        await store.transact(write_n)
    assert caught.value.facts == {"path": "/n"}
    assert len(server.requests(xs.TRANSACTION_END)) == store_module.MAX_COMMITS
    assert 0 < trio.current_time() - start < 5
    server.faults.eagain = store_module.MAX_COMMITS - 1
    await store.transact(write_n)
    assert server.read("/n") == "1"


async def test_an_exception_aborts(server: FakeXenstored, store: XenStore) -> None:
    async def body(transaction: StoreTransaction) -> None:
        await write_n(transaction)
        raise KeyError

    with pytest.raises(KeyError):
        await store.transact(body)
    assert server.requests(xs.TRANSACTION_END)[-1].payload == b"F\0"
    assert len(server.requests(xs.TRANSACTION_START)) == 1
    assert server.read("/n") is None
    assert server.connection.transactions == {}


async def test_cancelling_the_body_aborts(server: FakeXenstored, store: XenStore) -> None:
    with trio.CancelScope() as scope:

        async def body(transaction: StoreTransaction) -> None:
            await write_n(transaction)
            scope.cancel()
            await transaction.read("/n")

        await store.transact(body)
    assert scope.cancelled_caught
    assert server.requests(xs.TRANSACTION_END)[-1].payload == b"F\0"
    assert server.connection.transactions == {}


async def test_an_abort_is_bounded(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    async def body(transaction: StoreTransaction) -> None:
        server.faults.deaf = everything
        raise KeyError

    start = trio.current_time()
    with pytest.raises(KeyError):
        await store.transact(body)
    assert trio.current_time() - start == pytest.approx(store_module.CLEANUP_S)


async def test_a_start_that_is_answered_too_late_is_aborted(
    server: FakeXenstored, store: XenStore
) -> None:
    server.faults.silent = only(xs.TRANSACTION_START)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.transact, write_n)
        await wait_all_tasks_blocked()
        assert len(server.connection.transactions) == 1
        nursery.cancel_scope.cancel()
    server.answer_held()
    await wait_all_tasks_blocked()
    assert server.connection.transactions == {}
    assert server.read("/n") is None
    server.log.clear()
    server.faults.silent = everything
    async with trio.open_nursery() as nursery:  # and just the one slot came back
        for n in range(2 * MAX_IN_FLIGHT):
            nursery.start_soon(store.read, f"/{n}")
        await wait_all_tasks_blocked()
        assert len(server.log) == MAX_IN_FLIGHT
        server.answer_held()
        await wait_all_tasks_blocked()
        server.answer_held()


async def test_a_transaction_the_server_forgot_is_run_again(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    # As after a forced live update.  Within it every read finds nothing, which is not to be
    # believed, be it by the commit or by an exception.
    server.write("/n", "1")
    runs = 0

    async def body(transaction: StoreTransaction) -> None:
        nonlocal runs
        runs += 1
        if runs <= 2:
            server.connection.transactions.clear()
        value = await transaction.read("/n")
        if runs == 2 and value is None:
            raise KeyError
        if runs > 2:
            assert value == "1"
            await transaction.write("/n", "2")

    await store.transact(body)
    assert runs == 3
    assert server.read("/n") == "2"


async def test_a_conflict_within_the_body_runs_it_again(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    refusals = iter(["EAGAIN"])
    server.faults.refuse = lambda request: next(refusals, None) if request.op == xs.WRITE else None
    await store.transact(write_n)
    assert server.read("/n") == "1"


async def test_a_commit_that_is_refused(server: FakeXenstored, store: XenStore) -> None:
    server.faults.refuse = lambda r: "ENOSPC" if r.op == xs.TRANSACTION_END else None
    with pytest.raises(StoreError, match="ENOSPC") as caught:
        await store.transact(write_n)
    assert caught.value.facts["path"] == "/n"
    assert len(server.requests(xs.TRANSACTION_END)) == 1


async def test_a_transaction_does_not_move_to_another_connection(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore
) -> None:
    async def body(transaction: StoreTransaction) -> None:
        await transaction.write("/n", "1")
        server.drop()
        await trio.sleep(1)
        assert await store.read("/x") is None  # connected again
        with pytest.raises(StoreLost):
            await transaction.write("/n", "2")
        with pytest.raises(StoreLost):
            await transaction.read("/n")
        raise KeyError

    with pytest.raises(KeyError):
        await store.transact(body)
    assert [r.tx_id for r in server.log if r.connection == 2] == [0]


async def test_a_commit_whose_connection_is_lost(server: FakeXenstored, store: XenStore) -> None:
    server.faults.drop_after = only(xs.TRANSACTION_END)
    with pytest.raises(StoreLost):
        await store.transact(write_n)
    assert len(server.requests(xs.TRANSACTION_END)) == 1


async def test_a_transaction_is_not_used_after_its_end(store: XenStore) -> None:
    kept: list[StoreTransaction] = []

    async def body(transaction: StoreTransaction) -> None:
        kept.append(transaction)

    await store.transact(body)
    with pytest.raises(RuntimeError, match="ended"):
        await kept[0].read("/n")


# Cancelled anywhere, nothing is left behind.


@pytest.mark.parametrize("cut", range(0, 40))
async def test_cancelled_at_the_nth_checkpoint(
    server: FakeXenstored, store: XenStore, cut: int
) -> None:
    async def work() -> None:
        async with store.watch("/w") as events:
            await events.receive()
            await store.transact(write_n)
            await store.write_many([("/a", "1"), ("/b", "2")])
            await store.read_many(["/a", "/b"])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        for _ in range(cut):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    await wait_all_tasks_blocked()
    assert server.connection.watches == []
    assert server.connection.transactions == {}
    assert await store.read_many([f"/{n}" for n in range(2 * MAX_IN_FLIGHT)])
    assert server.connection.number == 1


@pytest.mark.parametrize("cut", range(1, 12))
async def test_dropped_at_the_nth_request(
    autojump_clock: MockClock, server: FakeXenstored, store: XenStore, cut: int
) -> None:
    server.faults.drop_before = lambda request: len(server.log) == cut
    with contextlib.suppress(StoreLost):
        async with store.watch("/w") as events:
            await events.receive()
            await store.transact(write_n)
            await store.write_many([("/a", "1"), ("/b", "2")])
            await store.read_many(["/a", "/b"])
    server.faults.drop_before = xs.nothing
    assert await store.read("/x") is None
    await wait_all_tasks_blocked()
    assert server.connection.watches == []
    assert server.connection.transactions == {}
