# SPDX-License-Identifier: LGPL-2.1-or-later
"""A front-end that sends whatever it likes, and a guest that writes whatever it likes into a queue.

An input is a connection: before each message a byte that says which descriptors come with it, and
how many.  Whatever it is, not one descriptor may be left, and no frame mapped that is not there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Final

from fakes.xen_devices import XenDevices

from xshmd.units import DomId, Gfn
from xshmd.vhost_user import wire
from xshmd.vhost_user.memory import CannotMap, Memory
from xshmd.vhost_user.session import Session
from xshmd.vhost_user.virtqueue import Chain, read_all, write_all
from xshmd.vhost_user.wire import (
    Inbox,
    MemoryRegion,
    Message,
    ProtocolViolation,
    Request,
    VringAddress,
    VringState,
)
from xshmd.xen.windows import Window

PAGE: Final = 4096
AT: Final = 0x3A000000
HOLDER: Final = DomId(5)
_NOT_READ: Final = 16
"""Messages of one input: more of the same finds nothing more."""


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
        self.window = Window(8 * PAGE)
        self.window.place(self._memory)

    def open(self, kind: int) -> int:
        kinds = (self._memory, self._device, self._event, self._empty)
        return os.dup(kinds[kind % len(kinds)])


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
    for _ in range(_NOT_READ):
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
        (Request.SET_MEM_TABLE, wire.encode_table([region], xen=False), (world.open(0),)),
        (Request.SET_VRING_NUM, wire.encode_state(state), ()),
        (Request.SET_VRING_ADDR, wire.encode_address(where), ()),
        (Request.SET_VRING_KICK, wire.encode_u64(wire.VRING_NO_FD), ()),
        (Request.SET_VRING_ENABLE, wire.encode_state(state), ()),
    ):
        session.handle(Message(request, payload, fds))
    # A request may write into the ring and offer itself again, for ever: not in one go.
    for _ in range(4):
        assert session.process(0) <= 8
    session.close()
    assert _next_fd() == before, "a descriptor is left"
