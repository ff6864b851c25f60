# SPDX-License-Identifier: LGPL-2.1-or-later
"""The vhost-user wire without any I/O: bytes to messages and back.

The protocol is QEMU's docs/interop/vhost-user.rst.  Numbers are in the byte order of the machine,
since both ends are on it.  Whatever a peer sends that the protocol does not allow is a
:class:`ProtocolViolation`, which ends that connection and nothing else.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Sequence
from typing import Final

VERSION: Final = 1
VERSION_MASK: Final = 0x3
FLAG_REPLY: Final = 0x4
FLAG_NEED_REPLY: Final = 0x8
HEADER: Final = struct.Struct("=III")
"""request, flags, size of the payload in bytes."""
MAX_TABLE_REGIONS: Final = 8
"""Regions of a SET_MEM_TABLE, and file descriptors of any message, at the most."""
MAX_CONFIG_BYTES: Final = 256
"""VHOST_USER_MAX_CONFIG_SIZE."""
MAX_PAYLOAD_BYTES: Final = 8 + MAX_TABLE_REGIONS * 40
"""That of a full memory table for Xen.  What says it is longer is not read."""
VRING_INDEX_MASK: Final = 0xFF
VRING_NO_FD: Final = 0x100
"""In the payload of SET_VRING_KICK, CALL and ERR: no descriptor comes along, poll instead."""

VIRTIO_F_VERSION_1: Final = 1 << 32
VHOST_USER_F_PROTOCOL_FEATURES: Final = 1 << 30


class ProtocolViolation(Exception):
    """The peer sent something vhost-user does not allow; the connection can only be closed."""


class Request(enum.IntEnum):
    """What a front-end asks for, as far as anything here knows it."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class ProtocolFeature(enum.IntFlag):
    """Extensions that both ends must want; the numbers of their bits are the protocol's."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """A message: its header's request and flags, its payload, and the descriptors that came along.

    Whoever holds a received message owns its descriptors and closes them.
    """

    request: int
    payload: bytes = b""
    fds: tuple[int, ...] = ()
    flags: int = VERSION

    @property
    def is_reply(self) -> bool:
        return bool(self.flags & FLAG_REPLY)

    @property
    def needs_reply(self) -> bool:
        """Whether the front-end wants to be told how it went, with REPLY_ACK."""
        return bool(self.flags & FLAG_NEED_REPLY)

    @property
    def name(self) -> str:
        """What the request is called, for people."""
        try:
            return Request(self.request).name
        except ValueError:
            return f"request {self.request}"


# -- the header ---------------------------------------------------------------------------------


def encode(message: Message) -> bytes:
    """Return a message's bytes; its descriptors go beside them."""
    return HEADER.pack(message.request, message.flags, len(message.payload)) + message.payload


def decode_header(header: bytes) -> tuple[int, int, int]:
    """Return request, flags and the size of the payload in bytes.

    Raises:
        ProtocolViolation: It is of another version, or of a message longer than any.
    """
    request, flags, size = HEADER.unpack(header)
    if flags & VERSION_MASK != VERSION or flags & ~(VERSION_MASK | FLAG_REPLY | FLAG_NEED_REPLY):
        raise ProtocolViolation(f"a message has the flags {flags:#x}")
    if size > MAX_PAYLOAD_BYTES:
        raise ProtocolViolation(f"a message is to have {size} bytes")
    return request, flags, size


class Inbox:
    """Makes messages of bytes and descriptors as they come, in whatever pieces.

    Its reader asks for :attr:`wanted` bytes at the most, so that descriptors, which come with the
    first byte of a message, can only be that message's.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._fds: list[int] = []
        self._header: tuple[int, int, int] | None = None

    @property
    def wanted(self) -> int:
        """How many bytes are missing to the end of the header, or of the message."""
        size = HEADER.size if self._header is None else self._header[2]
        return size - len(self._data)

    @property
    def pending(self) -> bool:
        """Whether a message has been begun."""
        return bool(self._data or self._fds or self._header)

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> Message | None:
        """Take what was received; return the message if this was the rest of one.

        Raises:
            ProtocolViolation: It can be no message.  :meth:`abandon` has the descriptors.
        """
        self._fds += fds
        self._data += data
        if len(self._fds) > MAX_TABLE_REGIONS:
            raise ProtocolViolation(f"a message has {len(self._fds)} file descriptors")
        if self.wanted < 0:
            raise ValueError("more was fed than is wanted")
        if self._header is None and self.wanted == 0:
            self._header = decode_header(bytes(self._data))
            self._data.clear()
        if self._header is None or self.wanted:
            return None
        request, flags, _ = self._header
        message = Message(request, bytes(self._data), tuple(self._fds), flags)
        self._data.clear()
        self._fds.clear()
        self._header = None
        return message

    def abandon(self) -> tuple[int, ...]:
        """Give up the message that was begun; return its descriptors, now the caller's to close."""
        fds = tuple(self._fds)
        self._data.clear()
        self._fds.clear()
        self._header = None
        return fds
