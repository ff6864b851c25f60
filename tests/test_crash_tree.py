# SPDX-License-Identifier: LGPL-2.1-or-later
"""A sample of ``make crashes``, and that it notices a daemon that does not come through a cut."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.sweep

TESTS = Path(__file__).parent
FORGETFUL = """
import sys, crash_tree
from xshmd.engine import recovery
async def nothing(*arguments): return True
recovery._hold_again = nothing
sys.exit(crash_tree.main())
"""
OF_ONE = ("--job", "0", "--jobs", "1", "--length", "1", "--arch", "arm64", "--only")


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=TESTS, env={"PYTHONPATH": f".:{TESTS.parent}"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_every_cut_of_one_operation() -> None:
    done = _run("-m", "crash_tree", *OF_ONE, "create c", "--second", "0.03")
    assert done.returncode == 0, done.stdout + done.stderr
    sequences, cuts, second_cuts, failures = _counts(done.stdout)
    assert (sequences, failures) == (1, 0)
    assert cuts > 10
    assert second_cuts > 2


def test_what_a_recovery_leaves_undone_is_seen() -> None:
    done = _run("-c", FORGETFUL, *OF_ONE, "create c", "--second", "0")
    assert done.returncode == 1, done.stdout + done.stderr
    assert _counts(done.stdout)[3] > 0
    assert "FAILED create c > " in done.stdout


def _counts(said: str) -> list[int]:
    found = re.search(r"^COUNTS (.*)$", said, re.MULTILINE)
    assert found is not None, said
    return [int(word) for word in found[1].split()]
