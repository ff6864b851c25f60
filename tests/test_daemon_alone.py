# SPDX-License-Identifier: LGPL-2.1-or-later
"""There is one daemon a machine, whatever sockets they are told to serve."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from xshmd.daemon.alone import alone
from xshmd.errors import Conflict, XenUnavailable

HOLDS_IT = """
import os, sys, time
from pathlib import Path
from xshmd.daemon.alone import alone
with alone(Path(sys.argv[1])):
    print("alone", flush=True)
    sys.stdin.read()
"""


def test_the_second_is_told(tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(Conflict, match="another xshmd runs"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


def test_one_that_is_killed_makes_room(tmp_path: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDS_IT, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert first.stdout is not None
    assert first.stdin is not None
    with first:
        assert first.stdout.readline() == b"alone\n"
        with pytest.raises(Conflict), alone(tmp_path):
            pass
        first.kill()
    with alone(tmp_path):
        pass


def test_without_xens_tools_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(XenUnavailable, match=r"cannot open .*nowhere"), alone(tmp_path / "nowhere"):
        pass
