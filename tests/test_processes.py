# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process is known by its number and when it began, whatever it calls itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xshmd.daemon.processes import ProcProcesses
from xshmd.model import Process

FIELDS = "S 1 2 3 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 {started} 18 19"


def proc(tmp_path: Path, pid: int, name: str, state: str = "S", started: int = 4711) -> Path:
    (tmp_path / str(pid)).mkdir()
    rest = FIELDS.format(started=started).replace("S", state, 1)
    (tmp_path / str(pid) / "stat").write_text(f"{pid} ({name}) {rest}\n")
    return tmp_path


@pytest.mark.parametrize("name", ["viewer", "a b", "a) S 1 (b", ""])
def test_any_name(tmp_path: Path, name: str) -> None:
    processes = ProcProcesses(proc(tmp_path, 77, name))
    assert processes.describe(77, 5) == Process(pid=77, uid=5, started=4711, name=name)
    assert processes.started_at(77) == 4711


@pytest.mark.parametrize("state", ["Z", "X"])
def test_one_that_has_ended_and_is_not_reaped_yet(tmp_path: Path, state: str) -> None:
    assert ProcProcesses(proc(tmp_path, 77, "viewer", state)).started_at(77) is None


def test_one_that_is_hidden_or_gone(tmp_path: Path) -> None:
    processes = ProcProcesses(tmp_path)
    assert processes.started_at(77) is None
    assert processes.started_at(0) is None
    assert processes.describe(0, 5) == Process(pid=0, uid=5)


def test_real_ones() -> None:
    processes = ProcProcesses()
    own = processes.describe(os.getpid(), os.getuid())
    assert own.started > 0
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        started = processes.started_at(child.pid)
        assert started is not None
        assert started >= own.started
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert processes.started_at(child.pid) is None
    assert processes.started_at(child.pid) is None
