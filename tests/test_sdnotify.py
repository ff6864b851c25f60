# SPDX-License-Identifier: LGPL-2.1-or-later
"""What systemd is told, and that the watchdog is fed by the reconciler alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from fakes.world import world
from trio.testing import MockClock

from xshmd.daemon.app import feed_watchdog
from xshmd.daemon.sdnotify import Notifier

WATCHDOG_S = 60.0


class Manager:
    """systemd's end."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(str(path))

    def heard(self) -> list[str]:
        found = []
        while True:
            try:
                found.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return found


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", str(int(WATCHDOG_S * 1e6)))
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    yield manager
    manager.socket.close()


async def test_the_watchdog_is_fed_while_the_reconciler_comes_round(
    manager: Manager, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    notifier = Notifier()
    assert notifier.watchdog_s == WATCHDOG_S
    async with world() as host:
        daemon = await host.start()
        nursery.start_soon(feed_watchdog, notifier, daemon.engine)
        for _ in range(10):
            await trio.sleep(WATCHDOG_S)
            heard = manager.heard()
            assert len(heard) >= 2  # one may be lost
            assert set(heard) == {"WATCHDOG=1\nSTATUS=0 regions, 0 guests"}
        # Whatever the one writer is stuck in; all else of the daemon goes on.
        daemon.engine._loop.put(trio.sleep_forever)
        await trio.sleep(WATCHDOG_S)
        manager.heard()
        await trio.sleep(10 * WATCHDOG_S)
        assert manager.heard() == []
        nursery.cancel_scope.cancel()


def test_a_manager_that_is_not_there_is_no_harm(manager: Manager) -> None:
    notifier = Notifier()
    manager.socket.close()
    notifier.send("READY=1")


def test_a_manager_that_does_not_read_holds_nobody_up(manager: Manager) -> None:
    notifier = Notifier()
    for _ in range(2000):
        notifier.send("WATCHDOG=1")
    assert 0 < len(manager.heard()) < 2000
    notifier.send("READY=1")
    assert manager.heard() == ["READY=1"]


def test_a_watchdog_for_another_process_is_not_ours(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert Notifier().watchdog_s == 0
    assert "NOTIFY_SOCKET" not in os.environ
