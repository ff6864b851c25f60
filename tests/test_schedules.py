# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bounded part of ``make schedules``, and that a number stands for all of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from schedules import play, trace

COUNT = 12


def test_whatever_the_order_nothing_is_lost() -> None:
    """See ``schedules.play``: each run ends with the machine as it was, to the page."""
    told = [play(number) for number in range(COUNT)]
    assert any("the daemon is stopped" in each for each in told)
    assert len({tuple(each) for each in told}) == COUNT


def test_a_number_is_the_same_run_everywhere() -> None:
    """In another process too, where sets are in another order: else no failure could be found."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", f"from schedules import trace; print(trace({COUNT}))"],
        cwd=here, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": f"{here}:{here.parent}", "PYTHONHASHSEED": "12345"},
    )  # fmt: skip
    assert done.stdout.strip() == trace(COUNT)
