# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the daemon and its keeper talk: one JSON object a line, a call and then its reply.

Both are ours, of one version and root's alone, so nothing here is a contract with anybody else.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, Final

from xshmd import errors
from xshmd.errors import HypercallFailed, XshmError

SOCKET: Final = Path("/run/xshmd-keeper/socket")
CALLS: Final = frozenset({"kept", "keep", "copy", "lend", "park", "read", "write", "drop"})
_BYTES: Final = "bytes"


def line(message: dict[str, Any]) -> bytes:
    """Return a message as it is sent; bytes in it are sent as base64."""
    return json.dumps(message, default=_encoded).encode() + b"\n"


def message(text: bytes) -> dict[str, Any]:
    """Return what was sent; ValueError if it is not one of ours."""
    found = json.loads(text, object_hook=_decoded)
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


def _encoded(value: object) -> object:
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode("ascii")}
    raise TypeError(f"{value!r} cannot be sent")


def _decoded(found: dict[str, Any]) -> Any:
    return base64.b64decode(found[_BYTES]) if found.keys() == {_BYTES} else found


def error_fields(error: XshmError) -> dict[str, Any]:
    """Return an error as it is sent."""
    return {
        "kind": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "facts": error.facts,
    }


def error_from(fields: dict[str, Any]) -> XshmError:
    """Return the error that was sent."""
    kinds = {cls.__name__: cls for cls in errors.all_errors()}
    kind = kinds.get(fields["kind"], HypercallFailed)
    return kind(fields["message"], hint=fields["hint"], **fields["facts"])
