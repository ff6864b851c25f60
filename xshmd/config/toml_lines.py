# SPDX-License-Identifier: LGPL-2.1-or-later
"""In which line of a TOML text each key is, which the standard library's parser does not tell.

This is no second parser: of a text that ``tomllib`` takes it finds the lines, and of any other it
promises only to come to an end soon.  It also refuses the two things for which ``tomllib`` takes
time or stack without bound: keys of many parts and values nested deeply.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from xshmd.errors import ConfigUnreadable

MAX_KEY_PARTS: Final = 16
"""Our longest key, ``region.ID.guest.NAME.begin``, has five."""
MAX_NESTING: Final = 16

Path = tuple[str, ...]
"""A key with all the tables it is in, the outermost first."""

_TOKEN: Final = re.compile(
    r'''(?P<blank>[ \t]+|\#[^\n]*)
      | (?P<newline>\r?\n)
      | (?P<string>"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""(?:"{0,2})
          | \'\'\'[^']*(?:'(?!'')[^']*)*\'\'\'(?:'{0,2}))
      | (?P<quoted>"[^"\\\n]*(?:\\.[^"\\\n]*)*"|'[^'\n]*')
      | (?P<op>[][{}=,.])
      | (?P<bare>[^][{}=,.\s"'\#]+)''',
    re.VERBOSE | re.DOTALL,
)
_OPENING: Final = frozenset("[{")
_CLOSING: Final = frozenset("]}")


def key_lines(text: str, file: str) -> Mapping[Path, int]:
    """Return the line, from 1, in which each key or table was first said.

    Args:
        text: The whole text.
        file: What messages call it.

    Raises:
        ConfigUnreadable: a key has too many parts or a value nests too deeply.
    """
    return _Scanner(text, file).lines()


def line_of(lines: Mapping[Path, int], path: Path) -> int:
    """Return the line of a key, else that of the innermost table around it, else 0."""
    while path:
        if path in lines:
            return lines[path]
        path = path[:-1]
    return 0


class _Scanner:
    def __init__(self, text: str, file: str) -> None:
        self._file = file
        self._line = 1
        self._tokens = self._scan(text)
        self._found: dict[Path, int] = {}

    def lines(self) -> dict[Path, int]:
        table: Path = ()
        for kind, text in self._tokens:
            if kind in ("blank", "newline"):
                continue
            line = self._line
            if (kind, text) == ("op", "["):
                table, _ = self._key("]")
                self._note(table, line)
                self._skip_value()
            elif kind in ("quoted", "bare"):
                path, found = self._key("=", first=_plain(kind, text))
                self._note(table + path, line)
                if found:
                    self._skip_value()
            else:
                break
        return self._found

    def _key(self, end: str, first: str | None = None) -> tuple[Path, bool]:
        """Read the parts of a key up to what ends it; False if the text is not that of a key."""
        parts = [] if first is None else [first]
        for kind, text in self._tokens:
            if kind in ("quoted", "bare"):
                parts.append(_plain(kind, text))
                if len(parts) > MAX_KEY_PARTS:
                    self._refuse(f"a key has more than {MAX_KEY_PARTS} parts")
            elif kind == "newline" or (kind == "op" and text == end):
                return tuple(parts), kind == "op"
            elif kind == "string":
                break
        return tuple(parts), False

    def _skip_value(self) -> None:
        depth = 0
        parts = 0
        for kind, text in self._tokens:
            if kind == "newline" and depth <= 0:
                return
            if kind != "op":
                continue
            # A key of many parts may also be in an inline table.
            parts = parts + 1 if text == "." else 0
            depth += (text in _OPENING) - (text in _CLOSING)
            if depth > MAX_NESTING:
                self._refuse(f"values nest deeper than {MAX_NESTING}")
            if parts > MAX_KEY_PARTS:
                self._refuse(f"a key has more than {MAX_KEY_PARTS} parts")

    def _note(self, path: Path, line: int) -> None:
        for length in range(1, len(path) + 1):
            self._found.setdefault(path[:length], line)

    def _scan(self, text: str) -> Iterator[tuple[str, str]]:
        at = 0
        while found := _TOKEN.match(text, at):
            at = found.end()
            yield found.lastgroup or "", found[0]
            self._line += found[0].count("\n")

    def _refuse(self, what: str) -> None:
        raise ConfigUnreadable(
            f"{self._file}:{self._line}: {what}",
            hint="no key of ours is like that: see xshmd.toml(5)",
            file=self._file,
            line=self._line,
            rule="too-deep",
        )


def _plain(kind: str, text: str) -> str:
    # A key with an escape in it is not found again: its message has the line of its table.
    return text[1:-1] if kind == "quoted" else text
