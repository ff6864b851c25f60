# SPDX-License-Identifier: LGPL-2.1-or-later
"""A page of a guest's own in which it asks dom0 for lists and transfers: what stands where.

The guest writes it while dom0 reads it, and may write anything: it is read once, and what is then
understood is checked like any stranger's word.  In C: ``integration/guests/lists.h``.

Little-endian; offsets in bytes::

    0x00  u32 magic "XSHL", by dom0    0x04  u32 version, by dom0
    0x08  u32 asked: the number of the guest's newest request, written last
    0x0c  u32 answered: the number of the newest request that is answered, by dom0, written last
    0x10  u32 operation                0x14  u32 list
    0x18  u32 number of ranges         0x1c  u32 status, by dom0
    0x20  u64 where the count goes, plus one; 0: nowhere
    0x28  u64 result, by dom0          0x30  16 bytes that are nothing yet
    0x40  64 ranges: u64 offset, u64 length
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from typing import Final

from xshmd.errors import (
    Conflict,
    NoSuchList,
    OutOfRange,
    QuotaExceeded,
    Refused,
    UsageError,
    XshmError,
)
from xshmd.ranges import MAX_RANGES, ByteRange

MAGIC: Final = b"XSHL"
VERSION: Final = 1
ANSWERED_AT: Final = 0x0C
STATUS_AT: Final = 0x1C
RESULT_AT: Final = 0x28
RANGES_AT: Final = 0x40
_HEAD: Final = struct.Struct("<8xI4xIII4xQ")
"""asked, operation, list, number of ranges, count"""
_RANGE: Final = struct.Struct("<QQ")
READ_BYTES: Final = RANGES_AT + MAX_RANGES * _RANGE.size
"""How much of the page a request can take."""
EMPTY: Final = VERSION.to_bytes(4, "little") + bytes(RANGES_AT - 8)
"""What a fresh page has behind its magic."""


class Operation(enum.IntEnum):
    """What a guest may ask for."""

    REGISTER_INPUT = 1
    REGISTER_OUTPUT = 2
    UNREGISTER = 3
    TRANSFER_OUTPUT = 4
    TRANSFER_INPUT = 5


_STATUS: Final[tuple[tuple[type[XshmError], int], ...]] = (
    (UsageError, 1), (OutOfRange, 2), (Conflict, 3), (Refused, 4), (NoSuchList, 5),
    (QuotaExceeded, 6), (XshmError, 7),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a guest asks for, as it says it; nothing of it is checked but its form."""

    number: int
    operation: Operation | None
    """None: none that there is."""
    list_id: int
    """0: none named."""
    ranges: tuple[ByteRange, ...]
    """Empty where it says more than there can be."""
    count_at: int | None


def newest(page: bytes, answered: int) -> Request | None:
    """Return the request in the page, if it is not the one answered last.

    Args:
        page: The first ``READ_BYTES`` of the page, read once.
        answered: The number of the request that was answered last, as dom0 remembers it.
    """
    asked, operation, list_id, nr_ranges, count_at = _HEAD.unpack_from(page)
    if asked == answered:
        return None
    ranges: tuple[ByteRange, ...] = ()
    if nr_ranges <= MAX_RANGES:
        ranges = tuple(
            ByteRange(*_RANGE.unpack_from(page, RANGES_AT + index * _RANGE.size))
            for index in range(nr_ranges)
        )
    return Request(
        number=asked,
        operation=Operation(operation) if operation in list(Operation) else None,
        list_id=list_id,
        ranges=ranges,
        count_at=count_at - 1 if count_at else None,
    )


def status_of(error: XshmError) -> int:
    """Return the number that an error has in the page; 0 is none."""
    return next(status for kind, status in _STATUS if isinstance(error, kind))


def answer(number: int, status: int, result: int) -> tuple[tuple[int, bytes], ...]:
    """Return what is to be written where, in this order: what makes it count comes last."""
    return (
        (STATUS_AT, status.to_bytes(4, "little")),
        (RESULT_AT, result.to_bytes(8, "little")),
        (ANSWERED_AT, number.to_bytes(4, "little")),
    )
