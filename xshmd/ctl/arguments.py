# SPDX-License-Identifier: LGPL-2.1-or-later
"""What several verbs of ``xshmctl`` take: the same words, values and help everywhere."""

from __future__ import annotations

import argparse
from typing import Final

DEFAULT_TIMEOUT_S: Final = 60
MAX_TIMEOUT_S: Final = 3600
_UNITS: Final = {"KiB": 10, "MiB": 20, "GiB": 30}


def add_dry_run(parser: argparse.ArgumentParser, *more: str) -> None:
    """Add -N and its long forms, of which ``more`` are those of xl."""
    parser.add_argument(
        "-N",
        "--dry-run",
        *more,
        dest="dry_run",
        action="store_true",
        help="only check, and print what would be done",
    )


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """Add how long to wait for a guest's regions."""
    parser.add_argument(
        "--timeout",
        type=timeout,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help=f"seconds to wait for the regions (default: {DEFAULT_TIMEOUT_S})",
    )


def timeout(text: str) -> int:
    """Read a number of seconds."""
    if not (text.isascii() and text.isdecimal()) or int(text) > MAX_TIMEOUT_S:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds up to {MAX_TIMEOUT_S}")
    return int(text)


def size(text: str) -> int:
    """Read a number of bytes."""
    number, shift = text, 0
    for unit, bits in _UNITS.items():
        if text.endswith(unit):
            number, shift = text.removesuffix(unit).rstrip(), bits
    try:
        size_bytes = int(number, 0) << shift
    except ValueError:
        size_bytes = -1
    if not 0 <= size_bytes < 1 << 63:
        raise argparse.ArgumentTypeError(
            f"{text} is no number of bytes: say it in decimal, as 0x..., or with KiB, MiB or GiB"
        )
    return size_bytes
