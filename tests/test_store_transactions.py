# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import contextlib

import pytest
import trio
from fakes import xenstored as xs
from fakes.xenstored import FakeXenstored, everything, only
from store_words import next_paths
from trio.testing import MockClock, wait_all_tasks_blocked

from xshmd.errors import StoreError, StoreLost, TimedOut
from xshmd.ports import StoreTransaction
from xshmd.xen import store as store_module
from xshmd.xen.store import MAX_IN_FLIGHT, XenStore

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
