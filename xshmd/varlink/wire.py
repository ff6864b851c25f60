# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Varlink wire without any I/O: bytes to messages and back, by the rules of UAPI.20.

Both sides use it, so it imports the standard library only and little of that.  Whatever a peer
sends that has no well-defined answer is a :class:`ProtocolViolation`, which closes a connection.
"""

from __future__ import annotations

from xshmd.varlink import json_text

# xshmctl starts in the time that importing typing would take.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, NoReturn

    Parameters = dict[str, Any]
else:
    Parameters = dict

MAX_CALL_BYTES: Final = 64 * 1024
"""What a call may be long unless its method says otherwise."""
MAX_LARGE_CALL_BYTES: Final = 1024 * 1024
"""What any call may be long: one that carries a configuration file."""
MAX_CONFIG_BYTES: Final = 256 * 1024
"""How long a guest's configuration may be in one: to read it takes twenty times the memory."""
MAX_REPLY_BYTES: Final = 16 * 1024 * 1024
"""What a client is ready to buffer of one reply."""
MAX_DEPTH: Final = 32
"""How deep the values of a message may be nested."""

MAX_WEIGHT: Final = 1 << 16
"""How heavy a call may be: a value takes up to a hundred times its length of memory."""
_WEIGHTY: Final = (b"{", b"[", b":", b",")


class ProtocolViolation(Exception):
    """The peer sent something Varlink does not allow; the connection can only be closed."""


class Flag(str):
    """How many replies a caller is ready to take; at most one may be asked for.

    Not an enum, whose import takes xshmctl as long as all of ours.
    """

    __slots__ = ()
    NONE: Flag
    MORE: Flag
    ONEWAY: Flag
    UPGRADE: Flag


Flag.NONE, Flag.MORE, Flag.ONEWAY, Flag.UPGRADE = map(Flag, ("", "more", "oneway", "upgrade"))


class _Message:
    """What calls and replies have in common: they are what their fields are."""

    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Message) or type(self) is not type(other):
            return NotImplemented
        return self._values() == other._values()

    def __repr__(self) -> str:
        said = (f"{name}={getattr(self, name)!r}" for name in self.__slots__)
        return f"{type(self).__name__}({', '.join(said)})"

    def _values(self) -> list[object]:
        return [getattr(self, name) for name in self.__slots__]


class Call(_Message):
    """A method call as it came in; nothing of it but its form has been checked.

    Args:
        method: Full name of the method.
        parameters: What it is given.
        flag: How many replies the caller takes.
        size_bytes: Length of the message it came in, for limits that depend on the method.
    """

    __slots__ = ("flag", "method", "parameters", "size_bytes")

    def __init__(
        self, method: str, parameters: Parameters, flag: Flag = Flag.NONE, size_bytes: int = 0
    ) -> None:
        self.method, self.parameters = method, parameters
        self.flag, self.size_bytes = flag, size_bytes


class Reply(_Message):
    """One reply to a call.

    Args:
        parameters: What it says.
        error: Full name of the error; empty for success.
        continues: Whether more replies follow.
    """

    __slots__ = ("continues", "error", "parameters")

    def __init__(self, parameters: Parameters, error: str = "", continues: bool = False) -> None:
        self.parameters, self.error, self.continues = parameters, error, continues


class Decoder:
    """Splits a byte stream into messages at each NUL, holding at most one unfinished one.

    Args:
        max_message_bytes: A message longer than this, NUL not counted, is a violation.
    """

    def __init__(self, max_message_bytes: int) -> None:
        self._max = max_message_bytes
        self._buffer = bytearray()
        self._searched = 0

    @property
    def pending(self) -> bool:
        """Whether bytes are buffered that no message has been made of."""
        return bool(self._buffer)

    @property
    def buffered_bytes(self) -> int:
        """How many bytes are buffered."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Add bytes as they were received; call :meth:`next_message` until it returns None."""
        self._buffer += data

    def next_message(self) -> bytes | None:
        """Return the next whole message without its NUL, or None until more is fed.

        Raises:
            ProtocolViolation: It is, or already can only become, too long.
        """
        end = self._buffer.find(b"\0", self._searched)
        if (len(self._buffer) if end < 0 else end) > self._max:
            raise ProtocolViolation(f"a message is longer than {self._max} bytes")
        if end < 0:
            self._searched = len(self._buffer)
            return None
        with memoryview(self._buffer) as buffered:
            message = bytes(buffered[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return message


def weight(message: bytes) -> int:
    """Return about how many values a message has, never too few: that is what reading it costs."""
    return sum(message.count(mark) for mark in _WEIGHTY)


def weight_to_read(message: bytes) -> int:
    """Return the weight of a message that is read; one that is too heavy is not, at no cost."""
    found = weight(message)
    return found if found <= MAX_WEIGHT else 0


def parse_call(message: bytes) -> Call:
    """Return the call a message holds.

    Raises:
        ProtocolViolation: It is no call, so that no reply to it is defined.
    """
    if weight(message) > MAX_WEIGHT:
        raise ProtocolViolation(f"a call has more than {MAX_WEIGHT} values")
    fields = _object(message)
    method = _take(fields, "method", str)
    if method is None:
        raise ProtocolViolation("a call has no method")
    parameters = _take(fields, "parameters", dict)
    flags = [flag for flag in (Flag.MORE, Flag.ONEWAY, Flag.UPGRADE) if _take(fields, flag, bool)]
    if len(flags) > 1:
        raise ProtocolViolation("a call has more than one of more, oneway and upgrade")
    _only_extensions_left(fields)
    return Call(method, parameters or {}, flags[0] if flags else Flag.NONE, len(message))


def parse_reply(message: bytes) -> Reply:
    """Return the reply a message holds.

    Raises:
        ProtocolViolation: It is no reply.
    """
    fields = _object(message)
    error = _take(fields, "error", str)
    parameters = _take(fields, "parameters", dict)
    continues = _take(fields, "continues", bool)
    _only_extensions_left(fields)
    if error is not None and (continues or not error):
        raise ProtocolViolation("an error reply continues or has no name")
    return Reply(parameters or {}, error or "", bool(continues))


def encode_call(call: Call) -> bytes:
    """Return the call as the bytes to send, NUL included."""
    fields: Parameters = {"method": call.method}
    if call.parameters:
        fields["parameters"] = call.parameters
    if call.flag is not Flag.NONE:
        fields[call.flag] = True
    return _encode(fields)


def encode_reply(reply: Reply) -> bytes:
    """Return the reply as the bytes to send, NUL included."""
    fields: Parameters = {}
    if reply.error:
        fields["error"] = reply.error
    if reply.parameters:
        fields["parameters"] = reply.parameters
    if reply.continues:
        fields["continues"] = True
    return _encode(fields)


def _encode(fields: Parameters) -> bytes:
    # Lone surrogates come from undecodable file names; the wire is UTF-8 without exception.
    return _write(fields).encode("utf-8", "replace") + b"\0"


def _object(message: bytes) -> Parameters:
    try:
        untrusted_value = _read(message.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise ProtocolViolation("a message is not JSON in UTF-8") from exc
    if not isinstance(untrusted_value, dict):
        raise ProtocolViolation("a message is not a JSON object")
    _check_tree(untrusted_value)
    return untrusted_value


def _unique(pairs: list[tuple[str, Any]]) -> Parameters:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ProtocolViolation("a message has a key twice")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ProtocolViolation(f"a message has {name}, which JSON does not know")


_read, _write = json_text.reader(_unique, _no_constant), json_text.writer()


def _check_tree(root: Parameters) -> None:
    """Refuse nesting beyond MAX_DEPTH and strings that no UTF-8 can carry back."""
    level: list[Any] = [root]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                _check_text(value)
            elif isinstance(value, dict):
                for key in value:
                    _check_text(key)
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
        if not below:
            return
        level = below
    raise ProtocolViolation(f"a message is nested deeper than {MAX_DEPTH} levels")


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise ProtocolViolation("a message has half a surrogate pair") from exc


def _take(fields: Parameters, name: str, kind: type) -> Any:
    """Remove and return a field of one type; None where it is absent or null, which are equal."""
    value = fields.pop(name, None)
    if value is not None and type(value) is not kind:
        raise ProtocolViolation(f"{name} is not a {kind.__name__}")
    return value


def _only_extensions_left(fields: Parameters) -> None:
    """Refuse unknown keys; vendor extensions are those with a dot in their name, and ignored."""
    for name in fields:
        if "." not in name:
            raise ProtocolViolation(f"a message has the unknown key {name[:40]!r}")
