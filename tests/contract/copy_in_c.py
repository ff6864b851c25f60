# SPDX-License-Identifier: LGPL-2.1-or-later
"""The copy of lists that is in C, against the same in Python, a number of times: in dom0, in /rig,
``python3 -m tests.contract.copy_in_c 3000``.

Nothing above it hands it a range that is not inside; this does, as whoever finds a way would.
"""

from __future__ import annotations

import random
import sys
from typing import Any, Final

from xshmd.xen import _ffi

SIZE: Final = 257
GUARD: Final = 64
"""Bytes around each memory that must stay as they are."""
ERANGE: Final = 34
WILD: Final = (0, 1, SIZE - 1, SIZE, SIZE + 1, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1)
Pieces = list[tuple[int, int]]


def pieces(rng: random.Random) -> Pieces:
    """A list, of which every third is somehow wrong."""
    found: Pieces = []
    for _ in range(rng.randrange(7)):
        length = rng.randrange(60)
        found.append((rng.randrange(SIZE - length), length))
    if found and rng.random() < 0.33:
        wrong = rng.randrange(len(found))
        offset, length = rng.choice(WILD), rng.choice((*WILD, 5))
        # Both together, so that their sum is small once it has wrapped around.
        found[wrong] = rng.choice(((offset, length), ((1 << 64) - (offset or 1), offset or 1)))
    return found


def expected(target: bytearray, into: Pieces, source: bytes, out_of: Pieces) -> int:
    """Do it byte by byte; what it returns."""
    if any(offset + length > SIZE for offset, length in (*into, *out_of)):
        return -ERANGE
    to = [at for offset, length in into for at in range(offset, offset + length)]
    what = [at for offset, length in out_of for at in range(offset, offset + length)]
    for write, read in zip(to, what, strict=False):
        target[write] = source[read]
    return min(len(to), len(what))


def main(turns: int) -> int:
    """Compare so many; return the exit status."""
    ffi, lib = _ffi.stable()
    refused = 0
    for seed in range(turns):
        rng = random.Random(seed)
        into, out_of = pieces(rng), pieces(rng)
        source = rng.randbytes(SIZE)
        before = rng.randbytes(SIZE + 2 * GUARD)
        memory, data = ffi.new("char[]", before), ffi.new("char[]", source)
        inside = bytearray(before[GUARD : GUARD + SIZE])
        wanted = expected(inside, into, source, out_of)
        got = copied(ffi, lib, memory + GUARD, into, data, out_of)
        found = bytes(ffi.buffer(memory, SIZE + 2 * GUARD))
        if (got, found) != (wanted, before[:GUARD] + bytes(inside) + before[GUARD + SIZE :]):
            print(f"seed {seed}: {got} instead of {wanted}, {into} <- {out_of}")
            return 1
        refused += got == -ERANGE
    print(f"{turns} copies, {refused} refused")
    return 0 if 0 < refused < turns else 1


def copied(ffi: Any, lib: Any, target: Any, into: Pieces, source: Any, out_of: Pieces) -> int:
    """Have C do it."""
    to_pieces, from_pieces = ffi.new("xshm_piece[]", into), ffi.new("xshm_piece[]", out_of)
    return int(
        lib.xshm_scatter_copy(
            target, SIZE, to_pieces, len(into), source, SIZE, from_pieces, len(out_of)
        )
    )


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
