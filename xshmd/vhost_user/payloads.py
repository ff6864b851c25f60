# SPDX-License-Identifier: LGPL-2.1-or-later
"""What vhost-user messages carry, as records and as bytes: nothing but their form is checked here.

Everything that is wrong with the form of a payload is a
:class:`~xshmd.vhost_user.wire.ProtocolViolation`.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Sequence
from typing import Final

from xshmd.units import is_within
from xshmd.vhost_user.wire import MAX_CONFIG_BYTES, MAX_TABLE_REGIONS, ProtocolViolation


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


_REGION: Final = struct.Struct("=QQQQ")
_XEN_REGION: Final = struct.Struct("=QQQQII")
_TABLE_HEADER: Final = struct.Struct("=II")
_SINGLE_HEADER: Final = struct.Struct("=Q")
_U64: Final = struct.Struct("=Q")
_STATE: Final = struct.Struct("=II")
_ADDRESS: Final = struct.Struct("=IIQQQQ")
_CONFIG: Final = struct.Struct("=III")


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
    if size != len(data) or not is_within(offset, size, MAX_CONFIG_BYTES):
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
