# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program of dom0 that sees to what guests exchange, by the library, over a real socket.

What is behind the socket is the product's but for the memory: two guests' parts of six frames.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from scatter_words import Toy
from varlink_fakes import FakeRegions, limits

from xshmd import client
from xshmd.client import on_trio
from xshmd.daemon.list_methods import ListMethods
from xshmd.daemon.service import dispatcher
from xshmd.errors import ListCancelled, NoSuchList, OutOfRange, TimedOut, UsageError
from xshmd.share.scatter import Scatter
from xshmd.varlink.server import open_listener, serve

PATIENCE_S = 60
SCATTER = Path(__file__).parents[1] / "docs" / "scatter.md"


class ToyRegions(FakeRegions):
    """What there is, is the toy's."""

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.now = toy.snapshot()


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[Toy]:
    toy = Toy()
    api = ToyRegions(toy)
    toy.scatter = Scatter(api, cast(Any, toy))
    methods = ListMethods(toy.scatter, toy.mediator)
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:

            async def start(task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
                listener = open_listener(path, environ={})
                await serve(
                    listener, dispatcher(api, methods), limits=limits(), task_status=task_status
                )

            await nursery.start(start)
            yield toy
            nursery.cancel_scope.cancel()


async def test_it_is_all_there(tmp_path: Path) -> None:
    def program(path: str) -> None:
        with client.connect(path) as xshmd:
            region = xshmd.region("r")
            posted = region.post_list("input", [(8, 4), (0, 4)], guest="b", count_offset_bytes=64)
            with pytest.raises(TimedOut):
                posted.wait(0)
            assert region.transfer("output", [(0, 6)], guest="a", peer="b") == 6
            assert posted.wait(0) == 6
            mine = region.post_list("output", [(100, 3)])
            assert region.transfer("input", [(40, 8)], guest="b", posted=mine) == 3
            other = region.post_list("input", [(0, 4)], guest="b")
            other.cancel()
            for error, late in ((ListCancelled, other.wait), (NoSuchList, other.cancel)):
                with pytest.raises(error):
                    late()
            with pytest.raises(OutOfRange):
                region.post_list("input", [(8190, 4)], guest="b")
            with pytest.raises(UsageError):
                region.transfer("sideways", [(0, 4)], guest="a", peer="b")

    async with served(tmp_path / "socket") as toy:
        before = bytes(toy.memory.data)
        await trio.to_thread.run_sync(program, str(tmp_path / "socket"))
        theirs = toy.memory.data[2 * 4096 :]
        assert theirs[8:12] == before[:4]
        assert theirs[:2] == before[4:6]
        assert theirs[64:72] == (6).to_bytes(8, "little")
        assert theirs[40:43] == before[100:103]


async def test_trio_waits_and_is_cancelled_while_it_does(tmp_path: Path) -> None:
    async with (
        served(tmp_path / "socket"),
        on_trio.connect(str(tmp_path / "socket")) as xshmd,
        trio.open_nursery() as nursery,
    ):
        region = await xshmd.region("r")
        posted = await region.post_list("input", [(0, 9)], guest="a")
        with trio.move_on_after(0.2) as scope:
            await posted.wait()
        assert scope.cancelled_caught
        moved: list[int] = []

        async def wait() -> None:
            moved.append(await posted.wait())

        nursery.start_soon(wait)
        assert await region.transfer("output", [(0, 5)], guest="b", peer="a") == 5
        while not moved:  # noqa: ASYNC110 - the nursery's task says nothing else
            await trio.sleep(0.01)
        assert moved == [5]
        other = await region.post_list("input", [(0, 9)], guest="a")
        await other.cancel()
        with pytest.raises(ListCancelled):
            await other.wait()
        assert repr(other) == f"<PostedList {other.list_id}>"
        with contextlib.suppress(NoSuchList):
            await other.cancel()


async def test_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of docs/scatter.md, as it stands but for the names."""
    (text,) = re.findall(r"```python\n(.*?)```", SCATTER.read_text(), re.S)
    for said, here in (("frames", "r"), ("control", "b"), ("sensor", "a")):
        assert f'"{said}"' in text
        text = text.replace(f'"{said}"', f'"{here}"')
    path = str(tmp_path / "socket")
    monkeypatch.setattr(client, "connect", functools.partial(client.connect, path))
    async with served(tmp_path / "socket"):
        await trio.to_thread.run_sync(exec, compile(text, "docs/scatter.md", "exec"), {})
    assert capsys.readouterr().out.endswith("512 bytes\n")
