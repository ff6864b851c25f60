# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bytes of xenstore's protocol, without I/O, so that every split and error can be tested.

The frame codec is pyxs's ``Packet``.  Facts are from Xen's ``xen/include/public/io/xs_wire.h`` and
``docs/misc/xenstore.txt``; where a server departs from them its source file is named.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Sequence
from typing import Final

from pyxs._internal import Op as PyxsOp
from pyxs._internal import Packet

from xshmd.errors import StoreError

PAYLOAD_MAX: Final = 4096
"""XENSTORE_PAYLOAD_MAX; xenstored drops a connection that sends more (core.c handle_input)."""
ABS_PATH_MAX: Final = 3072
"""XENSTORE_ABS_PATH_MAX."""
REL_PATH_MAX: Final = 2048
"""XENSTORE_REL_PATH_MAX; counts what follows ``/local/domain/<domid>/`` (core.c canonicalize)."""
DIRECTORY_REPLY_MAX: Final = 1 << 20
"""What we accept of one DIRECTORY reply.  oxenstored knows no DIRECTORY_PART and answers E2BIG to
domains only: on its socket a long directory comes in one frame (connection.ml packet_of)."""
HEADER_BYTES: Final = Packet._struct.size
RQ_ID_MAX: Final = 0xFFFF_FFFF


class Op(enum.IntEnum):
    """The message types we send or may be sent: enum xsd_sockmsg_type."""

    DIRECTORY = PyxsOp.DIRECTORY
    READ = PyxsOp.READ
    WATCH = PyxsOp.WATCH
    UNWATCH = PyxsOp.UNWATCH
    TRANSACTION_START = PyxsOp.TRANSACTION_START
    TRANSACTION_END = PyxsOp.TRANSACTION_END
    WRITE = PyxsOp.WRITE
    RM = PyxsOp.RM
    SET_PERMS = PyxsOp.SET_PERMS
    WATCH_EVENT = PyxsOp.WATCH_EVENT
    ERROR = PyxsOp.ERROR
    IS_DOMAIN_INTRODUCED = PyxsOp.IS_DOMAIN_INTRODUCED
    DIRECTORY_PART = 22
    """Newer than pyxs: XS_SET_TARGET + 3, after the removed RESTRICT and RESET_WATCHES."""


KNOWN_OPS: Final = frozenset(int(op) for op in Op)

ERROR_HINTS: Final = {
    "EINVAL": "",
    "EACCES": "xshmd must run as root in the control domain",
    "EEXIST": "",
    "EISDIR": "",
    "ENOENT": "",
    "ENOMEM": "xenstored is out of memory: see xenstore-control memreport",
    "ENOSPC": "a xenstore quota is used up: see xenstore-control quota",
    "EIO": "xenstored's data base may be damaged: see xenstore-control check",
    "ENOTEMPTY": "",
    "ENOSYS": "this xenstored does not know the request",
    "EROFS": "",
    "EBUSY": "",
    "EAGAIN": "",
    "EISCONN": "",
    "E2BIG": "xenstore moves at most 4096 bytes at once",
    "EPERM": "",
    "EQUOTA": "an oxenstored quota is used up: see /etc/xen/oxenstored.conf",
}
"""The names an ERROR reply may carry, and what to do about each.

xs_wire.h's xsd_errors, and EQUOTA, which only oxenstored sends (process.ml)."""


class WireError(Exception):
    """What the peer sent is not xenstore's protocol: nothing after it can be trusted."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One message, either way: struct xsd_sockmsg and what follows it."""

    op: int
    rq_id: int
    """Echoed by the reply; 0 in a watch event."""
    tx_id: int = 0
    """0 outside of transactions."""
    payload: bytes


def encode_frame(frame: Frame) -> bytes:
    """Return the bytes of a frame; its payload must be within the protocol's limit."""
    if len(frame.payload) > PAYLOAD_MAX:
        raise ValueError(f"a payload of {len(frame.payload)} bytes is over {PAYLOAD_MAX}")
    # _make, the namedtuple's own constructor: Packet() refuses the ops that are newer than pyxs.
    packet = Packet._make((frame.op, frame.rq_id, frame.tx_id, len(frame.payload), frame.payload))
    header: bytes = Packet._struct.pack(*packet[:-1])
    return header + frame.payload


class FrameDecoder:
    """Cuts a byte stream into frames, however the stream was split.

    Synchronization: none; one reader feeds and drains it.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def in_frame(self) -> bool:
        """Whether the stream so far ends within a frame."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        self._buffer += data

    def next_frame(self) -> Frame | None:
        """Return the next whole frame, or None until more bytes are fed.

        Raises:
            WireError: a header is impossible; so it will be again if called again.
        """
        if len(self._buffer) < HEADER_BYTES:
            return None
        op, rq_id, tx_id, nr_bytes = Packet._struct.unpack_from(self._buffer)
        if op not in KNOWN_OPS:
            raise WireError(f"unknown message type {op:#x}")
        limit = DIRECTORY_REPLY_MAX if op == Op.DIRECTORY else PAYLOAD_MAX
        if nr_bytes > limit:
            raise WireError(f"a {Op(op).name} message says it has {nr_bytes} bytes")
        end = HEADER_BYTES + nr_bytes
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[HEADER_BYTES:end])
        del self._buffer[:end]
        return Frame(op=op, rq_id=rq_id, tx_id=tx_id, payload=payload)


# What we send.

_PATH = re.compile(r"/|(?:/[A-Za-z0-9_@-]+)+", re.ASCII)  # core.c valid_chars, canonicalize
_SPECIAL = re.compile(r"@[A-Za-z0-9_@-]+(?:/[A-Za-z0-9_@-]+)*", re.ASCII)
_DOMAIN_PREFIX = re.compile(r"/local/domain/[0-9]{1,5}/", re.ASCII)
_PERMISSION = re.compile(r"[nrwb](0|[1-9][0-9]{0,4})", re.ASCII)
_DOMID_MAX: Final = 0xFFFF


def encode_path(path: str, *, special_allowed: bool = False) -> bytes:
    """Return the path's bytes.

    Args:
        path: Absolute, or (for watches and permissions) ``@introduceDomain`` and the like.
        special_allowed: Whether the ``@`` form may be.

    Raises:
        StoreError: xenstored would refuse it with EINVAL.
    """
    if special_allowed and _SPECIAL.fullmatch(path):
        pass
    elif not _PATH.fullmatch(path):
        raise StoreError(
            f"{path!r} is not a xenstore path",
            hint="absolute, of A-Z a-z 0-9 - _ @ and single slashes, none at the end",
            path=path,
            error="EINVAL",
        )
    prefix = _DOMAIN_PREFIX.match(path)
    relative = len(path) - (prefix.end() if prefix else len(path))
    if len(path) > ABS_PATH_MAX or relative > REL_PATH_MAX:
        raise StoreError(
            f"xenstore path {path[:64]}... is too long: {len(path)} characters",
            hint=f"at most {ABS_PATH_MAX}, and {REL_PATH_MAX} below /local/domain/<domid>",
            path=path[:64],
            error="EINVAL",
        )
    return path.encode("ascii")


def join_strings(*parts: bytes) -> bytes:
    """Return the parts, each ended by a NUL: the payload of most requests."""
    return b"".join(part + b"\0" for part in parts)


def encode_write(path: str, value: str) -> bytes:
    """Return the payload of a WRITE.

    Raises:
        StoreError: path or value cannot be sent.
    """
    name = encode_path(path)
    try:
        data = value.encode()
    except UnicodeEncodeError as exc:
        raise StoreError(
            f"the value for {path} cannot be encoded as UTF-8: {exc.reason}",
            path=path,
            error="EINVAL",
        ) from exc
    room = PAYLOAD_MAX - len(name) - 1
    if len(data) > room:
        raise StoreError(
            f"the value for {path} is too long: {len(data)} bytes of {room}",
            hint=ERROR_HINTS["E2BIG"],
            path=path,
            error="E2BIG",
        )
    return join_strings(name) + data


def encode_permissions(path: str, permissions: Sequence[str]) -> bytes:
    """Return the payload of a SET_PERMS; the first permission names the owner.

    Raises:
        StoreError: path or permissions cannot be sent.
    """
    name = encode_path(path, special_allowed=True)
    for permission in permissions:
        if not _PERMISSION.fullmatch(permission) or int(permission[1:]) > _DOMID_MAX:
            raise StoreError(
                f"{permission!r} is not a xenstore permission",
                hint="one of n r w b and a domid, such as n0 or r7",
                path=path,
                error="EINVAL",
            )
    if not permissions:
        raise StoreError(f"no owner given for {path}", path=path, error="EINVAL")
    payload = join_strings(name, *(permission.encode() for permission in permissions))
    if len(payload) > PAYLOAD_MAX:
        raise StoreError(f"too many permissions for {path}", path=path, error="E2BIG")
    return payload


# What we are sent.


def split_strings(payload: bytes) -> tuple[str, ...]:
    """Return the strings of a payload, each of which must end in a NUL.

    Raises:
        WireError: the last does not, or they are not ASCII (names in xenstore always are).
    """
    if not payload:
        return ()
    if not payload.endswith(b"\0"):
        raise WireError(f"strings without an end: {payload[-16:]!r}")
    try:
        return tuple(payload[:-1].decode("ascii").split("\0"))
    except UnicodeDecodeError as exc:
        raise WireError(f"a name that is not ASCII: {exc.object[:64]!r}") from exc


def decode_value(payload: bytes) -> str:
    """Return a node's value as text.

    Guests write values of their own: bytes that are not UTF-8 come out as ``\\xNN``, so that
    they neither fail a read nor (as surrogates would) whoever logs them.
    """
    return payload.decode(errors="backslashreplace")


def decode_error(payload: bytes) -> str:
    """Return the name an ERROR reply carries; an unknown one is EINVAL (xs.c get_error)."""
    name = payload.removesuffix(b"\0").decode("ascii", errors="replace")
    return name if name in ERROR_HINTS else "EINVAL"


def decode_event(payload: bytes) -> tuple[str, str]:
    """Return path and token of a WATCH_EVENT."""
    strings = split_strings(payload)
    if len(strings) != 2:
        raise WireError(f"a watch event of {len(strings)} strings")
    return strings[0], strings[1]


def decode_introduced(payload: bytes) -> bool:
    """Return what an IS_DOMAIN_INTRODUCED reply says."""
    if payload not in (b"T\0", b"F\0"):
        raise WireError(f"IS_DOMAIN_INTRODUCED answered {payload[:16]!r}")
    return payload == b"T\0"


def decode_transaction_id(payload: bytes) -> int:
    """Return the id a TRANSACTION_START reply carries: a decimal that fits in 32 bits, not 0."""
    text = payload.removesuffix(b"\0")
    if not text.isdigit() or len(text) > 10 or not 0 < int(text) <= RQ_ID_MAX:
        raise WireError(f"TRANSACTION_START answered {payload[:16]!r}")
    return int(text)


def decode_directory_part(payload: bytes) -> tuple[bytes, bytes, bool]:
    """Return generation, names (each with its NUL) and whether they are the last.

    The last part has an empty string behind its names (core.c send_directory_part).
    """
    generation, nul, names = payload.partition(b"\0")
    if not nul or not names.endswith(b"\0"):
        raise WireError(f"DIRECTORY_PART answered {payload[:32]!r}")
    if names == b"\0" or names.endswith(b"\0\0"):
        return generation, names[:-1], True
    return generation, names, False


def check_reply(frame: Frame) -> None:
    """Do nothing if the payload of a reply is what its type asks for.

    Raises:
        WireError: it is not; so that the reader of the stream hears of it, not one caller.
    """
    if frame.op == Op.DIRECTORY:
        split_strings(frame.payload)
    elif frame.op == Op.DIRECTORY_PART:
        split_strings(decode_directory_part(frame.payload)[1])
    elif frame.op == Op.TRANSACTION_START:
        decode_transaction_id(frame.payload)
    elif frame.op == Op.IS_DOMAIN_INTRODUCED:
        decode_introduced(frame.payload)
