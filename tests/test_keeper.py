# SPDX-License-Identifier: LGPL-2.1-or-later
"""xshmd-keeper: the production server and client on a real socket, on the model of Xen."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.hypervisor import SimulatedXen

from xshmd.errors import Conflict, HypercallFailed, UsageError
from xshmd.keeper import wire
from xshmd.keeper.__main__ import listen, main, serve
from xshmd.keeper.client import KeeperClient
from xshmd.keeper.shelf import Shelf, ranges
from xshmd.units import PAGE_SIZE, DomId, Gfn, bytes_of

FIRST = Gfn(0x40200)
NR = 130
"""Frames, in more than one piece of a copy."""


@contextlib.contextmanager
def running(xen: SimulatedXen, path: Path) -> Iterator[None]:
    """A keeper that is ended with everything that it keeps."""
    shelf, listener = Shelf(xen), listen(path)

    def work() -> None:
        with contextlib.suppress(OSError, ValueError):
            serve(shelf, listener)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        assert not thread.is_alive()
        listener.close()
        shelf.close()


@pytest.fixture
def xen() -> SimulatedXen:
    return SimulatedXen(total_pages=1 << 16, dom0_pages=1 << 12)


@pytest.fixture
def holder(xen: SimulatedXen) -> DomId:
    domid = xen.create_holder_domain("11111111-2222-4333-8444-555555555555")
    xen.set_paging_pool_bytes(domid, bytes_of(64))
    xen.set_max_pages(domid, 2 * NR)
    xen.populate(domid, FIRST, NR)
    xen.populate(domid, Gfn(FIRST + 512), NR)
    return domid


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keeper" / "socket"


def test_pages_outlive_the_client_that_had_them_kept(
    xen: SimulatedXen, holder: DomId, path: Path
) -> None:
    with running(xen, path):
        client = KeeperClient(path)
        client.keep("old", holder, FIRST, NR)
        client.write("old", PAGE_SIZE - 3, b"across")
        client.keep("new", holder, Gfn(FIRST + 512), 100)
        client.keep("new", holder, Gfn(FIRST + 612), NR - 100)
        client.copy("new", "old", 0, NR)
        client.close()
        xen.depopulate(holder, FIRST, NR)
        other = KeeperClient(path)
        assert other.kept() == {"old": NR, "new": NR}
        assert other.read("old", PAGE_SIZE - 3, 6) == b"across"
        assert other.read("new", PAGE_SIZE - 4, 8) == b"\xa5across\xa5"
        assert len(xen.by_domid[holder].pages) == 2 * NR
        other.drop("old", wipe=True)
        assert xen.unwiped_frees == 0
        assert len(xen.by_domid[holder].pages) == NR
        assert other.kept() == {"new": NR}
        other.drop("never kept", wipe=True)
        other.close()


def test_what_is_wrong_comes_back_as_it_was(xen: SimulatedXen, holder: DomId, path: Path) -> None:
    with running(xen, path), contextlib.closing(KeeperClient(path)) as client:
        with pytest.raises(HypercallFailed) as caught:
            client.keep("r", holder, Gfn(0x99999), 1)
        assert (caught.value.call, caught.value.facts["domid"]) == ("xenforeignmemory_map", holder)
        client.keep("r", holder, FIRST, 2)
        for call in (
            lambda: client.read("r", PAGE_SIZE, PAGE_SIZE + 1),
            lambda: client.write("other", 0, b"x"),
            lambda: client.copy("r", "other", 0, 1),
        ):
            with pytest.raises(Conflict):
                call()
        assert client.kept() == {"r": 2}


def test_what_dom0_lends_is_the_keepers(xen: SimulatedXen, holder: DomId, path: Path) -> None:
    """The same references however often they are asked for, and what is in it goes along."""
    with running(xen, path), contextlib.closing(KeeperClient(path)) as client:
        client.park("before", "", 3)
        client.write("before", PAGE_SIZE - 3, b"across")
        told = client.lend("lent", "before", holder, 3, readonly=False)
        assert told == client.lend("lent", "gone by now", holder, 3, readonly=False) == [(8, 3)]
        entry = xen.by_domid[DomId(0)].grants[9]
        assert (entry.valid, entry.readonly, entry.domid) == (True, False, holder)
        assert client.read("lent", PAGE_SIZE - 3, 6) == b"across"
        client.drop("before", wipe=True)
        assert client.kept() == {"lent": 3}
        with pytest.raises(Conflict, match="keeps nothing as before"):
            client.lend("other", "before", holder, 2, readonly=True)
        assert client.kept() == {"lent": 3}, "nothing is left of what failed"
        client.park("after", "lent", 3)
        client.park("after", "lent", 3)
        client.drop("lent", wipe=True)
        assert xen.by_domid[DomId(0)].grants == {}
        assert xen.unwiped_frees == 0
        assert client.read("after", PAGE_SIZE - 3, 6) == b"across"
        client.drop("after", wipe=True)


def test_references_are_told_as_ranges() -> None:
    assert ranges([]) == []
    assert ranges([8, 9, 10, 12, 20, 21]) == [(8, 3), (12, 1), (20, 2)]


@pytest.mark.parametrize(
    "text",
    [b"\n", b"[]\n", b"{\n", b'{"call": "close"}\n', b'{"call": "keep", "name": 1}\n', b"\xff\n"],
)
def test_nonsense_is_refused_and_the_next_call_answered(
    xen: SimulatedXen, path: Path, text: bytes
) -> None:
    with running(xen, path), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(path))
        client.sendall(text)
        replies = client.makefile("rb")
        error = wire.error_from(wire.message(replies.readline())["error"])
        assert isinstance(error, UsageError)
        client.sendall(wire.line({"call": "kept"}))
        assert wire.message(replies.readline()) == {"reply": {}}
        replies.close()


def test_another_keeper_is_found_without_a_word(xen: SimulatedXen, path: Path) -> None:
    client = KeeperClient(path)
    with running(xen, path):
        assert client.kept() == {}
    with pytest.raises(Conflict, match="does not answer"):
        client.kept()
    client.drop("anything", wipe=True)
    with running(xen, path):
        assert client.kept() == {}
    client.close()


def test_only_root_reaches_it_and_there_is_one(
    xen: SimulatedXen,
    path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running(xen, path):
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        monkeypatch.setattr(
            "xshmd.keeper.__main__.XenHypervisor", lambda: contextlib.nullcontext(xen)
        )
        assert main(["--socket", str(path)]) == Conflict.exit_status
        assert "another xshmd-keeper answers" in capsys.readouterr().err
