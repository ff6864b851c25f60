# SPDX-License-Identifier: LGPL-2.1-or-later
"""A sample of ``make races``: what it finds, it finds at the place that is said."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_a_guest_that_meets_its_end_at_every_step() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "races", "--length", "1", "--only", "create b", "--share", "0.1",
         "--arch", "arm64"],
        cwd=TESTS, env={"PYTHONPATH": f".:{TESTS.parent}"}, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"^1 sequences, (\d+) races, 0 failures", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    assert int(found[1]) > 10
