# SPDX-License-Identifier: LGPL-2.1-or-later
"""JSON as the json module has it, without its import: xshmctl would wait for that most.

The module itself is regular expressions, enumerations and a Python version of everything; the work
is done by ``_json`` (Modules/_json.c of CPython), which it has been a thin cover of since 3.1.
Where there is no such thing, json it is.
"""

from __future__ import annotations

# xshmctl starts in the time that importing typing would take.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_SPACE = " \t\n\r"


class _Rules:
    """What ``_json`` asks of its caller, as json.decoder.JSONDecoder has it."""

    strict = True
    object_hook = None
    parse_float, parse_int = float, int

    def __init__(
        self, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any],
        parse_constant: Callable[[str], Any],
    ) -> None:  # fmt: skip
        self.object_pairs_hook, self.parse_constant = object_pairs_hook, parse_constant


def reader(
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any],
    parse_constant: Callable[[str], Any],
) -> Callable[[str], Any]:
    """Return what reads a text; the arguments are those of json.loads, and so is what is raised."""
    try:
        from _json import make_scanner
    except ImportError:
        import json

        return json.JSONDecoder(
            object_pairs_hook=object_pairs_hook, parse_constant=parse_constant
        ).decode
    # typeshed knows only of its use by the json module itself.
    scan = make_scanner(_Rules(object_pairs_hook, parse_constant))  # type: ignore[arg-type]

    def read(text: str) -> Any:
        start = len(text) - len(text.lstrip(_SPACE))
        try:
            value, end = scan(text, start)
        except StopIteration:
            raise ValueError("no JSON value") from None
        if text[end:].strip(_SPACE):
            raise ValueError("more than one JSON value")
        return value

    return read


def writer() -> Callable[[Any], str]:
    """Return what writes a value as short as may be, in Unicode."""
    try:
        from _json import encode_basestring, make_encoder
    except ImportError:
        import json

        return json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
    encode = make_encoder(None, _refuse, encode_basestring, None, ":", ",", False, False, False)

    def write(value: Any) -> str:
        return "".join(encode(value, 0))

    return write


def _refuse(value: object) -> NoReturn:
    raise TypeError(f"{type(value).__name__} is no JSON")
