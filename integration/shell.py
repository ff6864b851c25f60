# SPDX-License-Identifier: LGPL-2.1-or-later
"""When a test fails one wants to look around: a shell in dom0, on the user's own terminal."""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import termios
import tty

from integration.dom0 import Dom0


def run_shell(dom0: Dom0) -> int:
    """Copy between the terminal and a shell in dom0 until the shell ends; its exit status."""
    fd = sys.stdin.fileno()
    on_terminal = os.isatty(fd)
    shell = dom0.spawn(
        ["/bin/bash", "-i"],
        pty=True,
        env={"TERM": os.environ.get("TERM", "dumb")},
        cwd="/root",
        on_output=lambda _stream, data: _show(data),
    )

    def resize(*_: object) -> None:
        size = shutil.get_terminal_size()
        shell.resize(size.lines, size.columns)

    resize()
    before_signal = signal.signal(signal.SIGWINCH, resize)
    before = termios.tcgetattr(fd) if on_terminal else None
    try:
        if on_terminal:
            tty.setraw(fd)
        while True:
            try:
                return shell.wait(0.02).status
            except TimeoutError:
                pass
            if select.select([fd], [], [], 0.1)[0]:
                data = os.read(fd, 4096)
                # The end of piped input is what Ctrl-D says on a terminal.
                shell.write(data or b"\x04")
                if not data:
                    return shell.wait().status
    finally:
        if before is not None:
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, before_signal)


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
