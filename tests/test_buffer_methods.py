# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients' hypercall buffers over real sockets: each its own, and gone when it is.

Hypercalls are the fake's; ``contract/buffers.py`` shows them on Xen.
"""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from fakes.hypercalls import EXTRA_VERSION, SimulatedCalls
from varlink_fakes import FakeRegions, limits

from xshmd.daemon.buffer_methods import BufferMethods
from xshmd.daemon.service import dispatcher
from xshmd.errors import NoSuchBuffer
from xshmd.units import PAGE_SIZE
from xshmd.varlink import caller, wire
from xshmd.varlink.dispatch import Method
from xshmd.varlink.peer import Peer
from xshmd.varlink.server import open_listener, serve

GUARD_S = 60


class Client:
    """One connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._decoder = wire.Decoder(wire.MAX_LARGE_CALL_BYTES)

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return what comes back; an error comes under ``error``."""
        call = wire.Call(f"io.xshmd.Regions.{method}", parameters)
        await self.stream.send_all(wire.encode_call(call))
        while (message := self._decoder.next_message()) is None:
            self._decoder.feed(await self.stream.receive_some(65536))
        reply = wire.parse_reply(message)
        if reply.error:
            return {"error": reply.error.rpartition(".")[2]}
        return dict(reply.parameters)

    async def memory(self, nr_pages: int = 1, nr_bytes: int = 1024) -> int:
        buffer = (await self.ask("AllocateBuffer", pageCount=nr_pages))["buffer"]
        reply = await self.ask("AllocateMemory", buffer=buffer, byteCount=nr_bytes)
        return int(reply["reference"])

    async def read(self, reference: int, offset: int, count: int) -> bytes:
        reply = await self.ask(
            "ReadMemory", reference=reference, offsetBytes=offset, byteCount=count
        )
        return base64.b64decode(reply["data"])


class Served:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls = SimulatedCalls()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with await trio.open_unix_socket(str(self.path)) as stream:
            yield Client(stream)

    async def until_free(self) -> None:
        """Return once no buffer is left."""
        while self.calls.buffers.nr_buffers:  # noqa: ASYNC110 - no event says so
            await trio.sleep(0.001)
        assert self.calls.memory.pages == {}


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    served = Served(tmp_path / "socket")
    methods = BufferMethods(served.calls)
    listener = open_listener(served.path, environ={})
    with trio.fail_after(GUARD_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(methods.run)

            async def start(
                task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
            ) -> None:
                served_by = dispatcher(FakeRegions(), methods)
                await serve(listener, served_by, limits=limits(), task_status=task_status)

            await nursery.start(start)
            yield served
            nursery.cancel_scope.cancel()


async def test_a_client_makes_a_hypercall_of_its_own(served: Served) -> None:
    async with served.client() as client:
        reference = await client.memory()
        data = base64.b64encode(b"filled").decode()
        assert await client.ask("WriteMemory", reference=reference, offsetBytes=9, data=data) == {}
        assert await client.read(reference, 8, 8) == b"\0filled\0"
        asked = await client.ask("CallXen", call="extraversion", reference=reference)
        assert asked == {"result": 0}
        assert (await client.read(reference, 0, 16)).rstrip(b"\0") == EXTRA_VERSION
        assert await client.ask("CallXen", call="page_size") == {"result": PAGE_SIZE}
        counters = (await client.ask("Status"))["status"]["counters"]
        assert (counters["buffers"], counters["buffer_pages"]) == (1, 1)
        assert await client.ask("FreeMemory", reference=reference) == {}
        assert await client.ask("FreeBuffer", buffer=reference >> 32) == {}
        assert served.calls.memory.pages == {}


@pytest.mark.parametrize(
    ("method", "parameters", "error"),
    [
        ("AllocateBuffer", {"pageCount": 0}, "OutOfRange"),
        ("AllocateBuffer", {"pageCount": 257}, "QuotaExceeded"),
        ("AllocateMemory", {"buffer": 99, "byteCount": 1}, "NoSuchBuffer"),
        ("FreeBuffer", {"buffer": -1}, "NoSuchBuffer"),
        ("FreeMemory", {"reference": 1 << 62}, "NoSuchBuffer"),
        ("ReadMemory", {"reference": "own", "offsetBytes": 1000, "byteCount": 25}, "OutOfRange"),
        ("ReadMemory", {"reference": "own", "offsetBytes": 0, "byteCount": 1 << 20},
         "InvalidParameter"),
        ("WriteMemory", {"reference": "own", "offsetBytes": 0, "data": "?"}, "InvalidParameter"),
        ("WriteMemory", {"reference": "own", "offsetBytes": 1023, "data": "YWI="}, "OutOfRange"),
        ("CallXen", {"call": "features"}, "InvalidArgument"),
        ("CallXen", {"call": "domctl", "reference": "own"}, "InvalidParameter"),
        ("CallXen", {"call": "features", "reference": "foreign"}, "ForeignBuffer"),
        ("FreeBuffer", {"buffer": "foreign"}, "ForeignBuffer"),
        ("FreeMemory", {"reference": "freed"}, "AlreadyFreed"),
    ],
)  # fmt: skip
async def test_each_error_has_its_name(
    served: Served, method: str, parameters: dict[str, Any], error: str
) -> None:
    async with served.client() as client, served.client() as other:
        references = {"own": await client.memory(), "foreign": await other.memory()}
        references["freed"] = await client.memory()
        await client.ask("FreeMemory", reference=references["freed"])
        given = dict(parameters)
        for name, value in parameters.items():
            if value in references:
                given[name] = references[value] >> (32 if name == "buffer" else 0)
        assert await client.ask(method, **given) == {"error": error}


async def test_a_client_that_hangs_up_leaves_nothing(served: Served) -> None:
    async with served.client() as stays:
        kept = await stays.memory(3)
        async with served.client() as client:
            await client.memory(2)
            await client.memory(2)
        while served.calls.buffers.nr_buffers > 1:  # noqa: ASYNC110 - no event says so
            await trio.sleep(0.001)
        assert await stays.read(kept, 0, 4) == bytes(4)
    await served.until_free()


async def test_a_client_that_never_had_a_buffer_costs_none(served: Served) -> None:
    async with served.client() as client:
        assert await client.ask("FreeBuffer", buffer=1) == {"error": "NoSuchBuffer"}
    await served.until_free()


CHILD_KEEPS_THE_CONNECTION = """
import os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
call = b'{"method":"io.xshmd.Regions.AllocateBuffer","parameters":{"pageCount":2}}'
connection.sendall(call + bytes(1))
assert b"buffer" in connection.recv(4096)
if os.fork() == 0:
    sys.stdin.read()  # until the test lets go, with the connection open
    os._exit(0)
os._exit(0)
"""


async def test_a_process_that_dies_leaves_nothing_though_its_child_has_the_connection(
    served: Served,
) -> None:
    read, write = os.pipe()
    try:
        command = [sys.executable, "-c", CHILD_KEEPS_THE_CONNECTION, str(served.path)]
        await trio.run_process(command, stdin=read)
        await served.until_free()
    finally:
        os.close(read)
        os.close(write)


async def test_a_process_that_is_gone_already_has_none(served: Served) -> None:
    def gone() -> int:
        raise ProcessLookupError

    allocate = BufferMethods(served.calls).methods()["AllocateBuffer"]
    assert isinstance(allocate, Method)
    client = caller.Caller(Peer(pid=1, uid=0), gone)
    with client.serving(), pytest.raises(NoSuchBuffer, match="client 1 has ended"):
        await allocate.run({"pageCount": 1})
    assert served.calls.memory.pages == {}
