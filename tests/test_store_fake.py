# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fake against what tools/xenstored says of itself."""

from __future__ import annotations

import pytest
import trio
from fakes import xenstored as xs
from fakes.xenstore_tree import Match, Node, Permission, Transaction, Tree, XsError


class Recorder:
    def __init__(self) -> None:
        self.events: list[tuple[str, Match]] = []
        self.tree = Tree(self._fire)

    def _fire(self, path: str, match: Match, node: Node | None) -> None:
        self.events.append((path, match))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def tree(recorder: Recorder) -> Tree:
    for name in "AB":
        recorder.tree.write(f"/{name}", b"I")
    recorder.events.clear()
    return recorder.tree


def refusal(tree: Tree, tx: Transaction) -> str:
    try:
        tree.commit(tx)
    except XsError as exc:
        return str(exc)
    return ""


# The four examples at the top of transaction.c.


def test_example_1_simple(tree: Tree) -> None:
    tx = Transaction()
    tree.read("/A", tx=tx)
    tree.write("/B", b"1", tx=tx)
    assert tree.read("/B") == b"I"
    assert refusal(tree, tx) == ""
    assert tree.read("/B") == b"1"


def test_example_2_conflicting_write(tree: Tree) -> None:
    tx = Transaction()
    tree.read("/A", tx=tx)
    tree.write("/A", b"other")
    tree.write("/B", b"1", tx=tx)
    assert refusal(tree, tx) == "EAGAIN"
    assert tree.read("/B") == b"I"


def test_example_3_conflicting_delete(tree: Tree) -> None:
    tx = Transaction()
    tree.read("/A", tx=tx)
    tree.remove("/A")
    tree.write("/B", b"1", tx=tx)
    assert refusal(tree, tx) == "EAGAIN"


def test_example_4_interfering(tree: Tree) -> None:
    one, two = Transaction(), Transaction()
    tree.read("/A", tx=one)
    tree.read("/B", tx=two)
    tree.write("/B", b"1", tx=one)
    tree.write("/A", b"2", tx=two)
    assert refusal(tree, one) == ""
    assert refusal(tree, two) == "EAGAIN"


def test_unrelated_writes_do_not_conflict(tree: Tree) -> None:
    tx = Transaction()
    tree.write("/A", b"1", tx=tx)
    tree.write("/B", b"other")
    assert refusal(tree, tx) == ""


def test_new_children_of_one_parent_conflict(tree: Tree) -> None:
    # construct_node reads and writes the parent, whose list of children it is.
    tx = Transaction()
    tree.write("/A/x", b"1", tx=tx)
    tree.write("/A/y", b"other")
    assert refusal(tree, tx) == "EAGAIN"


def test_a_miss_conflicts_with_the_creation(tree: Tree) -> None:
    tx = Transaction()
    with pytest.raises(XsError, match="ENOENT"):
        tree.read("/new", tx=tx)
    tree.write("/new", b"other")
    assert refusal(tree, tx) == "EAGAIN"


def test_made_and_removed_in_one_transaction(recorder: Recorder, tree: Tree) -> None:
    tx = Transaction()
    tree.write("/A/x", b"1", tx=tx)
    tree.remove("/A/x", tx=tx)
    assert refusal(tree, tx) == ""
    assert tree.nodes["/A"].children == ()
    assert "/A/x" not in tree.nodes


# Permissions.


def test_permissions_come_from_the_parent(tree: Tree) -> None:
    tree.domains |= {5, 6}
    tree.set_permissions("/A", ("n5", "r6"))
    tree.write("/A/x/y", b"")  # by dom0: what it makes below a guest's node is the guest's
    assert tree.permissions("/A/x/y") == ("n5", "r6")
    tree.set_permissions("/B", ("n0", "b5"))
    tree.write("/B/x", b"", domid=5)  # by a guest: its own
    assert tree.permissions("/B/x") == ("n5", "b5")


def test_what_a_guest_may(tree: Tree) -> None:
    tree.domains |= {5, 6}
    tree.set_permissions("/A", ("n0", "r5"))
    assert tree.read("/A", domid=5) == b"I"
    for refused in (
        lambda: tree.write("/A", b"", domid=5),
        lambda: tree.read("/A", domid=6),
        lambda: tree.read("/A/absent", domid=6),  # not even that it is absent
        lambda: tree.set_permissions("/A", ("n5",), domid=5),
    ):
        with pytest.raises(XsError, match="EACCES"):
            refused()
    with pytest.raises(XsError, match="ENOENT"):
        tree.read("/A/absent", domid=5)


def test_a_later_domain_of_the_same_number_inherits_nothing(tree: Tree) -> None:
    tree.set_permissions("/A", ("n0", "r5"))  # domain 5 does not exist yet
    assert tree.nodes["/A"].permissions[1] == Permission("r", 5, ignored=True)
    tree.domains.add(5)
    with pytest.raises(XsError, match="EACCES"):
        tree.read("/A", domid=5)


def test_the_end_of_a_domain(recorder: Recorder, tree: Tree) -> None:
    tree.domains.add(5)
    tree.write("/A/x/y", b"")
    tree.set_permissions("/A/x", ("n5",))
    tree.set_permissions("/B", ("n0", "r5"))
    recorder.events.clear()
    tree.forget_domain(5)
    assert tree.nodes["/A"].children == ()
    assert tree.permissions("/B") == ("n0",)
    assert recorder.events == [("/A/x/y", Match.EXACT), ("/A/x", Match.SUBTREE)]


# Events.


def test_only_the_node_written_is_an_event(recorder: Recorder, tree: Tree) -> None:
    tree.write("/A/x/y", b"")
    tree.mkdir("/A/x")
    tree.mkdir("/A/z")
    assert recorder.events == [("/A/x/y", Match.SUBTREE), ("/A/z", Match.SUBTREE)]


def test_a_transaction_fires_when_committed(recorder: Recorder, tree: Tree) -> None:
    tx = Transaction()
    tree.write("/A", b"1", tx=tx)
    tree.write("/A", b"2", tx=tx)
    assert recorder.events == []
    tree.commit(tx)
    assert recorder.events == [("/A", Match.SUBTREE)]


def test_the_root_is_not_removed(tree: Tree) -> None:
    with pytest.raises(XsError, match="EINVAL"):
        tree.remove("/")


async def test_a_frame_that_is_too_long_kills_the_connection() -> None:
    async with xs.fake_xenstored() as server:
        stream = await trio.open_unix_socket(str(server.path))
        async with stream:
            await stream.send_all(xs.HEADER.pack(xs.READ, 1, 0, 4097))
            assert await stream.receive_some(1) == b""


async def test_the_first_event_follows_the_answer_and_others_precede_theirs() -> None:
    async with xs.fake_xenstored() as server:
        stream = await trio.open_unix_socket(str(server.path))
        async with stream:
            requests = ((xs.WATCH, b"/w\0t\0"), (xs.WRITE, b"/w\0v"), (99, b""))
            await stream.send_all(
                b"".join(xs.HEADER.pack(op, 7, 0, len(body)) + body for op, body in requests)
            )
            expected = [
                (xs.WATCH, b"OK\0"),
                (xs.WATCH_EVENT, b"/w\0t\0"),  # the write's own is still waiting: sent once
                (xs.WRITE, b"OK\0"),
                (xs.ERROR, b"ENOSYS\0"),
            ]
            received = b""
            while len(received) < sum(16 + len(payload) for _, payload in expected):
                received += await stream.receive_some(4096)
            for op, payload in expected:
                assert xs.HEADER.unpack_from(received)[0] == op
                assert received[16 : 16 + len(payload)] == payload
                received = received[16 + len(payload) :]
            assert received == b""
