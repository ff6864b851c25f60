# SPDX-License-Identifier: LGPL-2.1-or-later
"""Boots once and kills the daemon before every effect of every operation: `make crash-on-xen`.

    python3 -m integration.crash --arch arm64 --seconds 3600 [--operation NAME] [--every N]

Prints a line an operation; returns 1 if anything did not come to be as it must.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Final

from integration import Machine
from integration.arch import ARCHES
from integration.crash.operations import OPERATIONS, Operation, Scene
from integration.crash.promises import PROMISES
from integration.dom0 import Dom0Error
from integration.scenarios.conftest import CONFIG_FOLDERS, warm_up
from integration.scenarios.host import Host, State, artefacts, remove

PROGRAM: Final = "/rig/killed_daemon.py"
KILL_FILE: Final = "/run/xshmd-kill"
HERE: Final = Path(__file__).resolve().parent
MAX_FAILURES: Final = 5
REACHED_S: Final = 60.0
"""An operation that has no such effect for so long will not have it."""
SETTLED: Final = ("attached", "rebooting")
"""What a guest may be when its operation is over; one that ended unseen is awaited for a while."""
XEN_ARGS: Final = ("xsm=dummy",)
"""Under SILO, Debian's default on Arm, no guest may be granted a holder's pages."""
KEPT_PAGES: Final = 4
"""What Xen may keep for itself of hundreds of domains; one that leaks costs thirty."""


class NotReached(Exception):
    """An operation had fewer effects than when they were counted."""


class CrashingHost(Host):
    """A host whose daemon can be told where to end."""

    program = ("env", f"XSHMD_KILL={KILL_FILE}", "python3", PROGRAM)

    def arm(self, number: int) -> None:
        """Let the daemon end before its n-th effect from now on; 0 only counts them."""
        new = f"{KILL_FILE}.new"  # it must never be there half written
        self.dom0.run(f"rm -f {KILL_FILE}.log; echo {number} > {new}; mv {new} {KILL_FILE}")

    def disarm(self) -> list[str]:
        """Return the effects there were."""
        text = self.dom0.run(f"cat {KILL_FILE}.log; rm -f {KILL_FILE} {KILL_FILE}.log", check=False)
        return text.text.splitlines()


def play(host: CrashingHost, operation: Operation, number: int, wanted: State) -> list[str]:
    """Play an operation with the daemon killed before its n-th effect; return the effects.

    Raises:
        NotReached: it has had no such effect this time, and all was well.
        AssertionError: something did not come to be as it must.
    """
    scene = Scene(host)
    begin = operation(scene)
    host.arm(number)
    end = begin()
    killed = number > 0 and _is_killed(host)
    if killed:
        effects = host.disarm()
        host.await_killed()
        host.start_daemon()
        end()
    else:
        end()
        host.wait_state_still()  # all that belongs to it, however late
        effects = host.disarm()
        host.stop_daemon()  # it counts once in its life
        host.start_daemon()
    for guest in host.guests():
        assert guest["state"] in SETTLED, guest
    scene.finish()
    host.clean_up()
    difference = host.wait_state(wanted, kept_pages=KEPT_PAGES)
    assert not difference, f"the machine is not as it was:\n{difference}"
    if number and not killed:
        raise NotReached
    return effects


def _is_killed(host: Host) -> bool:
    """Wait for the end of the daemon; whether it came."""
    try:
        host.wait(lambda: not host.daemon_runs, "", REACHED_S)
    except AssertionError:
        return False
    return True


class Run:
    """All that is played in one boot, and what came of it.

    Args:
        host: The machine.
        every: Every how manieth effect is one to be killed before.
        deadline: When to stop, on the monotonic clock.
    """

    def __init__(self, host: CrashingHost, every: int, deadline: float) -> None:
        self._host, self._every, self._deadline = host, every, deadline
        self._wanted = host.state()
        self.counts: dict[str, dict[str, int]] = {}
        self.failed = 0

    def play(self, operation: Operation) -> None:
        """Kill the daemon before every effect of an operation."""
        effects = self._attempt(operation, 0, "not killed")
        count = self.counts[operation.__name__] = {"effects": len(effects), "kills": 0}
        for number in range(1, len(effects) + 1, self._every):
            if time.monotonic() > self._deadline or self.failed >= MAX_FAILURES:
                break
            how = f"killed before {number}, {effects[number - 1]}"
            count["kills"] += bool(self._attempt(operation, number, how))
        words = ", ".join(f"{number} {name}" for name, number in count.items())
        print(f"{operation.__name__}: {words}", flush=True)

    def _attempt(self, operation: Operation, number: int, how: str) -> list[str]:
        try:
            return play(self._host, operation, number, self._wanted)
        except NotReached:
            return []
        except (AssertionError, Dom0Error) as problem:
            self.failed += 1
            print(f"FAILED {operation.__name__}, {how}: {problem}", flush=True)
            self._start_over()
            return []

    def _start_over(self) -> None:
        host = self._host
        host.disarm()
        host.clean_up()
        if host.daemon_runs:
            host.stop_daemon()
        host.start_daemon()
        for region in host.regions():
            host.apply(remove(region["id"], force=True))
        host.wait_state(self._wanted, kept_pages=KEPT_PAGES)


def main() -> int:
    """Boot and run."""
    parser = argparse.ArgumentParser(prog="python3 -m integration.crash", description=__doc__)
    parser.add_argument("--arch", choices=tuple(ARCHES), default="arm64")
    parser.add_argument("--seconds", type=float, default=7200)
    parser.add_argument("--every", type=int, default=1, help="every how manieth effect")
    names = {operation.__name__: operation for operation in (*OPERATIONS, *PROMISES)}
    parser.add_argument("--operation", action="append", choices=tuple(names))
    options = parser.parse_args()
    chosen = [names[name] for name in options.operation or names]
    folder = artefacts(options.arch, "crash")
    with Machine(
        options.arch, artefacts=folder, time_limit_s=options.seconds + 3600, xen_args=XEN_ARGS
    ) as machine:
        machine.dom0.run(f"mkdir -p {CONFIG_FOLDERS}")
        machine.dom0.put(PROGRAM, (HERE / "killed_daemon.py").read_bytes(), mode=0o755)
        host = CrashingHost(machine)
        host.start_keeper()
        host.start_daemon()
        warm_up(host)
        try:
            deadline = time.monotonic() + options.seconds  # from here on: a boot may take long
            run = Run(host, options.every, deadline)
            for operation in chosen:
                if time.monotonic() < deadline and run.failed < MAX_FAILURES:
                    run.play(operation)
        finally:
            host.close()
    (folder / "crash.json").write_text(json.dumps(run.counts, indent=1))
    kills = sum(count["kills"] for count in run.counts.values())
    print(f"{kills} kills, {run.failed} failures")
    return 1 if run.failed or not kills else 0


if __name__ == "__main__":
    sys.exit(main())
