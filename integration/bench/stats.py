# SPDX-License-Identifier: LGPL-2.1-or-later
"""One figure out of many noisy pairs: the median of their ratios, and how sure of it one can be."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

RESAMPLES: Final = 4000


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios of pairs, with the 95 % interval that resampling the pairs gives."""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}] n={self.pairs}"


def ratio(ours: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Compare two series of which the i-th of each were measured next to one another."""
    each = [one / other for one, other in zip(ours, reference, strict=True)]
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(each, k=len(each))) for _ in range(RESAMPLES))
    return Ratio(
        median=statistics.median(each),
        low=medians[int(RESAMPLES * 0.025)],
        high=medians[int(RESAMPLES * 0.975) - 1],
        pairs=len(each),
    )
