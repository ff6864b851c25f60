# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lists of ranges from strangers: what is let through is inside, apart, and no more than may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xshmd.errors import Conflict, OutOfRange, UsageError, XshmError
from xshmd.ranges import MAX_LIST_BYTES, MAX_RANGES, ByteRange, check_apart, check_list, nr_bytes_of

SIZE = 200
WILD = st.one_of(
    st.integers(-3, SIZE + 3),
    st.sampled_from([1 << 31, (1 << 32) - 1, 1 << 52, (1 << 63) - 1, (1 << 64) - 5, -(1 << 63)]),
)


def fits(ranges: list[ByteRange]) -> bool:
    """Say it byte by byte, as nobody would compute it."""
    seen: set[int] = set()
    for each in ranges:
        if not 1 <= each.nr_bytes <= SIZE:
            return False
        named = {each.offset_bytes + index for index in range(each.nr_bytes)}
        if named & seen or not named <= set(range(SIZE)):
            return False
        seen |= named
    return bool(ranges)


@given(st.lists(st.builds(ByteRange, WILD, WILD), max_size=6))
def test_a_list_is_let_through_if_and_only_if_it_fits(ranges: list[ByteRange]) -> None:
    try:
        check_list(ranges, SIZE, "a part")
    except XshmError:
        assert not fits(ranges)
    else:
        assert fits(ranges)


@pytest.mark.parametrize(
    ("offset", "count"),
    [(SIZE, 1), (SIZE - 1, 2), (-1, 1), (0, SIZE + 1), (0, 0), (5, -1), (-1, SIZE), (1 << 64, 1),
     ((1 << 64) - 1, 2), (1, (1 << 64) - 1), (-(1 << 63), 1 << 63)],
)  # fmt: skip
def test_a_range_that_does_not_end_inside(offset: int, count: int) -> None:
    with pytest.raises(OutOfRange):
        check_list([ByteRange(0, 1), ByteRange(offset, count)], SIZE, "a part")


def test_the_whole_of_it_fits() -> None:
    check_list([ByteRange(0, SIZE)], SIZE, "a part")
    check_list([ByteRange(SIZE - 1, 1), ByteRange(0, SIZE - 1)], SIZE, "a part")


@pytest.mark.parametrize("number", [0, MAX_RANGES + 1])
def test_too_few_and_too_many(number: int) -> None:
    with pytest.raises(UsageError):
        check_list([ByteRange(index, 1) for index in range(number)], SIZE, "a part")
    check_list([ByteRange(index, 1) for index in range(MAX_RANGES)], SIZE, "a part")


def test_too_many_bytes() -> None:
    half = MAX_LIST_BYTES // 2
    ranges = [ByteRange(0, half), ByteRange(half, half)]
    check_list(ranges, 1 << 40, "a part")
    with pytest.raises(UsageError, match="a list of 8388609 bytes"):
        check_list([*ranges, ByteRange(1 << 30, 1)], 1 << 40, "a part")


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9), st.booleans()), max_size=8))
def test_lists_are_apart_if_no_byte_is_in_two(said: list[tuple[int, int, bool]]) -> None:
    one = [ByteRange(offset, count) for offset, count, first in said if first]
    other = [ByteRange(offset, count) for offset, count, first in said if not first]
    named = [byte for each in (*one, *other) for byte in range(each.offset_bytes, each.end)]
    try:
        check_apart(one, other)
    except Conflict:
        assert len(set(named)) < len(named)
    else:
        assert len(set(named)) == len(named) == nr_bytes_of(one) + nr_bytes_of(other)
