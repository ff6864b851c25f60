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


class XenFlag(enum.IntFlag):
    """How a region is to be mapped, with XEN_MMAP; none of them: as without it."""

    FOREIGN = 1 << 0
    """Frames of a domain, through /dev/xen/privcmd."""
    GRANT = 1 << 1
    """Grant references of a domain, through /dev/xen/gntdev."""
    NO_ADVANCE_MAP_RUST_VMM = 1 << 3
    """NO_ADVANCE_MAP as rust-vmm's vm-memory has it: it took "bit 8" for the value."""
    NO_ADVANCE_MAP = 1 << 8
    """Map a part of it only while that is needed; this is the specification's bit."""


PLAIN: Final = XenFlag(0)
EITHER_NO_ADVANCE_MAP: Final = XenFlag.NO_ADVANCE_MAP | XenFlag.NO_ADVANCE_MAP_RUST_VMM
KNOWN_XEN_FLAGS: Final = XenFlag.FOREIGN | XenFlag.GRANT | EITHER_NO_ADVANCE_MAP


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRegion:
    """A region description: memory the back-end may reach, and the addresses it has."""

    guest_address: int
    """Where it begins in the address space that descriptors speak of, in bytes."""
    size_bytes: int
    user_address: int
    """Where it begins in the address space that ring addresses speak of: the front-end's own."""
    mmap_offset: int = 0
    """Where it begins in what its file descriptor stands for."""
    xen_flags: XenFlag = PLAIN
    domid: int = 0
    """Whose frames or grants it is; with XEN_MMAP alone."""

    @property
    def in_advance(self) -> bool:
        """Whether all of it is to be mapped at once and stay so."""
        return not self.xen_flags & EITHER_NO_ADVANCE_MAP

    def is_same_place(self, other: MemoryRegion) -> bool:
        """Return whether REM_MEM_REG of ``other`` means this one; its offset does not count."""
        return (self.guest_address, self.size_bytes, self.user_address) == (
            other.guest_address, other.size_bytes, other.user_address,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class VringState:
    """A vring and a number that the request gives its meaning."""

    index: int
    num: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VringAddress:
    """Where the parts of a split vring are: user addresses."""

    index: int
    flags: int = 0
    descriptors: int
    used: int
    available: int
    log: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """A part of a device's configuration space."""

    offset: int
    flags: int
    data: bytes


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


_REGION: Final = struct.Struct("=QQQQ")
_XEN_REGION: Final = struct.Struct("=QQQQII")
_TABLE_HEADER: Final = struct.Struct("=II")
_SINGLE_HEADER: Final = struct.Struct("=Q")
_U64: Final = struct.Struct("=Q")
_STATE: Final = struct.Struct("=II")
_ADDRESS: Final = struct.Struct("=IIQQQQ")
_CONFIG: Final = struct.Struct("=III")

MAX_PAYLOAD_BYTES: Final = max(
    _TABLE_HEADER.size + MAX_TABLE_REGIONS * _XEN_REGION.size, _CONFIG.size + MAX_CONFIG_BYTES
)
"""No message known here is longer: what says it is, is not read."""


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


# -- payloads -----------------------------------------------------------------------------------


def _unpack(layout: struct.Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) != layout.size:
        raise ProtocolViolation(f"a payload has {len(payload)} bytes instead of {layout.size}")
    return layout.unpack(payload)


def encode_u64(value: int) -> bytes:
    """Return the payload of a single number."""
    return _U64.pack(value)


def decode_u64(payload: bytes) -> int:
    """Return the number that is the payload."""
    return _unpack(_U64, payload)[0]


def encode_state(state: VringState) -> bytes:
    """Return the payload of SET_VRING_NUM, BASE and ENABLE, and of GET_VRING_BASE."""
    return _STATE.pack(state.index, state.num)


def decode_state(payload: bytes) -> VringState:
    """Return what :func:`encode_state` wrote."""
    return VringState(*_unpack(_STATE, payload))


def encode_address(address: VringAddress) -> bytes:
    """Return the payload of SET_VRING_ADDR."""
    return _ADDRESS.pack(
        address.index, address.flags, address.descriptors, address.used, address.available,
        address.log,
    )  # fmt: skip


def decode_address(payload: bytes) -> VringAddress:
    """Return what :func:`encode_address` wrote."""
    index, flags, descriptors, used, available, log = _unpack(_ADDRESS, payload)
    return VringAddress(
        index=index, flags=flags, descriptors=descriptors, used=used, available=available, log=log
    )


def encode_config(config: Config) -> bytes:
    """Return the payload of GET_CONFIG and SET_CONFIG."""
    return _CONFIG.pack(config.offset, len(config.data), config.flags) + config.data


def decode_config(payload: bytes) -> Config:
    """Return what :func:`encode_config` wrote, which must be within the configuration space."""
    if len(payload) < _CONFIG.size:
        raise ProtocolViolation(f"a payload has {len(payload)} bytes, too few")
    offset, size, flags = _CONFIG.unpack_from(payload)
    data = payload[_CONFIG.size :]
    if size != len(data) or offset + size > MAX_CONFIG_BYTES:
        raise ProtocolViolation(f"{size} bytes of configuration at {offset}")
    return Config(offset, flags, data)


def _encode_region(region: MemoryRegion, *, xen: bool) -> bytes:
    common = (region.guest_address, region.size_bytes, region.user_address, region.mmap_offset)
    if xen:
        return _XEN_REGION.pack(*common, region.xen_flags, region.domid)
    return _REGION.pack(*common)


def _decode_region(data: bytes) -> MemoryRegion:
    flags, domid = 0, 0
    if len(data) == _XEN_REGION.size:
        *common, flags, domid = _XEN_REGION.unpack(data)
    else:
        common = list(_REGION.unpack(data))
    guest_address, size_bytes, user_address, mmap_offset = common
    return MemoryRegion(
        guest_address=guest_address, size_bytes=size_bytes, user_address=user_address,
        mmap_offset=mmap_offset, xen_flags=XenFlag(flags), domid=domid,
    )  # fmt: skip


def _region_size(size_bytes: int, count: int, *, xen: bool) -> int:
    """Return the size of each of so many descriptions that together have so many bytes.

    QEMU up to 10.0 at least agrees to every protocol feature that it has a number for, XEN_MMAP
    among them, and then sends descriptions without the fields for Xen (hw/virtio/vhost-user.c,
    VHOST_USER_PROTOCOL_FEATURE_MASK).  Their size says what they are.
    """
    for layout in (_XEN_REGION, _REGION) if xen else (_REGION,):
        if size_bytes == count * layout.size:
            return layout.size
    raise ProtocolViolation(f"{count} memory regions have {size_bytes} bytes")


def encode_table(regions: Sequence[MemoryRegion], *, xen: bool) -> bytes:
    """Return the payload of SET_MEM_TABLE.

    Args:
        regions: At most :data:`MAX_TABLE_REGIONS`.
        xen: Whether XEN_MMAP is negotiated, with which each has two fields more.
    """
    if len(regions) > MAX_TABLE_REGIONS:
        raise ValueError(f"{len(regions)} regions do not fit a table")
    encoded = (_encode_region(region, xen=xen) for region in regions)
    return _TABLE_HEADER.pack(len(regions), 0) + b"".join(encoded)


def decode_table(payload: bytes, *, xen: bool) -> tuple[MemoryRegion, ...]:
    """Return the regions of SET_MEM_TABLE; nothing but the payload's form is checked."""
    if len(payload) < _TABLE_HEADER.size:
        raise ProtocolViolation(f"a memory table has {len(payload)} bytes")
    count, _padding = _TABLE_HEADER.unpack_from(payload)
    if count > MAX_TABLE_REGIONS:
        raise ProtocolViolation(f"a memory table has {count} regions")
    body = payload[_TABLE_HEADER.size :]
    size = _region_size(len(body), count, xen=xen)
    return tuple(_decode_region(body[at : at + size]) for at in range(0, count * size, size))


def encode_single(region: MemoryRegion, *, xen: bool) -> bytes:
    """Return the payload of ADD_MEM_REG and REM_MEM_REG."""
    return _SINGLE_HEADER.pack(0) + _encode_region(region, xen=xen)


def decode_single(payload: bytes, *, xen: bool) -> MemoryRegion:
    """Return the region of ADD_MEM_REG or REM_MEM_REG."""
    body = payload[_SINGLE_HEADER.size :]
    _region_size(len(body), 1, xen=xen)
    return _decode_region(body)
