# SPDX-License-Identifier: LGPL-2.1-or-later
"""A test wants to say `run this in dom0` and get an answer, or a reason: this is how it says it.

The other end is `integration.agent`. Any number of threads may use one `Dom0`.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import shlex
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from integration.agent import CHUNK_BYTES, Decoder, FrameError, Message, encode
from integration.commands import (
    ChannelDead,
    CommandFailed,
    CommandTimeout,
    Completed,
    Dom0Error,
    Event,
    OnOutput,
    Running,
)

__all__ = [
    "ChannelDead",
    "Command",
    "CommandFailed",
    "CommandTimeout",
    "Completed",
    "Dom0",
    "Dom0Error",
    "OnOutput",
    "Running",
]

Command = str | Sequence[str | Path]
# Past the command's own time limit: an emulated machine may take this long to say that it is over.
_GRACE_S = 30.0


class Dom0:
    """The command channel to a booted machine's dom0."""

    def __init__(self, wire: socket.socket, describe_death: Callable[[], str]) -> None:
        """Take over the host's end of the channel.

        Args:
            wire: connected to the agent's port; `close` closes it.
            describe_death: says how the machine is, for the message of a `ChannelDead`.
        """
        self._wire = wire
        self._describe_death = describe_death
        self._writing = threading.Lock()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._waiting: dict[int, Callable[[Event], None]] = {}
        self._dead: ChannelDead | None = None
        self._agent: int | None = None
        self._greeted = threading.Event()
        self._reader = threading.Thread(target=self._read, name="xshmd-rig-dom0", daemon=True)
        self._reader.start()

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the agent says hello.

        Raises:
            ChannelDead: it did not.
        """
        if not self._greeted.wait(timeout_s):
            raise self._death(f"dom0's agent did not answer within {timeout_s:.0f} s")
        if self._dead is not None:
            raise self._dead

    def run(
        self,
        command: Command,
        *,
        timeout_s: float = 180,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        check: bool = True,
        on_output: OnOutput | None = None,
    ) -> Completed:
        """Run a command in dom0 to its end.

        Args:
            command: a list of words, or a string for the shell.
            timeout_s: after this its process group is killed in dom0.
            stdin: its standard input.
            env: added to its environment.
            cwd: its working directory.
            check: raise if its status is not 0.
            on_output: called with every piece of output as it comes, on another thread.

        Raises:
            CommandFailed: it failed and `check` is set.
            CommandTimeout: it took too long, whether `check` is set or not.
            ChannelDead: dom0 does not answer.
        """
        running = self.spawn(
            command, timeout_s=timeout_s, stdin=bool(stdin), env=env, cwd=cwd, on_output=on_output
        )
        if stdin:
            running.write(stdin)
            running.close_stdin()
        try:
            return running.wait(timeout_s + _GRACE_S, check=check)
        except TimeoutError as error:
            raise self._death(f"no word from dom0 about: {running.command}") from error

    def spawn(
        self,
        command: Command,
        *,
        timeout_s: float | None = None,
        stdin: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        pty: bool = False,
        on_output: OnOutput | None = None,
    ) -> Running:
        """Start a command in dom0 and do not wait for it. The arguments are those of `run`.

        Args:
            command: a list of words, or a string for the shell.
            timeout_s: after this its process group is killed in dom0; never if None.
            stdin: whether input will be written; otherwise it is empty.
            env: added to its environment.
            cwd: its working directory.
            pty: run it on a terminal of its own (input is then always possible).
            on_output: called with every piece of output as it comes, on another thread.
        """
        argv = command if isinstance(command, str) else [str(word) for word in command]
        text = argv if isinstance(argv, str) else shlex.join(argv)
        number = next(self._numbers)
        running = Running(self._send, number, text, on_output)
        self._register(number, running.take)
        request: dict[str, Any] = {"op": "start", "id": number, "argv": argv, "stdin": stdin}
        request |= {"timeout_s": timeout_s, "env": dict(env or {}), "cwd": cwd, "pty": pty}
        self._send(request)
        return running

    def put(self, path: str | Path, data: bytes | str, mode: int = 0o644) -> None:
        """Write a file in dom0; folders are made as needed, and the file appears whole."""
        content = data.encode() if isinstance(data, str) else data
        number, events = self._call()
        pieces = range(0, max(len(content), 1), CHUNK_BYTES)
        for at in pieces:
            last = at == pieces[-1]
            request = {"op": "put", "id": number, "path": str(path), "mode": mode, "last": last}
            self._send(request, content[at : at + CHUNK_BYTES])
        self._finish(number, events, f"writing {path}")

    def get(self, path: str | Path) -> bytes:
        """Read a file of dom0."""
        number, events = self._call()
        self._send({"op": "get", "id": number, "path": str(path)})
        return self._finish(number, events, f"reading {path}")

    def power_off(self) -> None:
        """Ask dom0 to end the machine, without waiting for that."""
        self._send({"op": "poweroff"})

    def close(self) -> None:
        """Give up the channel."""
        with contextlib.suppress(OSError):
            self._wire.shutdown(socket.SHUT_RDWR)
        self._reader.join(timeout=5)
        self._wire.close()

    def _call(self) -> tuple[int, queue.SimpleQueue[Event]]:
        number = next(self._numbers)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._register(number, events.put)
        return number, events

    def _finish(
        self,
        number: int,
        events: queue.SimpleQueue[Event],
        what: str,
        timeout_s: float = 120,
    ) -> bytes:
        """Collect a call's data until it is done. The time limit is for each piece."""
        data = bytearray()
        try:
            while True:
                try:
                    event = events.get(timeout=timeout_s)
                except queue.Empty:
                    raise self._death(f"no word from dom0 about {what}") from None
                if isinstance(event, Exception):
                    raise event
                message, blob = event
                if "error" in message:
                    raise Dom0Error(f"{what}: {message['error']}")
                data += blob
                if "done" in message:
                    return bytes(data)
        finally:
            with self._lock:
                self._waiting.pop(number, None)

    def _register(self, number: int, take: Callable[[Event], None]) -> None:
        with self._lock:
            if self._dead is not None:
                raise self._dead
            self._waiting[number] = take

    def _send(self, message: Message, blob: bytes = b"") -> None:
        if self._dead is not None:
            raise self._dead
        try:
            with self._writing:
                self._wire.sendall(encode(message, blob))
        except OSError as error:
            raise self._death(f"the channel to dom0 broke: {error}") from error

    def _read(self) -> None:
        """The reader's thread: hand every frame to whoever waits for it."""
        decoder = Decoder()
        reason = "the channel to dom0 was closed"
        try:
            while data := self._wire.recv(CHUNK_BYTES):
                for message, blob in decoder.feed(data):
                    self._dispatch(message, blob)
        except (OSError, FrameError) as error:
            reason = f"the channel to dom0 broke: {error}"
        self._fail(reason)

    def _dispatch(self, message: Message, blob: bytes) -> None:
        if "hello" in message:
            if self._agent is not None:
                self._fail("dom0's agent was started anew; what it was doing is lost")
            self._agent = message["hello"]
            self._greeted.set()
            return
        with self._lock:
            last = "exit" in message or "error" in message
            number = message.get("id", 0)
            take = self._waiting.pop(number, None) if last else self._waiting.get(number)
        if take is not None:
            take((message, blob))

    def _fail(self, reason: str) -> None:
        death = self._death(reason)
        with self._lock:
            self._dead = death
            waiting, self._waiting = self._waiting, {}
        for take in waiting.values():
            take(death)
        self._greeted.set()

    def _death(self, reason: str) -> ChannelDead:
        return ChannelDead(f"{reason}\n{self._describe_death()}")
