# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make test` must not say that all is well when it is not, nor leave anything running."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from integration import parts as parts_module
from integration.images import PLAIN, VARIANTS
from integration.parts import Part, Runner, all_parts

PROJECT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(parts_module, "LOGS", tmp_path / "logs")
    return tmp_path / "logs"


def part(name: str, program: str, *, boots: bool = False) -> Part:
    return Part(name, (sys.executable, "-c", program), boots)


def run(*parts: Part, machines: int = 2) -> tuple[int, str]:
    out = io.StringIO()
    status = Runner(parts, machines, out).run()
    return status, out.getvalue()


def test_all_pass() -> None:
    status, said = run(part("one", "print('3 passed in 1s')"), part("two", "", boots=True))
    assert status == 0
    assert "one passed" in said
    assert "3 passed in 1s" in said
    assert "all 2 parts passed" in said


def test_a_failing_part_is_shown_whole_and_the_others_go_on(logs: Path) -> None:
    program = "print('first line'); print('last line'); raise SystemExit(3)"
    status, said = run(part("bad", program), part("good", "print('well')"))
    assert status == 1
    assert "bad FAILED" in said
    assert "first line\nlast line\n" in said
    assert "good passed" in said
    assert "FAILED: bad (of 2 parts)" in said
    assert (logs / "bad.log").read_text() == "first line\nlast line\n"


def test_a_skipped_test_is_a_failure() -> None:
    status, said = run(part("lazy", "print('== 3 passed, 1 skipped in 1s ==')"))
    assert status == 1
    assert "a test was skipped" in said


def test_no_more_machines_at_once_than_allowed(tmp_path: Path) -> None:
    program = f"""
import os, pathlib, time
mine = pathlib.Path({str(tmp_path)!r}, "running-" + str(os.getpid()))
mine.touch()
others = [p for p in mine.parent.glob("running-*") if p != mine]
deadline = time.monotonic() + 0.5
while time.monotonic() < deadline:
    assert len(list(mine.parent.glob("running-*"))) <= 2
mine.unlink()
"""
    status, said = run(*(part(f"m{n}", program, boots=True) for n in range(5)), machines=2)
    assert status == 0, said


def _stubborn(started: Path, leader: str) -> str:
    """A program with a child; the child ignores SIGINT, the program does not if it is polite."""
    return (
        "import os, pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"if {leader!r} == 'polite': signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        f"pathlib.Path({str(started)!r}).write_text('%d %d' % (os.getpid(), child.pid))\n"
        "time.sleep(600)"
    )


@pytest.mark.parametrize("leader", ["polite", "stubborn"])
def test_ended_by_a_signal_it_leaves_nothing(logs: Path, tmp_path: Path, leader: str) -> None:
    """A part that does not end when asked is killed, with what it started; so is what it left."""
    started = tmp_path / "started"
    program = (
        "import signal, sys; from pathlib import Path; from integration import parts; "
        f"parts.LOGS = Path({str(logs)!r}); parts.LEAVE_S = 0.3; "
        f"part = parts.Part('p', (sys.executable, '-c', {_stubborn(started, leader)!r})); "
        "parts.all_parts = lambda arches: [part]; sys.exit(parts.main([]))"
    )
    # As a shell starts what is in the background: with SIGINT ignored.
    was = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        runner = subprocess.Popen(
            [sys.executable, "-c", program], cwd=PROJECT, stdout=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, was)
    deadline = time.monotonic() + 30
    while not (started.exists() and started.read_text()):
        assert time.monotonic() < deadline
    runner.send_signal(signal.SIGINT)
    said, _ = runner.communicate(timeout=30)
    assert runner.returncode == 130
    assert "interrupted: p" in said
    for pid in map(int, started.read_text().split()):
        assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


def test_every_scenario_is_in_a_part() -> None:
    """Both architectures, all shares, own boots and the other store."""
    commands = [" ".join(part.command) for part in all_parts(["arm64", "x86_64"], shares=2)]
    for arch in ("arm64", "x86_64"):
        for share in ("1/2", "2/2"):
            assert any(f"--arch {arch} -m not own_boot --share {share}" in c for c in commands)
    assert any(c.endswith("--arch arm64 --arch x86_64 -m own_boot") for c in commands)
    assert any("--xenstored oxenstored" in c for c in commands)
    assert {part.name for part in all_parts(["arm64"])} >= {"lint", "unit", "unit-debian"}


def test_every_scenario_is_in_exactly_one_part_of_its_machines() -> None:
    """Shared out, not lost: together the parts are what a run of everything is, and what is in none
    is for another image (make rig-virt)."""

    def collect(words: list[str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "integration/scenarios"]
        return subprocess.Popen([*command, *words], cwd=PROJECT, stdout=subprocess.PIPE, text=True)

    rigs = [
        list(part.command[part.command.index("integration/scenarios") + 1 :])
        for part in all_parts(["arm64", "x86_64"])
        if part.boots and "--xenstored" not in part.command
    ]
    images = [["--image", name] for name in VARIANTS if name != PLAIN]
    collecting = [collect(words) for words in ([], *images, *rigs)]
    said = [process.communicate(timeout=120)[0].splitlines() for process in collecting]
    whole, *parts = [sorted(line for line in lines if "::" in line) for lines in said]
    others, shares = parts[: len(images)], parts[len(images) :]
    assert sorted(line for share in shares for line in share) == whole
    assert len(shares) == 5
    assert all(shares)
    assert any("test_holder" in line and "x86_64" in line for line in whole)
    here, elsewhere = _functions(whole), _functions(line for lines in others for line in lines)
    assert here | elsewhere == set(_written())
    assert not here & elsewhere


def _functions(lines: Iterable[str]) -> set[tuple[str, str]]:
    """The files and functions of collected scenarios."""
    found = (re.fullmatch(r".*?([^/]+\.py)::(\w+).*", line) for line in lines)
    return {(match[1], match[2]) for match in found if match}


def _written() -> Iterator[tuple[str, str]]:
    """Every scenario that there is, read and not collected."""
    for path in (PROJECT / "integration/scenarios").glob("test_*.py"):
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.M):
            yield path.name, name
