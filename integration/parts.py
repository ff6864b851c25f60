# SPDX-License-Identifier: LGPL-2.1-or-later
"""One after the other the tests take three quarters of an hour: `make test` runs them side by side.

An emulated dom0 keeps one processor busy, so there are as many machines at once as processors;
what needs no machine runs beside them, in the moments in which a machine waits. Each part writes to
a log of its own below artefacts/test/. Shown are a line when a part ends, now and then how far the
others are, and the whole log of one that failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final, TextIO

PROJECT: Final = Path(__file__).resolve().parent.parent
LOGS: Final = PROJECT / "artefacts" / "test"
MACHINE_MIB: Final = 3500
"""What an emulated machine and its QEMU may take of the host's memory."""
TELL_EVERY_S: Final = 30.0
LEAVE_S: Final = 10.0
"""How long parts that are asked to end may take; a machine whose part is killed dies with it."""


@dataclass(frozen=True)
class Part:
    """A part of the tests that can run beside the others.

    Attributes:
        name: says what it is; its log is called so.
        command: run in the clone's root.
        boots: whether it boots a machine. Those that do not run one after the other.
    """

    name: str
    command: tuple[str, ...]
    boots: bool = True

    @property
    def log(self) -> Path:
        """What it writes."""
        return LOGS / f"{self.name}.log"


def all_parts(arches: Sequence[str], shares: int = 2) -> list[Part]:
    """Everything `make test` does, in the order of starting: what takes longest comes first.

    Args:
        arches: of the machines.
        shares: on how many machines an architecture's scenarios are spread.
    """
    python = sys.executable
    scenarios = (python, "-m", "pytest", "-v", "integration/scenarios")
    parts = [
        Part("lint", ("make", "--no-print-directory", "lint"), boots=False),
        Part("unit", ("make", "--no-print-directory", "unit"), boots=False),
        Part("unit-debian", ("make", "--no-print-directory", "unit-debian"), boots=False),
    ]
    rigs = [
        Part(
            f"rig-{arch}-{share}",
            (*scenarios, "--arch", arch, "-m", "not own_boot", "--share", f"{share}/{shares}"),
        )
        for arch in sorted(arches, reverse=True)  # x86_64 takes longer to emulate
        for share in range(1, shares + 1)
    ]
    either = [word for arch in arches for word in ("--arch", arch)]
    rigs.insert(shares, Part("rig-own-boot", (*scenarios, *either, "-m", "own_boot")))
    words = ("--arch", min(arches), "--xenstored", "oxenstored", "-m", "either_store")
    return [*parts, *rigs, Part("rig-oxenstored", (*scenarios, *words))]


def machines_at_once() -> int:
    """How many machines this host can emulate side by side.

    Four on two processors were seen to do no more scenarios a minute than two do.
    """
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    room = int(available[1]) // 1024 // MACHINE_MIB if available else 1
    return max(1, min(len(os.sched_getaffinity(0)), room))


def _environment() -> dict[str, str]:
    """Ours without what `make` says to those it starts: a part is not one of its jobs."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}


@dataclass
class _Running:
    part: Part
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def progress(self) -> str:
        """How far it says it is, or what it said last."""
        text = self.part.log.read_text(errors="replace")
        if percents := re.findall(r"\[ *(\d+%)\]$", text, re.M):
            return f"{self.part.name} {percents[-1]}"
        lines = text.split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f"{self.part.name} ({last[:60]})" if last else self.part.name


class Runner:
    """Runs parts side by side and tells how it goes."""

    def __init__(self, parts: Sequence[Part], machines: int, out: TextIO) -> None:
        """Say what to run; nothing is started before `run`.

        Args:
            parts: what to run, in this order as far as there is room.
            machines: how many that boot one may run at once.
            out: where to tell.
        """
        self._waiting = list(parts)
        self._total = len(parts)
        self._machines = machines
        self._out = out
        self._running: list[_Running] = []
        self._failed: list[str] = []
        self._began = time.monotonic()

    def run(self) -> int:
        """Run all of them to their ends; 0 if none failed, 130 if a signal came."""
        LOGS.mkdir(parents=True, exist_ok=True)
        self._tell(f"{self._total} parts, {self._machines} machines at a time; their logs: {LOGS}/")
        told = time.monotonic()
        try:
            while self._waiting or self._running:
                self._start_what_fits()
                self._reap()
                if time.monotonic() - told > TELL_EVERY_S and self._running:
                    self._tell("... " + ", ".join(r.progress() for r in self._running))
                    told = time.monotonic()
                time.sleep(0.1)
        except KeyboardInterrupt:
            self._tell("interrupted: " + ", ".join(r.part.name for r in self._running))
            return 130
        finally:
            self._end_all()
        return self._sum_up()

    def _tell(self, text: str) -> None:
        seconds = int(time.monotonic() - self._began)
        print(f"[{seconds // 60:2}:{seconds % 60:02}] {text}", file=self._out, flush=True)

    def _start_what_fits(self) -> None:
        for part in list(self._waiting):
            alike = sum(r.part.boots == part.boots for r in self._running)
            if alike < (self._machines if part.boots else 1):
                self._waiting.remove(part)
                self._running.append(self._start(part))

    def _start(self, part: Part) -> _Running:
        with part.log.open("wb") as log:
            # A session of its own: Ctrl-C reaches it only through `_end_all`, and only once.
            process = subprocess.Popen(
                part.command, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=_environment(), start_new_session=True,
            )  # fmt: skip
        return _Running(part, process)

    def _reap(self) -> None:
        for running in list(self._running):
            status = running.process.poll()
            if status is None:
                continue
            self._running.remove(running)
            text = running.part.log.read_text(errors="replace")
            last = next((s for s in reversed(text.split("\n")) if s.strip()), "").strip("= ")
            name, seconds = running.part.name, running.seconds
            if status == 0 and "skipped" not in last:
                self._tell(f"{name} passed in {seconds:.0f} s: {last}")
                continue
            self._failed.append(name)
            why = f"status {status}" if status else "a test was skipped"
            self._tell(f"{name} FAILED after {seconds:.0f} s, {why}; it said:")
            print(text, file=self._out, flush=True)

    def _end_all(self) -> None:
        """End what still runs, in good order if it lets itself be ended so."""
        for number in (signal.SIGINT, signal.SIGKILL):
            for running in self._running:
                # Also of one that has ended: what it started may go on.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(running.process.pid, number)
            deadline = time.monotonic() + LEAVE_S
            for running in self._running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running.process.wait(max(0.0, deadline - time.monotonic()))

    def _sum_up(self) -> int:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = used.ru_utime + used.ru_stime
        if self._failed:
            self._tell(f"FAILED: {', '.join(self._failed)} (of {self._total} parts)")
            return 1
        self._tell(f"all {self._total} parts passed ({cpu_s:.0f} s of processor time)")
        return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything, or the parts that are named; the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m integration.parts", description=__doc__)
    parser.add_argument("--arch", action="append", help="may be given twice (default: both)")
    parser.add_argument("--machines", type=int, default=0, help="how many to emulate at once")
    parser.add_argument("--list", action="store_true", help="say what the parts are")
    parser.add_argument("part", nargs="*", help="its name (default: all)")
    chosen = parser.parse_args(arguments)
    parts = all_parts(chosen.arch or ("arm64", "x86_64"))
    unknown = set(chosen.part) - {part.name for part in parts}
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    parts = [part for part in parts if not chosen.part or part.name in chosen.part]
    if chosen.list:
        print("\n".join(part.name for part in parts))
        return 0

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # Also where they were ignored: the parts' programs must not inherit that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    machines = chosen.machines or machines_at_once()
    return Runner(parts, machines, sys.stdout).run()


if __name__ == "__main__":
    sys.exit(main())
