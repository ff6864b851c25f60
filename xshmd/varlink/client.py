# SPDX-License-Identifier: LGPL-2.1-or-later
"""A synchronous client for ``io.xshmd.Regions``: the standard library only, so that it starts fast.

An error reply comes out as the exception that went into it on the other side, see
:mod:`xshmd.errors`.
"""

from __future__ import annotations

# The plain sockets below the socket module, which takes longer to import than all that is ours.
import _socket as socket
import math
import os
import sys
import time

from xshmd import errors
from xshmd.varlink import wire
from xshmd.varlink.wire import Call, Flag, Parameters, Reply

# xshmctl starts in the time that importing typing would take.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Final

INTERFACE: Final = "io.xshmd.Regions"
DEFAULT_PATH: Final = "/run/xshmd/io.xshmd.Regions"
_SERVICE: Final = "org.varlink.service."
_RECEIVE_BYTES: Final = 256 * 1024
_SIGNAL_CHECK_S: Final = 0.25
"""How long one wait lasts: a signal that comes just before recv() blocks is only seen after it."""
_POLL_S: Final = 0.001
"""How long a look takes that should take no time: a socket with no time at all does not wait."""
_LONGEST_S: Final = 1e9
_DAEMON_HINT: Final = "see systemctl status xshmd"
_OWN_FIELDS: Final = ("message", "hint", "facts", "self")


class Client:
    """One connection to the daemon, made at the first call and again after a failed one.

    Synchronization: none; use one per thread.

    Args:
        path: The daemon's socket.
        timeout_s: How long any one call may take altogether.
    """

    def __init__(self, path: str = DEFAULT_PATH, timeout_s: float = 30.0) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None
        self._decoder = wire.Decoder(wire.MAX_REPLY_BYTES)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; may be called again without harm."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def hang_up(self) -> None:
        """Close the connection, though others have it open too, as a forked child may."""
        if self._socket is not None:
            try:  # noqa: SIM105 - contextlib takes longer to import than all that is ours
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the daemon was faster
        self.close()

    def call(self, method: str, /, **parameters: Any) -> Parameters:
        """Call a method and return its output; parameters that are None are left out.

        Raises:
            DaemonUnreachable: Nobody answers, or not to us.
            XshmError: Whatever the daemon replied.
        """
        return self.call_within(self._timeout_s, method, **parameters)

    def call_within(self, timeout_s: float, method: str, /, **parameters: Any) -> Parameters:
        """As :meth:`call`, for a call that may take longer or shorter than others."""
        return self._first_reply(method, parameters, Flag.NONE, timeout_s)

    def stream(self, method: str, /, **parameters: Any) -> Iterator[Parameters]:
        """Call a method with ``more`` and yield its replies as they come, however late.

        Raises:
            DaemonUnreachable: Nobody answers, or no longer.
            XshmError: Whatever the daemon replied.
        """
        full_name, message = _encoded(method, parameters, Flag.MORE)
        try:
            reply = self._exchange(full_name, message, time.monotonic() + self._timeout_s)
            while reply.continues:
                yield reply.parameters
                reply = self._exchange(full_name, b"", math.inf)
        except BaseException:
            self.close()
            raise
        if reply.error:
            raise error_of(reply, method=full_name)
        yield reply.parameters

    def begin(self, method: str, /, **parameters: Any) -> Parameters:
        """Call a method with ``more`` and return its first reply; then use :meth:`next_reply`.

        Raises:
            DaemonUnreachable: Nobody answers.
            XshmError: Whatever the daemon replied.
        """
        return self._first_reply(method, parameters, Flag.MORE, self._timeout_s)

    def next_reply(self, timeout_s: float) -> Parameters | None:
        """Return the next reply of what :meth:`begin` began; None if there is none in time.

        Raises:
            DaemonUnreachable: The daemon ended it, or is gone.
            XshmError: Whatever the daemon replied.
        """
        if self._socket is None:
            raise errors.DaemonUnreachable("the connection to xshmd is closed", hint=_DAEMON_HINT)
        try:
            reply = self._exchange("", b"", time.monotonic() + max(timeout_s, _POLL_S))
        except errors.TimedOut:
            return None
        except errors.XshmError:
            self.close()
            raise
        if not reply.continues:
            self.close()
            if reply.error:
                raise error_of(reply, method="")
            raise errors.DaemonUnreachable("xshmd has stopped", hint=_DAEMON_HINT)
        return reply.parameters

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when there is a reply; -1 if closed."""
        return -1 if self._socket is None else self._socket.fileno()

    def _first_reply(
        self, method: str, parameters: Parameters, flag: Flag, timeout_s: float
    ) -> Parameters:
        full_name, message = _encoded(method, parameters, flag)
        try:
            reply = self._exchange(full_name, message, time.monotonic() + timeout_s)
        except BaseException:
            # A reply that comes later must not be taken for the answer to the next call.
            self.close()
            raise
        if reply.error:
            raise error_of(reply, method=full_name)
        return reply.parameters

    def _exchange(self, method: str, message: bytes, deadline: float) -> Reply:
        try:
            stream = self._connected(deadline)
            if message:
                stream.settimeout(_left(deadline))
                stream.sendall(message)
            while (answer := self._decoder.next_message()) is None:
                stream.settimeout(min(_left(deadline), _SIGNAL_CHECK_S))
                try:
                    data = stream.recv(_RECEIVE_BYTES)
                except TimeoutError:
                    continue
                if not data:
                    raise ConnectionResetError
                self._decoder.feed(data)
            return wire.parse_reply(answer)
        except TimeoutError as exc:
            raise errors.TimedOut(
                f"xshmd did not answer {method} in time", hint=_DAEMON_HINT
            ) from exc
        except wire.ProtocolViolation as exc:
            raise errors.DaemonUnreachable(
                f"what answers at {self._path} does not speak Varlink: {exc}", hint=_DAEMON_HINT
            ) from exc
        except OSError as exc:
            raise self._unreachable(exc, connected=self._socket is not None) from exc

    def _connected(self, deadline: float) -> socket.socket:
        if self._socket is None:
            stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                # Waits in line where many connect at once; a socket with a timeout of Python's own
                # does not wait, but fails with EAGAIN (unix_stream_connect() in Linux).
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(_left(deadline)))
                stream.connect(self._path)
            except BlockingIOError as exc:
                stream.close()
                raise TimeoutError from exc
            except BaseException:
                stream.close()
                raise
            self._socket = stream
            self._decoder = wire.Decoder(wire.MAX_REPLY_BYTES)
        return self._socket

    def _unreachable(self, cause: OSError, *, connected: bool) -> errors.DaemonUnreachable:
        if connected:
            return errors.DaemonUnreachable(
                "xshmd closed the connection in the middle of a call", hint=_DAEMON_HINT
            )
        reason = os.strerror(cause.errno) if cause.errno else str(cause)
        hint = _DAEMON_HINT
        if isinstance(cause, PermissionError):
            hint = "run it as root"
        elif isinstance(cause, FileNotFoundError):
            hint = "start the daemon with systemctl start xshmd, and see systemctl status xshmd"
        return errors.DaemonUnreachable(
            f"no xshmd answers at {self._path}: {reason}", hint=hint, path=self._path
        )


def _encoded(method: str, parameters: Parameters, flag: Flag) -> tuple[str, bytes]:
    full_name = method if "." in method else f"{INTERFACE}.{method}"
    given = {name: value for name, value in parameters.items() if value is not None}
    message = wire.encode_call(Call(full_name, given, flag))
    if len(message) > wire.MAX_LARGE_CALL_BYTES:
        raise errors.UsageError(f"a call of {method} has {len(message)} bytes: too many")
    if wire.weight(message) > wire.MAX_WEIGHT:
        raise errors.UsageError(
            f"a call of {method} says too much at once", hint="say it in several calls"
        )
    return full_name, message


def _timeval(seconds: float) -> bytes:
    """Return a struct timeval of the 64-bit systems that Xen runs on; 0 would be for ever."""
    words = divmod(max(1, int(min(seconds, _LONGEST_S) * 1e6)), 1_000_000)
    return b"".join(word.to_bytes(8, sys.byteorder) for word in words)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def error_of(reply: Reply, *, method: str) -> errors.XshmError:
    """Return the exception an error reply stands for."""
    if reply.error.startswith(_SERVICE):
        return _service_error(reply, method)
    message = reply.parameters.get("message")
    hint = reply.parameters.get("hint") or ""
    for cls in errors.all_errors():
        if reply.error == f"{INTERFACE}.{cls.varlink_error}" and isinstance(message, str):
            return cls(message, hint=hint, **_facts(reply.parameters))
    return errors.XshmError(f"{method} failed with {reply.error} {reply.parameters}")


def _facts(parameters: Parameters) -> dict[str, errors.Fact]:
    others = parameters.get("facts")
    found = {**(others if isinstance(others, dict) else {}), **parameters}
    return {
        name: value
        for name, value in found.items()
        if name not in _OWN_FIELDS and isinstance(value, (str, int))
    }


def _service_error(reply: Reply, method: str) -> errors.XshmError:
    name = reply.error.removeprefix(_SERVICE)
    if name == "PermissionDenied":
        return errors.DaemonUnreachable("xshmd does not talk to this user", hint="run it as root")
    if name == "InvalidParameter":
        parameter = str(reply.parameters.get("parameter", ""))
        return errors.UsageError(
            f"xshmd does not accept {parameter} as {method} gives it", parameter=parameter
        )
    return errors.XshmError(
        f"xshmd does not answer {method}: {name}",
        hint="xshmctl and the running xshmd differ in version: systemctl restart xshmd",
    )
