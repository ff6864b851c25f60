# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes a run of the whole engine its seed's: the same tasks in the same order, the same names.

trio runs what is ready in an order of its own choice; its tests and Hypothesis make that choice
repeatable by the same two private names (trio/_core/_run.py, ``unrolled_run``).
"""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import trio
from trio._core import _run
from trio.testing import MockClock

_CHOICE: Final = "_ALLOW_DETERMINISTIC_SCHEDULING"
ORDER: random.Random = _run._r
"""What trio shuffles by."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Make everything that is left to chance a matter of the seed in the body."""
    chance = random.Random(f"bytes {seed}")
    real, random_real = os.urandom, random._urandom  # type: ignore[attr-defined]
    choice = vars(_run)
    before = choice[_CHOICE]
    order, others = ORDER.getstate(), random.getstate()
    choice[_CHOICE] = True
    os.urandom = random._urandom = chance.randbytes  # type: ignore[attr-defined]
    ORDER.seed(f"order {seed}")
    random.seed(f"chance {seed}")
    try:
        yield
    finally:
        choice[_CHOICE] = before
        os.urandom, random._urandom = real, random_real  # type: ignore[attr-defined]
        ORDER.setstate(order)
        random.setstate(others)


def run(
    main: Callable[[], Awaitable[Any]],
    seed: int = 0,
    instruments: Sequence[trio.abc.Instrument] = (),
) -> None:
    """Run ``main`` as the seed has it, in a time that jumps."""
    with seeded(seed):
        trio.run(main, clock=MockClock(autojump_threshold=0), instruments=instruments)


class Steps(trio.abc.Instrument):
    """Counts the steps of the tasks below one, and calls back before one of them.

    A step is what a task does from one checkpoint to the next.

    Args:
        below: What the name of the topmost task ends with.
        at: Before which step to call back, from 1; 0: before none.
        call: What to call.  A scope that it cancels is seen as cancelled at the next checkpoint.
    """

    def __init__(self, below: str, at: int = 0, call: Callable[[], None] = lambda: None) -> None:
        self._below, self._at, self._call = below, at, call
        self._ours: dict[trio.lowlevel.Task, bool] = {}
        self.counting = True
        self.count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if not self.counting or not self._is_ours(task):
            return
        self.count += 1
        if self.count == self._at:
            self._call()

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        self._ours.pop(task, None)

    def _is_ours(self, task: trio.lowlevel.Task) -> bool:
        found = self._ours.get(task)
        if found is None:
            above = task.parent_nursery.parent_task if task.parent_nursery else None
            found = task.name.endswith(self._below) or (above is not None and self._is_ours(above))
            self._ours[task] = found
        return found
