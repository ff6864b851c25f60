# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ``xshmctl`` prints: tables, JSON and complaints.  Data on stdout, the rest on stderr.

Nothing is ever coloured, and nothing a name contains can steer a terminal.
"""

from __future__ import annotations

import sys

from xshmd.errors import XshmError
from xshmd.units import Gfn, address_of

# xshmctl starts in the time that importing typing would take.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


def complain(error: XshmError) -> None:
    """Print an error, and what to do about it, on stderr."""
    print(f"xshmctl: {printable(error.message)}", file=sys.stderr)
    if error.hint:
        print(f"hint: {printable(error.hint)}", file=sys.stderr)


def say(text: str) -> None:
    """Print a remark on stderr, at once."""
    print(f"xshmctl: {printable(text)}", file=sys.stderr, flush=True)


def print_json(value: Any, mode: str) -> None:
    """Print a value as JSON: ``pretty`` over several lines, ``short`` on one."""
    import json  # most of the time xshmctl would need, for those who ask for it

    if mode == "pretty":
        print(json.dumps(value, indent=2))
    else:
        print(json.dumps(value, separators=(",", ":")))


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, legend: bool, noun: str
) -> None:
    """Print rows in columns; the legend is a header above and a count below."""
    lines = [[printable(cell) for cell in row] for row in rows]
    if legend and lines:
        lines.insert(0, list(header))
    widths = [max(_columns(cell) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = [
            cell + " " * (width - _columns(cell)) for cell, width in zip(line, widths, strict=True)
        ]
        print("  ".join(padded).rstrip())
    if legend:
        count = f"{len(rows) or 'no'} {noun}{'' if len(rows) == 1 else 's'}"
        print(f"\n{count} listed." if rows else f"{count}.")


def _columns(text: str) -> int:
    """Return how many columns of a terminal the text takes."""
    if text.isascii():
        return len(text)
    import unicodedata  # another shared object, for the few that need it

    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) != 0 for char in text)


def print_fields(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values, a line each, the values below each other."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name + ':' if name else '':>{width + 1}} {printable(value)}")


def flush() -> None:
    """Have whoever reads us see what has been printed."""
    sys.stdout.flush()


def frame(gfn: int) -> str:
    """Say a frame number as Xen's own messages do."""
    return f"{gfn:#x}"


def address(first_gfn: int) -> str:
    """Say where a frame begins, in bytes, as configurations do."""
    return f"{address_of(Gfn(first_gfn)):#x}"


def frames(first_gfn: int, nr_frames: int) -> str:
    """Say a range of frames by its first and last."""
    return f"{frame(first_gfn)}..{frame(first_gfn + nr_frames - 1)}"


def printable(text: str) -> str:
    """Return the text with whatever could steer a terminal replaced."""
    return "".join(char if char.isprintable() else "?" for char in text)
