# SPDX-License-Identifier: LGPL-2.1-or-later
"""A command that runs in dom0 is an object here: its output, how it ended, and why it could not."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from integration.agent import CHUNK_BYTES, Message

Event = tuple[Message, bytes] | Exception
"""What the reader of the channel hands on: a frame, or the reason why there will be none."""
OnOutput = Callable[[int, bytes], None]
"""Called with the stream (1 is standard output, 2 standard error) and the bytes."""
Send = Callable[[Message, bytes], None]


class Dom0Error(Exception):
    """Something asked of dom0 did not work."""


class ChannelDead(Dom0Error):
    """Dom0 does not answer any more; the message has the end of its console."""


@dataclass(frozen=True)
class Completed:
    """A command that ended.

    Attributes:
        command: as one would type it.
        status: the exit status; minus the signal's number if a signal ended it.
        stdout: what it wrote to standard output.
        stderr: what it wrote to standard error.
        seconds: how long it ran, measured in dom0.
    """

    command: str
    status: int
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def text(self) -> str:
        """Standard output as text, without the last newline."""
        return self.stdout.decode(errors="replace").removesuffix("\n")

    def describe(self) -> str:
        """All of it, for a message to a person."""
        parts = [f"$ {self.command}", f"status {self.status} after {self.seconds:.1f} s"]
        for name, data in (("stdout", self.stdout), ("stderr", self.stderr)):
            if data:
                parts.append(f"--- {name}\n{data.decode(errors='replace').rstrip()}")
        return "\n".join(parts)


class CommandFailed(Dom0Error):
    """A command ended with a status other than 0.

    Attributes:
        completed: the command and its output.
    """

    def __init__(self, completed: Completed) -> None:
        super().__init__(completed.describe())
        self.completed = completed


class CommandTimeout(CommandFailed):
    """A command took too long: it was killed, with all it had started that stayed in its group."""


class Running:
    """A command that was started. Its output comes in by itself."""

    def __init__(self, send: Send, number: int, command: str, on_output: OnOutput | None) -> None:
        self.command = command
        self._send = send
        self._number = number
        self._on_output = on_output
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._out: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._ended: tuple[Completed, bool] | None = None
        self._pid = 0

    @property
    def pid(self) -> int:
        """Its process id in dom0, which is its process group too."""
        return self._pid

    @property
    def stdout(self) -> bytes:
        """What it has written so far to standard output."""
        with self._lock:
            return bytes(self._out[0])

    @property
    def stderr(self) -> bytes:
        """What it has written so far to standard error."""
        with self._lock:
            return bytes(self._out[1])

    def write(self, data: bytes) -> None:
        """Give it input (it must have been started with `stdin=True`)."""
        for at in range(0, len(data), CHUNK_BYTES):
            self._send({"op": "stdin", "id": self._number}, data[at : at + CHUNK_BYTES])

    def close_stdin(self) -> None:
        """Its input ends here."""
        self._send({"op": "stdin", "id": self._number}, b"")

    def kill(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to its process group. That is no error if it has ended."""
        self._send({"op": "kill", "id": self._number, "signal": int(number)}, b"")

    def resize(self, rows: int, columns: int) -> None:
        """Tell its terminal, if it has one, how large it is."""
        request = {"op": "resize", "id": self._number, "rows": rows, "columns": columns}
        self._send(request, b"")

    def wait(self, timeout_s: float | None = None, *, check: bool = False) -> Completed:
        """Wait until it ends.

        Args:
            timeout_s: how long to wait, without end if None; the command runs on.
            check: raise if its status is not 0.

        Raises:
            TimeoutError: it still runs.
            CommandFailed: it failed and `check` is set.
            CommandTimeout: it ran into the limit it was started with.
            ChannelDead: dom0 does not answer.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._ended is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                event = self._events.get(timeout=left)
            except queue.Empty:
                raise TimeoutError(f"still running: {self.command}") from None
            if isinstance(event, Exception):
                self._events.put(event)  # for whoever asks next
                raise event
            message, _ = event
            if "error" in message:
                error = Dom0Error(f"$ {self.command}\ncould not be started: {message['error']}")
                self._events.put(error)
                raise error
            completed = Completed(
                self.command, message["exit"], self.stdout, self.stderr, message["seconds"]
            )
            self._ended = completed, message["late"]
        completed, late = self._ended
        if late:
            raise CommandTimeout(completed)
        if check and completed.status != 0:
            raise CommandFailed(completed)
        return completed

    def take(self, event: Event) -> None:
        """On the reader's thread: keep output, hand on everything else."""
        if not isinstance(event, Exception):
            message, blob = event
            if "pid" in message:
                self._pid = message["pid"]
                return
            if "out" in message:
                with self._lock:
                    self._out[message["out"] - 1].extend(blob)
                self._show(message["out"], blob)
                return
        self._events.put(event)

    def _show(self, stream: int, data: bytes) -> None:
        """Call back. If that fails, the failure is for whoever waits, not for the reader."""
        if self._on_output is not None:
            try:
                self._on_output(stream, data)
            except Exception as error:
                self._on_output = None
                self._events.put(error)
