# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether something grows: a line through the samples, and how steep it is."""

from __future__ import annotations

import math
from collections.abc import Sequence


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return how much y rises for each x, by least squares."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return k where y goes as x to the power of k: 0 for what is flat, 1 for what is linear."""
    return slope([math.log(x) for x in xs], [math.log(y) for y in ys])
