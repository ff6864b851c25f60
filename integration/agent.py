# SPDX-License-Identifier: LGPL-2.1-or-later
"""Scraping a console is guesswork: this runs in dom0 and does what the rig asks, over a wire.

The wire is a virtio-serial port. Frames go both ways; each has a small JSON message and raw bytes
(a blob), so a file need not be dressed up as text:

    magic "xRIG" | length of the JSON | length of the blob | JSON | blob

Requests have an id, and so have their answers: commands run side by side, one thread each.
This file is copied to dom0 alone, so it needs nothing but Python. `integration.dom0` is the other
end and imports the framing from here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import queue
import selectors
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PORT_NAME = "xshmd.rig"
CHUNK_BYTES = 256 << 10
# Neither side has a reason to send more; a length beyond it means that the two are out of step.
MAX_PART_BYTES = 16 << 20

Message = dict[str, Any]
_HEADER = struct.Struct("!4sII")
_MAGIC = b"xRIG"


class FrameError(Exception):
    """The bytes on the wire are no frame: the two ends are out of step."""


def encode(message: Message, blob: bytes = b"") -> bytes:
    """One frame."""
    text = json.dumps(message, separators=(",", ":")).encode()
    if max(len(text), len(blob)) > MAX_PART_BYTES:
        raise FrameError(f"a frame of {len(text)} + {len(blob)} bytes is too long to send")
    return _HEADER.pack(_MAGIC, len(text), len(blob)) + text + blob


class Decoder:
    """Turns the byte stream back into frames, however it was cut."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Message, bytes]]:
        """Take in bytes and yield every frame that is now complete."""
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            magic, text_bytes, blob_bytes = _HEADER.unpack_from(self._buffer)
            if magic != _MAGIC:
                raise FrameError(f"expected a frame, got {bytes(self._buffer[:40])!r}")
            if max(text_bytes, blob_bytes) > MAX_PART_BYTES:
                raise FrameError(f"a frame claims {text_bytes} + {blob_bytes} bytes")
            blob_at = _HEADER.size + text_bytes
            end = blob_at + blob_bytes
            if len(self._buffer) < end:
                return
            try:
                message = json.loads(self._buffer[_HEADER.size : blob_at])
            except ValueError as error:
                raise FrameError(f"a frame's message is no JSON: {error}") from error
            if not isinstance(message, dict):
                raise FrameError(f"a frame's message is no object: {message!r}")
            blob = bytes(self._buffer[blob_at:end])
            del self._buffer[:end]
            yield message, blob


Send = Callable[[Message, bytes], None]


class _Job:
    """One command: its process, the threads that serve it, and what may be asked of it."""

    def __init__(self, request: Message, send: Send) -> None:
        self._id: int = request["id"]
        self._send = send
        self._timeout_s: float | None = request.get("timeout_s")
        self._stdin: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._terminal: int | None = None
        environment = {**os.environ, **request.get("env", {})}
        argv = request["argv"]
        if isinstance(argv, str):
            argv = ["/bin/sh", "-c", argv]
        if request.get("pty"):
            self._process = self._start_on_terminal(argv, environment, request)
        else:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE if request.get("stdin") else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                cwd=request.get("cwd"),
                start_new_session=True,
            )
        threading.Thread(target=self._feed, daemon=True).start()

    def _start_on_terminal(
        self, argv: list[str], environment: dict[str, str], request: Message
    ) -> subprocess.Popen[bytes]:
        ours, theirs = pty.openpty()
        self._terminal = ours
        self.resize(request.get("rows", 24), request.get("columns", 80))
        try:
            return subprocess.Popen(
                argv,
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                env=environment,
                cwd=request.get("cwd"),
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )
        finally:
            os.close(theirs)

    def resize(self, rows: int, columns: int) -> None:
        if self._terminal is not None:
            size = struct.pack("HHHH", rows, columns, 0, 0)
            fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)

    def kill(self, number: int) -> None:
        """Signal the whole process group, as Ctrl-C on a terminal would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def write(self, data: bytes | None) -> None:
        """Queue bytes for the command's standard input; None closes it."""
        self._stdin.put(data)

    def _feed(self) -> None:
        pipe = self._process.stdin
        fd = self._terminal if pipe is None else pipe.fileno()
        try:
            while fd is not None and (data := self._stdin.get()) is not None:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
        except OSError:
            pass  # the command closed its end: not our business
        if pipe is not None:
            pipe.close()

    def serve(self) -> None:
        """Pass on output until the command ends, then say how it ended."""
        began = time.monotonic()
        late = False
        pidfd = os.pidfd_open(self._process.pid)
        streams: dict[int, int] = {}
        if self._terminal is not None:
            streams[self._terminal] = 1
        for number, pipe in ((1, self._process.stdout), (2, self._process.stderr)):
            if pipe is not None:
                streams[pipe.fileno()] = number
        with selectors.DefaultSelector() as selector:
            for fd in (pidfd, *streams):
                os.set_blocking(fd, fd == pidfd)
                selector.register(fd, selectors.EVENT_READ)
            running = True
            while running:
                left = None
                if self._timeout_s is not None and not late:
                    left = max(0.0, began + self._timeout_s - time.monotonic())
                events = selector.select(left)
                if not events and left is not None:
                    late = True
                    self.kill(signal.SIGKILL)
                for key, _ in events:
                    if key.fd == pidfd:
                        running = False
                    elif not self._pass_on(key.fd, streams[key.fd]):
                        selector.unregister(key.fd)
            # A daemon the command left behind may hold its output open: take what is there, no more
            for key in list(selector.get_map().values()):
                while key.fd != pidfd and self._pass_on(key.fd, streams[key.fd], True):
                    pass
        status = self._process.wait()
        self._stdin.put(None)
        os.close(pidfd)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        answer = {"id": self._id, "exit": status, "late": late}
        self._send({**answer, "seconds": round(time.monotonic() - began, 4)}, b"")
        if self._terminal is not None:
            os.close(self._terminal)

    def _pass_on(self, fd: int, stream: int, ended: bool = False) -> bool:
        """Send what can be read now. False when there will be no more (or, `ended`, none yet)."""
        try:
            data = os.read(fd, CHUNK_BYTES)
        except BlockingIOError:
            return not ended
        except OSError:  # a terminal whose last user has gone says EIO
            return False
        if data:
            self._send({"id": self._id, "out": stream}, data)
        return bool(data)


class Agent:
    """Serves the wire: reads requests on one thread, answers on many."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._writing = threading.Lock()
        self._jobs: dict[int, _Job] = {}
        self._files: dict[int, tuple[Path, int]] = {}

    def send(self, message: Message, blob: bytes = b"") -> None:
        frame = memoryview(encode(message, blob))
        with self._writing:
            while frame:
                frame = frame[os.write(self._fd, frame) :]

    def serve(self) -> None:
        """Answer until the wire is closed for good."""
        decoder = Decoder()
        self.send({"hello": os.getpid()})
        while True:
            data = os.read(self._fd, CHUNK_BYTES)
            if not data:  # nobody at the other end, for now
                time.sleep(0.1)
                continue
            for message, blob in decoder.feed(data):
                try:
                    self._handle(message, blob)
                except Exception as error:
                    self.send({"id": message.get("id"), "error": f"{error}"})

    def _handle(self, request: Message, blob: bytes) -> None:
        operation, number = request["op"], request.get("id", 0)
        if operation == "start":
            job = self._jobs[number] = _Job(request, self.send)
            self.send({"id": number, "pid": job._process.pid})
            threading.Thread(target=self._run, args=(number, job), daemon=True).start()
        elif operation in ("stdin", "kill", "resize"):
            running = self._jobs.get(number)
            if running is None:
                return  # it has just ended
            if operation == "stdin":
                running.write(blob or None)
            elif operation == "kill":
                running.kill(request["signal"])
            else:
                running.resize(request["rows"], request["columns"])
        elif operation == "put":
            self._put(number, request, blob)
        elif operation == "get":
            threading.Thread(target=self._get, args=(number, request), daemon=True).start()
        elif operation == "poweroff":
            os.sync()
            subprocess.Popen(["busybox", "poweroff", "-f"])
        else:
            raise ValueError(f"no such operation: {operation}")

    def _run(self, number: int, job: _Job) -> None:
        try:
            job.serve()
        finally:
            del self._jobs[number]

    def _put(self, number: int, request: Message, blob: bytes) -> None:
        """Write one piece of a file; with the last, the file takes its name."""
        path = Path(request["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{number}")
        with part.open("ab") as file:
            file.write(blob)
        if request["last"]:
            part.chmod(request["mode"])
            part.rename(path)
            self.send({"id": number, "done": True})

    def _get(self, number: int, request: Message) -> None:
        try:
            with Path(request["path"]).open("rb") as file:
                while block := file.read(CHUNK_BYTES):
                    self.send({"id": number, "data": True}, block)
        except OSError as error:
            self.send({"id": number, "error": str(error)})
        else:
            self.send({"id": number, "done": True})


def open_port(timeout_s: float = 30) -> int:
    """Open the port by its name; it may come up late."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for entry in Path("/sys/class/virtio-ports").glob("*"):
            if (entry / "name").read_text().strip() == PORT_NAME:
                return os.open(f"/dev/{entry.name}", os.O_RDWR | os.O_CLOEXEC)
        time.sleep(0.1)
    raise TimeoutError(f"there is no virtio-serial port named {PORT_NAME}")


def main() -> int:
    """Serve the port until the machine ends."""
    Agent(open_port()).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
