# SPDX-License-Identifier: LGPL-2.1-or-later
"""A front-end that sends whatever it likes, and a guest that writes whatever it likes into a queue.

An input is a connection: before each message a byte that says which descriptors come with it, and
how many.  Whatever it is, not one descriptor may be left, no frame mapped that is not there, and
another front-end of the same back-end must not notice.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import os
import select
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fakes.xen_devices import XenDevices

from xshmd.units import DomId, Gfn
from xshmd.vhost_user import payloads, wire
from xshmd.vhost_user.backend import Backend
from xshmd.vhost_user.channel import Channel
from xshmd.vhost_user.memory import CannotMap, Memory
from xshmd.vhost_user.payloads import MemoryRegion, VringAddress, VringState
from xshmd.vhost_user.session import Session
from xshmd.vhost_user.virtqueue import Chain, read_all, write_all
from xshmd.vhost_user.wire import Inbox, Message, ProtocolViolation, Request
from xshmd.xen.windows import Window

PAGE: Final = 4096
AT: Final = 0x3A000000
HOLDER: Final = DomId(5)
MAX_MESSAGES: Final = 64
"""Of one input."""


class _Echo:
    features = 0
    queue_count = 2

    def config(self) -> bytes:
        return b"config"

    def handle(self, memory: Memory, queue: int, chain: Chain) -> int:
        data = read_all(memory, chain.readable)
        write_all(memory, chain.writable, data)
        return min(len(data), chain.writable_bytes)


class _World:
    """What descriptors there are to be sent, made once."""

    def __init__(self) -> None:
        self.devices = XenDevices()
        self.devices.put(HOLDER, Gfn(AT >> 12), 8)
        self._memory = os.memfd_create("memory")
        os.ftruncate(self._memory, 8 * PAGE)
        self._device = self.devices.open(HOLDER)
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._empty = os.memfd_create("empty")
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        read, self._broken = os.pipe2(os.O_CLOEXEC)
        os.close(read)
        self._epoll = select.epoll()
        self.window = Window(8 * PAGE)
        self.window.place(self._memory)

    def open(self, kind: int) -> int:
        kinds = (
            self._memory, self._device, self._event, self._empty, self._read, self._write,
            self._broken, self._epoll.fileno(),
        )  # fmt: skip
        return os.dup(kinds[kind % len(kinds)])

    def wake(self) -> None:
        """Signal every event that was sent."""
        for fd in (self._event, self._write):
            with contextlib.suppress(BlockingIOError):
                os.write(fd, (1).to_bytes(8, sys.byteorder))


class _Loop:
    """A back-end whose loop runs as far as there is anything to do, and a front-end that is good.

    It is never told to stop: what a connection left behind the next would meet.
    """

    def __init__(self, world: _World) -> None:
        self.said: list[str] = []
        self.backend = Backend(
            _Echo, self.said.append,
            memory=lambda: Memory(max_xen_bytes=8 * PAGE, devices=world.devices),
        )  # fmt: skip
        self._good = Channel(self.connect())

    def connect(self) -> socket.socket:
        """Return the front-end's end of a new connection."""
        ours, theirs = socket.socketpair()
        self.backend.add(theirs)
        return ours

    def ask(self) -> None:
        """Have the good one's question answered."""
        self._good.send(Message(Request.GET_QUEUE_NUM))
        self.backend.turn(0)
        reply = self._good.receive_some()
        assert reply is not None
        assert payloads.decode_u64(reply.payload) == _Echo.queue_count


handled = [0]
"""How many messages there have been so far."""
_made: list[tuple[_World, _Loop]] = []


def _there() -> tuple[_World, _Loop]:
    if not _made:
        world = _World()
        _made.append((world, _Loop(world)))
    return _made[0]


def _open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def vhost_user(data: bytes) -> None:
    """What a front-end sends, message by message, with what descriptors it likes."""
    world, _ = _there()
    before = _open_fds()
    session = Session(_Echo(), Memory(max_xen_bytes=8 * PAGE, devices=world.devices))
    inbox = Inbox()
    with contextlib.suppress(ProtocolViolation, CannotMap):
        _converse(data, session, inbox, world.open)
    for fd in inbox.abandon():
        os.close(fd)
    session.close()
    assert _open_fds() == before, "a descriptor is left"


def through_the_loop(data: bytes) -> None:
    """The same through a socket, whole messages at a time, while events are signalled."""
    world, loop = _there()
    before = _open_fds()
    with contextlib.closing(loop.connect()) as hostile, contextlib.suppress(BrokenPipeError):
        hostile.setblocking(False)
        at = 0
        for _ in range(MAX_MESSAGES):
            header = data[at + 1 : at + 1 + wire.HEADER.size]
            if len(header) < wire.HEADER.size:
                hostile.send(header or b"\0")
                break
            size = min(wire.HEADER.unpack(header)[2], wire.MAX_PAYLOAD_BYTES)
            message = data[at + 1 : at + 1 + wire.HEADER.size + size]
            fds = [world.open(data[at] >> 4) for _ in range(data[at] & 0xF)]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                hostile.sendmsg([message], rights)
            finally:
                for fd in fds:
                    os.close(fd)
            at += 1 + len(message)
            handled[0] += 1
            world.wake()
            loop.backend.turn(0)
            loop.ask()
    while loop.backend.connection_count > 1:
        loop.backend.turn(0)
    loop.ask()
    assert len(loop.said) == 1, "one sentence for each connection"
    loop.said.clear()
    assert _open_fds() == before, "a descriptor is left"


def _converse(data: bytes, session: Session, inbox: Inbox, open_fd: Callable[[int], int]) -> None:
    at = 0
    for _ in range(MAX_MESSAGES):
        if at + 1 >= len(data):
            return
        control = data[at]
        at += 1
        fds = [open_fd(control >> 4) for _ in range(control & 0xF)]
        message = None
        while message is None and at < len(data):
            piece = data[at : at + inbox.wanted]
            at += len(piece)
            message = inbox.feed(piece, fds)
            fds = []
        if message is None:
            return
        handled[0] += 1
        reply = session.handle(message)
        if reply is not None:
            wire.decode_header(wire.encode(reply)[: wire.HEADER.size])
            assert reply.request == message.request
        assert session.process(0) >= 0


def virtqueue(data: bytes) -> None:
    """What a guest writes into its memory, the rings of a queue among it."""
    world, _ = _there()
    before = _open_fds()
    view = world.window.view()
    view[:] = data[: len(view)].ljust(len(view), b"\0")
    session = Session(_Echo(), Memory())
    region = MemoryRegion(guest_address=AT, size_bytes=8 * PAGE, user_address=AT)
    where = VringAddress(index=0, descriptors=AT, available=AT + 256, used=AT + 512)
    state = VringState(0, 8)
    for request, payload, fds in (
        (Request.SET_MEM_TABLE, payloads.encode_table([region], xen=False), (world.open(0),)),
        (Request.SET_VRING_NUM, payloads.encode_state(state), ()),
        (Request.SET_VRING_ADDR, payloads.encode_address(where), ()),
        (Request.SET_VRING_KICK, payloads.encode_u64(wire.VRING_NO_FD), ()),
        (Request.SET_VRING_ENABLE, payloads.encode_state(state), ()),
    ):
        session.handle(Message(request, payload, fds))
    # A request may write into the ring and offer itself again, for ever: not in one go.
    for _ in range(4):
        assert session.process(0) <= 8
    session.close()
    assert _open_fds() == before, "a descriptor is left"


def main() -> int:
    """``make fuzz-vhost-user``: as many messages as asked, and what became of them."""
    from fuzz.mutate import mutated
    from fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="fuzz.vhost_user", description=main.__doc__)
    parser.add_argument("--messages", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first input")
    parser.add_argument(
        "--loop", action="store_true", help="by a socket and beside another: takes far longer"
    )
    options = parser.parse_args()
    run = through_the_loop if options.loop else vhost_user
    target = TARGETS["vhost-user"]
    corpus = target.corpus()
    run(b"")
    fds, mapped, began = _open_fds(), _mapped_kib(), time.monotonic()
    seed = options.seed
    while handled[0] < options.messages:
        try:
            run(mutated(corpus, target.words, seed))
        except BaseException as problem:
            problem.add_note(f"seed {seed}")
            raise
        seed += 1
    print(
        f"{handled[0]} messages on {seed - options.seed} connections in "
        f"{time.monotonic() - began:.0f} s; file descriptors: {fds} before, "
        f"{_open_fds()} after; mapped: {mapped} KiB before, "
        f"{_mapped_kib()} KiB after"
    )
    return 0


def _mapped_kib() -> int:
    """How much of the devices' memory is mapped here."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = (line.split()[0].split("-") for line in lines if "/memfd:" in line)
    return sum(int(end, 16) - int(start, 16) for start, end in spans) >> 10


if __name__ == "__main__":
    sys.exit(main())
