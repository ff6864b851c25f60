# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes new inputs of known ones: knows the words of a language, not its grammar.

Deterministic: the same seed makes the same inputs on every machine, so a failure is its number.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Final

MAX_BYTES: Final = 1 << 14
NUMBERS: Final = (
    b"0", b"1", b"-1", b"4095", b"4096", b"0x1000", b"0x7fffffff", b"0xffffffff", b"4294967296",
    b"0x7fffffffffffffff", b"0xffffffffffffffff", b"0x10000000000000000", b"1e9", b"08", b"0x",
    b"9" * 400,
)  # fmt: skip
"""Where widths end and readers of numbers differ."""
BYTES: Final = (b"\0", b"\r\n", b"\xff", b"\xc3", b"\xed\xa0\x80", "é".encode(), b"\x1b[2J", b"\\")
_NUMBER: Final = re.compile(rb"0x[0-9a-fA-F]+|\d+")

Step = Callable[[bytearray, random.Random, Sequence[bytes], Sequence[bytes]], None]


def _flip(data: bytearray, rng: random.Random, _words: Sequence[bytes], _: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _cut(data: bytearray, rng: random.Random, _words: Sequence[bytes], _: Sequence[bytes]) -> None:
    start = rng.randrange(len(data) + 1)
    del data[start : start + rng.choice((1, 2, 8, 64, len(data)))]


def _double(
    data: bytearray, rng: random.Random, _words: Sequence[bytes], _: Sequence[bytes]
) -> None:
    start = rng.randrange(len(data) + 1)
    piece = data[start : start + rng.choice((1, 4, 16, 256))]
    data[start:start] = piece * rng.choice((1, 1, 2, 50))


def _word(data: bytearray, rng: random.Random, words: Sequence[bytes], _: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    data[at : at + rng.choice((0, 0, 1, 4))] = rng.choice(words or BYTES)


def _odd(data: bytearray, rng: random.Random, _words: Sequence[bytes], _: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice(BYTES)


def _number(
    data: bytearray, rng: random.Random, _words: Sequence[bytes], _: Sequence[bytes]
) -> None:
    found = list(_NUMBER.finditer(bytes(data)))
    if found:
        start, end = rng.choice(found).span()
        data[start:end] = rng.choice(NUMBERS)


def _splice(
    data: bytearray, rng: random.Random, _words: Sequence[bytes], others: Sequence[bytes]
) -> None:
    other = rng.choice(others)
    start = rng.randrange(len(other) + 1)
    at = rng.randrange(len(data) + 1)
    data[at : at + rng.choice((0, 8, 64))] = other[start : start + rng.choice((4, 32, 256))]


STEPS: Final[tuple[Step, ...]] = (_flip, _cut, _double, _word, _word, _odd, _number, _splice)


def mutated(
    corpus: Sequence[bytes], words: Sequence[bytes], seed: int, *, known: bytes | None = None
) -> bytes:
    """Return one input made of the corpus.

    Args:
        corpus: Known inputs, at least one.
        words: Tokens of the language.
        seed: Which input.
        known: What to start from; None: any of the corpus.
    """
    rng = random.Random(seed)
    data = bytearray(rng.choice(corpus) if known is None else known)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        rng.choice(STEPS)(data, rng, words, corpus)
    return bytes(data[:MAX_BYTES])
