# SPDX-License-Identifier: LGPL-2.1-or-later
"""A TOML file and its drop-ins as one tree in which every value knows its file and line."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, Final, NoReturn

from xshmd.config.toml_lines import Path, key_lines, line_of
from xshmd.config.xlcfg import MAX_BYTES
from xshmd.errors import ConfigUnreadable
from xshmd.model import Place

_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_AT: Final = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """Anything but a table, as ``tomllib`` returns it."""

    value: Any
    place: Place


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """A table, its keys in the order in which they were first said."""

    entries: Mapping[str, Value | Table]
    place: Place


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A file's content, and what messages call it."""

    file: str
    data: bytes


def read_tree(sources: Iterable[Source]) -> Table:
    """Read files of which each adds to those before it, or replaces what they say, key by key.

    Raises:
        ConfigUnreadable: one is not TOML, or beyond what we read.
    """
    merged = Table({}, Place(file=""))
    for source in sources:
        tree = _parse(source)
        merged = _merged(merged, tree) if merged.entries else tree
    return merged


def dotted(path: Path) -> str:
    """Write a key with its tables as TOML does."""
    return ".".join(quoted_key(part) for part in path)


def quoted_key(part: str) -> str:
    """Write one part of a key as TOML does."""
    return part if _BARE_KEY.fullmatch(part) else quoted(part)


def quoted(text: str) -> str:
    """Write a string as TOML does."""
    return '"' + "".join(_escaped(char) for char in text) + '"'


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    return char if char.isprintable() else f"\\U{ord(char):08x}"


def _parse(source: Source) -> Table:
    file = source.file
    text = _decode(source)
    lines = key_lines(text, file)
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        _unreadable(file, str(err), text)
    except (ValueError, RecursionError) as err:
        # tomllib lets through what int() and datetime say of numbers and dates that are none.
        _unreadable(file, f"there is a value that cannot be: {str(err).partition(';')[0]}", text)
    return _table(tree, (), file, lines)


def _decode(source: Source) -> str:
    file, data = source.file, source.data
    if len(data) > MAX_BYTES:
        _fail(
            file,
            0,
            f"it is longer than {MAX_BYTES} bytes",
            "is it another file that you meant? Spread regions over several",
            "too-long",
        )
    nul = data.find(b"\0")
    if nul >= 0:
        line = data.count(b"\n", 0, nul) + 1
        _fail(file, line, "there is a NUL byte", "remove it", "not-toml")
    try:
        text = data.decode()
    except UnicodeDecodeError as err:
        line = data.count(b"\n", 0, err.start) + 1
        what = f"byte {data[err.start]:#04x} is not UTF-8"
        _fail(file, line, what, "save the file as UTF-8", "not-utf-8")
    if text.startswith("\ufeff"):
        what = "there is a byte order mark"
        _fail(file, 1, what, "save the file as UTF-8 without it", "not-toml")
    return text


def _unreadable(file: str, message: str, text: str) -> NoReturn:
    found = _AT.search(message)
    line = 0
    if found:
        line = int(found[1]) if found[1] else text.count("\n") + (not text.endswith("\n"))
        message = message[: found.start()]
    _fail(file, line, f"it is not TOML: {_short(message)}", _remedy(message), "not-toml")


def _remedy(message: str) -> str:
    if "overwrite" in message or "twice" in message or "mutate" in message:
        return "a key or table is said twice in one file: leave one of the two out"
    if "Invalid value" in message:
        return 'a text needs quotes, as in size = "1 MiB"'
    return "see xshmd.toml(5) for how it is written"


def _fail(file: str, line: int, what: str, hint: str, rule: str) -> NoReturn:
    place = Place(file=file, line=line)
    raise ConfigUnreadable(f"{place}: {what}", hint=hint, file=file, line=line, rule=rule)


def _table(tree: Mapping[str, Any], path: Path, file: str, lines: Mapping[Path, int]) -> Table:
    entries: dict[str, Value | Table] = {}
    for key, value in tree.items():
        inner = (*path, key)
        if isinstance(value, dict):
            entries[key] = _table(value, inner, file, lines)
        else:
            entries[key] = Value(value, _place(inner, file, lines))
    return Table(entries, _place(path, file, lines))


def _place(path: Path, file: str, lines: Mapping[Path, int]) -> Place:
    return Place(file=file, key=_short(dotted(path)), line=line_of(lines, path))


def _merged(below: Table, above: Table) -> Table:
    entries = dict(below.entries)
    for key, new in above.entries.items():
        old = entries.get(key)
        if isinstance(old, Table) and isinstance(new, Table):
            new = _merged(old, new)
        entries[key] = new
    return Table(entries, below.place)
