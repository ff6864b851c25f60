# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xshmctl hexdump``: a region's bytes for people, by their offset in the region.

The form is that of hexdump(1) with -C: what repeats the line before it is one ``*``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from xshmd.ctl.transfer import bytes_left, length_of, pieces
from xshmd.varlink.client import Client

LINE_BYTES: Final = 16


def run(options: Any) -> int:
    """Print the bytes."""
    with Client(options.socket) as client:
        length = length_of(options, bytes_left(client, options))
        found = pieces(client, options, length)
        for line in lines(options.offset, (data for _, data in found)):
            print(line)
    return 0


def lines(offset: int, data: Iterable[bytes]) -> Iterator[str]:
    """Yield the lines of a dump.

    Args:
        offset: What the first byte's place is called.
        data: The bytes in pieces, each but the last a multiple of a line.
    """
    before: bytes | None = None
    is_starred = False
    end = offset
    for piece in data:
        for start in range(0, len(piece), LINE_BYTES):
            row = piece[start : start + LINE_BYTES]
            if row == before:
                if not is_starred:
                    yield "*"
                is_starred = True
            else:
                yield _line(end, row)
                is_starred = False
            before = row
            end += len(row)
    yield f"{end:08x}"


def _line(at: int, row: bytes) -> str:
    halves = row[:8].hex(" "), row[8:].hex(" ")
    text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row)
    return f"{at:08x}  {halves[0]:<23}  {halves[1]:<23}  |{text}|"
