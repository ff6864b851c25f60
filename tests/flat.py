# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether something grows: a line through the samples, and how steep it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return how much y rises for each x, by least squares."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return k where y goes as x to the power of k: 0 for what is flat, 1 for what is linear."""
    return slope([math.log(x) for x in xs], [math.log(y) for y in ys])


def growth(work: Callable[[], object], ten_times_as_much: Callable[[], object]) -> float:
    """Return how many times the CPU time of the one the other takes: 10 for what is linear, 100 for
    what is quadratic, on any machine."""
    return _cpu_s(ten_times_as_much, tries=2) / _cpu_s(work, tries=5)


def _cpu_s(work: Callable[[], object], tries: int) -> float:
    best = math.inf
    for _ in range(tries):
        before = time.process_time()
        work()
        best = min(best, time.process_time() - before)
    return best


LINEAR = 30.0
"""More than this is not, and less is not quadratic."""
