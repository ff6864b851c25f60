# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one check of a range: right at every edge, and where the same said in C would wrap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xshmd.units import is_within

WORD = 1 << 64
WILD = st.one_of(
    st.integers(-3, 12),
    st.sampled_from([1 << 31, 1 << 32, 1 << 52, (1 << 63) - 1, WORD - 5, WORD - 1, -(1 << 63)]),
)


@pytest.mark.parametrize(
    ("start", "count", "limit"),
    [(0, 8, 8), (7, 1, 8), (0, 1, 8), (3, 5, 8),
     (0, 0, 0), (0, 0, 8), (8, 0, 8),  # none at all, up to the very end
     (WORD - 1, 1, WORD), (0, WORD, WORD)],
)  # fmt: skip
def test_what_is_within(start: int, count: int, limit: int) -> None:
    assert is_within(start, count, limit)


@pytest.mark.parametrize(
    ("start", "count", "limit"),
    [(0, 9, 8), (1, 8, 8), (8, 1, 8), (9, 0, 8), (0, 1, 0),
     (-1, 1, 8), (-1, 0, 8), (-8, 8, 8),  # begins before 0, wherever it ends
     (0, -1, 8), (9, -1, 8), (8, -8, 8), (0, 0, -1),  # less than nothing
     (WORD - 1, 2, 8), (1, WORD - 1, 8), (WORD - 4, 8, 8), (WORD, 1, 8),  # wraps to a small end
     (WORD - 1, 2, WORD), (1, WORD, WORD), (1 << 63, 1 << 63, 8)],
)  # fmt: skip
def test_what_is_not(start: int, count: int, limit: int) -> None:
    assert not is_within(start, count, limit)


@given(WILD, WILD, st.integers(0, 12))
def test_each_one_of_them_is_below_the_limit(start: int, count: int, limit: int) -> None:
    """Say it one by one, as nobody would compute it."""
    if 0 <= count <= limit:
        inside = set(range(start, start + count)) <= set(range(limit)) and 0 <= start <= limit
        assert is_within(start, count, limit) == inside
    else:
        assert not is_within(start, count, limit)
