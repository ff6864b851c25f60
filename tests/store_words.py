# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from fakes.xenstored import FakeXenstored, fake_xenstored
from trio.testing import wait_all_tasks_blocked

from xshmd.ports import WatchEvent
from xshmd.xen.store import XenStore, open_store

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
