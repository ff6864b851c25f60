# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tells systemd how the daemon is (sd_notify(3)), without a library for twelve lines of socket."""

from __future__ import annotations

import contextlib
import os
import socket


class Notifier:
    """Sends state to the service manager that started us; does nothing if none did.

    ``NOTIFY_SOCKET`` is taken out of the environment, so that no child inherits it.
    """

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        microseconds = os.environ.pop("WATCHDOG_USEC", "")
        expected_pid = os.environ.pop("WATCHDOG_PID", "")
        ours = not expected_pid or expected_pid == str(os.getpid())
        self.watchdog_s = int(microseconds) / 1e6 if microseconds.isdigit() and ours else 0.0
        """The watchdog's period in seconds; 0 if there is none."""

    def send(self, *assignments: str) -> None:
        """Send ``KEY=value`` assignments, in one message, if it can be taken at once.

        A manager that is about to come back, or slow, must neither end nor hold up the daemon.
        """
        if not self._address:
            return
        address = self._address
        if address.startswith("@"):
            address = "\0" + address[1:]
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        with socket.socket(socket.AF_UNIX, kind) as sock, contextlib.suppress(OSError):
            sock.sendto("\n".join(assignments).encode(), address)
