# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ``xl`` commands that ``xshmctl create`` is made of.

Each runs in a process group of its own: a Ctrl-C reaches xshmctl alone, which then takes down what
was begun in its own order.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Final

from xshmd.ctl import render
from xshmd.ctl.signals import Interrupted, Signals
from xshmd.errors import XshmError

_STDERR: Final = 2


class Xl:
    """xl, as found on PATH.

    Args:
        signals: What is caught while it runs.

    Raises:
        XshmError: There is none.
    """

    def __init__(self, signals: Signals) -> None:
        found = shutil.which("xl")
        if found is None:
            raise XshmError("there is no xl on PATH", hint="install xen-utils, and run as root")
        self._path = found
        self._signals = signals

    def create(self, arguments: Sequence[str]) -> int:
        """Run ``xl create`` and return its exit status.

        When interrupted it is let finish, as an xl that is killed leaves half a domain behind; when
        interrupted again it is stopped all the same.
        """
        try:
            with self._signals.held():  # Once begun, it must be known here.
                process = subprocess.Popen(
                    [self._path, "create", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=_STDERR,
                    process_group=0,
                )
            return process.wait()
        except Interrupted:
            render.say("interrupted; waiting for xl, then taking the guest down (again to hurry)")
            try:
                process.wait()
            except Interrupted:
                process.terminate()
                with self._signals.dropped():
                    process.wait()
            raise

    def domid_of(self, name: str) -> str | None:
        """Return the domid of the domain of that name, or None if there is none."""
        done = self._quietly("domid", name)
        domid = done.stdout.strip()
        return domid if done.returncode == 0 and domid.isdecimal() else None

    def unpause(self, domid: str) -> None:
        """Let the domain run.

        Raises:
            XshmError: xl failed.
        """
        done = self._quietly("unpause", domid)
        if done.returncode:
            raise XshmError(f"xl unpause {domid} failed: {done.stderr.strip()}")

    def destroy(self, domid: str) -> bool:
        """Destroy the domain; return whether xl did."""
        return self._quietly("destroy", domid).returncode == 0

    def become_console(self, domid: str) -> None:
        """Replace this process by the console of the domain."""
        os.execv(self._path, ["xl", "console", domid])

    def _quietly(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._path, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            process_group=0,
        )
