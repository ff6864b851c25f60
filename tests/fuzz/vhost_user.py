# SPDX-License-Identifier: LGPL-2.1-or-later
"""A front-end that sends whatever it likes, and a guest that writes whatever it likes into a queue.

An input is a connection: before each message a byte that says which descriptors come with it, and
how many.  Whatever it is, not one descriptor may be left, and no frame mapped that is not there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fakes.xen_devices import XenDevices

from xshmd.units import DomId, Gfn
from xshmd.vhost_user import payloads, wire
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
        self._read, self._write = os.pipe2(os.O_CLOEXEC)
        self._epoll = select.epoll()
        self.window = Window(8 * PAGE)
        self.window.place(self._memory)

    def open(self, kind: int) -> int:
        kinds = (
            self._memory, self._device, self._event, self._empty, self._read, self._write,
            self._epoll.fileno(),
        )  # fmt: skip
        return os.dup(kinds[kind % len(kinds)])


handled = [0]
"""How many messages there have been so far."""
_made: list[_World] = []


def _world() -> _World:
    if not _made:
        _made.append(_World())
    return _made[0]


def _next_fd() -> int:
    """The number the next descriptor will have: the lowest that is free."""
    fd = os.dup(0)
    os.close(fd)
    return fd


def vhost_user(data: bytes) -> None:
    """What a front-end sends, message by message, with what descriptors it likes."""
    world = _world()
    before = _next_fd()
    session = Session(_Echo(), Memory(max_xen_bytes=8 * PAGE, devices=world.devices))
    inbox = Inbox()
    with contextlib.suppress(ProtocolViolation, CannotMap):
        _converse(data, session, inbox, world.open)
    for fd in inbox.abandon():
        os.close(fd)
    session.close()
    assert _next_fd() == before, "a descriptor is left"


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
    world = _world()
    before = _next_fd()
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
    assert _next_fd() == before, "a descriptor is left"


def main() -> int:
    """``make fuzz-vhost-user``: as many messages as asked, and what became of them."""
    from fuzz.mutate import mutated
    from fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="fuzz.vhost_user", description=main.__doc__)
    parser.add_argument("--messages", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first input")
    options = parser.parse_args()
    target = TARGETS["vhost-user"]
    corpus = target.corpus()
    vhost_user(b"")
    fds, mapped, began = len(os.listdir("/proc/self/fd")), _mapped_kib(), time.monotonic()
    seed = options.seed
    while handled[0] < options.messages:
        try:
            vhost_user(mutated(corpus, target.words, seed))
        except BaseException as problem:
            problem.add_note(f"seed {seed}")
            raise
        seed += 1
    print(
        f"{handled[0]} messages on {seed - options.seed} connections in "
        f"{time.monotonic() - began:.0f} s; file descriptors: {fds} before, "
        f"{len(os.listdir('/proc/self/fd'))} after; mapped: {mapped} KiB before, "
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
