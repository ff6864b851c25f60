# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine whose daemon can be asked for figures that only it has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from integration import Machine
from integration.dom0 import Running
from integration.scenarios.conftest import CONFIG_FOLDERS, warm_up
from integration.scenarios.host import WAIT_S, Host, artefacts

PROGRAM: Final = "/rig/watched_daemon.py"
HELD: Final = "/run/xshmd-held"
HERE: Final = Path(__file__).resolve().parent


class WatchedHost(Host):
    """A host whose daemon says what it holds, and has a listener all the time."""

    program = ("env", f"XSHMD_HELD={HELD}", "python3", PROGRAM)

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._listener: Running | None = None
        self.life = 0

    def start_next(self) -> None:
        """Start another daemon, and somebody who listens to it."""
        if self._listener is not None:
            self._listener.wait(WAIT_S)  # it ends as its daemon does
        self.start_daemon()
        self.life += 1
        listener = self._listener = self.dom0.spawn(["xshmctl", "-j", "monitor"])
        self.wait(lambda: listener.stdout, "the listener is told what there is")

    @property
    def heard(self) -> int:
        """How much the listener has been told."""
        assert self._listener is not None
        return len(self._listener.stdout)

    def held(self) -> dict[str, int]:
        """What the daemon holds, and what it has asked for since its start."""
        self.dom0.run(f"rm -f {HELD}; kill -USR1 {self.daemon_pid}")
        text = self.wait(
            lambda: self.dom0.run(f"cat {HELD}", check=False).text, "the daemon says what it holds"
        )
        figures: dict[str, int] = json.loads(text)
        return figures


@contextmanager
def booted(arch: str, name: str, limit_s: float, **unusual: Any) -> Iterator[WatchedHost]:
    """Boot a machine and warm it up.

    Args:
        arch: its architecture.
        name: of the folder for what it leaves.
        limit_s: for how long it may run.
        unusual: what is unusual about it, see :class:`~integration.Machine`.
    """
    folder = artefacts(arch, name)
    with Machine(arch, artefacts=folder, time_limit_s=limit_s, **unusual) as machine:
        machine.dom0.run(f"mkdir -p {CONFIG_FOLDERS}")
        machine.dom0.put(PROGRAM, (HERE / "watched_daemon.py").read_bytes(), mode=0o755)
        host = WatchedHost(machine)
        host.start_keeper()
        host.start_next()
        warm_up(host)
        try:
            yield host
        finally:
            host.close()
