# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two days of ``make soak-simulated``, and what tells whether something grows."""

from __future__ import annotations

import pytest
from flat import exponent, slope
from soak import soak


def test_days_leave_nothing() -> None:
    samples, done = soak(2, 3)
    first, second = samples
    assert done > 60
    assert (first.descriptors, first.tasks) == (second.descriptors, second.tasks)
    assert (first.nodes, first.free_pages) == (second.nodes, second.free_pages)


def test_a_slope_is_what_it_rises_by() -> None:
    assert slope([0, 1, 2], [5, 7, 9]) == pytest.approx(2)
    assert slope([0, 1, 2], [5, 5, 5]) == 0


def test_an_exponent_is_the_power() -> None:
    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert exponent([1, 2, 4], [9, 9, 9]) == pytest.approx(0)
