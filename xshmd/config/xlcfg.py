# SPDX-License-Identifier: LGPL-2.1-or-later
"""The language of xl's configuration files, so that we read in them what xl reads in them.

It looks like Python and is not: this follows ``tools/libs/util/libxlu_cfg_{l.l,y.y}`` and
``libxlu_cfg.c`` (the same in Xen 4.17 to 4.22) token by token, and
``tests/test_config_xlcfg_differential.py`` holds it against the real library.  We are stricter than
xl on purpose with NUL bytes (which abort xl), ``\\0``..``\\7`` escapes (which xl turns into nothing
where it accepts them), text that is not UTF-8, and the limits below.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NoReturn, TypeAlias

from xshmd.errors import ConfigUnreadable
from xshmd.model import Place

MAX_BYTES: Final = 1 << 20
"""The longest configuration we read; real ones have a few kilobytes."""
MAX_DEPTH: Final = 64
"""How deep lists may nest; xl itself uses two levels."""

Plain: TypeAlias = "str | Sequence[Plain]"
"""A value without its line numbers: a string, or a list of values."""


@dataclasses.dataclass(frozen=True, slots=True)
class XlString:
    """A quoted string or a number: xl does not tell them apart once they are read."""

    text: str
    line: int

    def plain(self) -> Plain:
        return self.text


@dataclasses.dataclass(frozen=True, slots=True)
class XlList:
    """A list in square brackets."""

    items: tuple[XlValue, ...]
    line: int
    """The line of the opening bracket."""

    def plain(self) -> Plain:
        return [item.plain() for item in self.items]


XlValue: TypeAlias = "XlString | XlList"


@dataclasses.dataclass(frozen=True, slots=True)
class XlSetting:
    """What a key has in the end."""

    value: XlValue
    line: int
    """The line of the key's last assignment."""
    added: bool = False
    """The last assignment was ``+=``; xl then does not take the value for a number."""


class XlConfig(Mapping[str, XlSetting]):
    """A parsed configuration: each key with what it has after the last line."""

    def __init__(self, file: str, settings: Mapping[str, XlSetting]) -> None:
        self.file = file
        self._settings = dict(settings)

    def __getitem__(self, key: str) -> XlSetting:
        return self._settings[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def text(self, key: str) -> str | None:
        """Return the key's string; None if it is absent or (as xl warns and ignores) a list."""
        setting = self._settings.get(key)
        return setting.value.text if setting and isinstance(setting.value, XlString) else None

    def place(self, key: str) -> Place:
        """Return where the key was last assigned, or just the file if it never was."""
        setting = self._settings.get(key)
        return Place(file=self.file, key=key, line=setting.line if setting else 0)

    def plain(self) -> dict[str, Plain]:
        """Return the keys and values without line numbers."""
        return {key: setting.value.plain() for key, setting in self._settings.items()}


def parse(text: str | bytes, file: str) -> XlConfig:
    """Read a configuration.

    Args:
        text: The whole configuration.
        file: What messages call it.

    Raises:
        ConfigUnreadable: xl would refuse it, or it is beyond what we read.
    """
    return _Parser(_decode(text, file), file).config()


def quote(text: str) -> str:
    """Write a string so that xl reads exactly it.

    Raises:
        ValueError: it has a control character that the language cannot say.
    """
    if "\0" in text:
        raise ValueError("xl's language cannot say a NUL character")
    return '"' + "".join(_TO_ESCAPE.get(char, char) for char in text) + '"'


def render(settings: Mapping[str, Plain]) -> str:
    """Write a configuration that :func:`parse` reads back as ``settings``."""
    return "".join(f"{key} = {_render_value(value)}\n" for key, value in settings.items())


def _render_value(value: Plain) -> str:
    if isinstance(value, str):
        return quote(value)
    items = ",\n    ".join(_render_value(item) for item in value)
    return f"[\n    {items},\n]" if items else "[]"


def shown(text: str) -> str:
    """Return the user's text as a message may have it: short, without control characters."""
    short = text if len(text) <= 40 else text[:37] + "..."
    return short if short.isprintable() else ascii(short)[1:-1]


_ESCAPES: Final = {
    '"': '"', "'": "'", "\\": "\\",
    "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v",
}  # fmt: skip
_TO_ESCAPE: Final = {char: f"\\{name}" for name, char in _ESCAPES.items() if char != "'"}

# One alternative per rule of libxlu_cfg_l.l; none is a prefix of what another could match longer.
_TOKEN: Final = re.compile(
    r"""(?P<blank>[ \t]+)
      | (?P<newline>\n|\#[^\n]*\n)
      | (?P<ident>[a-z][._0-9a-z]*)
      | (?P<number>[0-9][0-9a-fx]*)
      | (?P<string>'(?:[^'\\\n]|\\[^\n])*'|"(?:[^"\\\n]|\\[^\n])*")
      | (?P<op>\+=|[][=,;])""",
    re.VERBOSE,
)
_GARBAGE: Final = re.compile(r"[^ \t\n]+")

_VALUE: Final = "a value: a number, a string in quotes or a [list]"


@dataclasses.dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    """``ident``, ``number``, ``string``, ``newline``, ``end``, or an operator itself."""
    text: str
    line: int

    def __str__(self) -> str:
        if self.kind == "newline":
            return "a comment" if self.text.startswith("#") else "the end of the line"
        return "the end of the file" if self.kind == "end" else f"'{shown(self.text)}'"


def _decode(text: str | bytes, file: str) -> str:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(data) > MAX_BYTES:
        raise ConfigUnreadable(
            f"{file}: it is longer than {MAX_BYTES} bytes",
            hint="this cannot be a guest's configuration",
            file=file,
            line=0,
            rule="too-long",
        )
    nul = data.find(b"\0")
    if nul >= 0:
        _fail(file, data.count(b"\n", 0, nul) + 1, "there is a NUL byte", "remove it")
    try:
        return data.decode()
    except UnicodeDecodeError as err:
        line = data.count(b"\n", 0, err.start) + 1
        _fail(
            file,
            line,
            f"byte {data[err.start]:#04x} is not UTF-8",
            "save the file as UTF-8",
            "not-utf-8",
        )


def _fail(file: str, line: int, what: str, hint: str, rule: str = "not-xl") -> NoReturn:
    raise ConfigUnreadable(f"{file}:{line}: {what}", hint=hint, file=file, line=line, rule=rule)


class _Parser:
    """Recursive descent; the grammar needs one token of look-ahead."""

    def __init__(self, text: str, file: str) -> None:
        self._text = text
        self._file = file
        self._at = 0
        self._line = 1
        self._token = self._scan()

    def config(self) -> XlConfig:
        settings: dict[str, XlSetting] = {}
        while self._token.kind != "end":
            if self._token.kind in ("newline", ";"):
                self._next()
                continue
            self._assignment(settings)
            if self._token.kind not in ("newline", ";", "end"):
                self._expected("the end of the line or ';' after the value")
        return XlConfig(self._file, settings)

    def _assignment(self, settings: dict[str, XlSetting]) -> None:
        key = self._token
        if key.kind != "ident":
            self._expected("a key in lower case, as in key = value")
        self._next()
        operator = self._token.kind
        if operator not in ("=", "+="):
            self._expected(f"'=' or '+=' after '{shown(key.text)}'")
        self._next()
        value = self._value(0)
        before = settings.get(key.text)
        if operator == "+=" and before is not None:
            value = self._sum(key, before.value, value)
        # As in libxlu_cfg.c find(): the last assignment is the first one found.
        settings[key.text] = XlSetting(value, key.line, added=operator == "+=")

    def _sum(self, key: _Token, old: XlValue, new: XlValue) -> XlValue:
        if isinstance(old, XlString) and isinstance(new, XlString):
            return XlString(old.text + new.text, new.line)
        if isinstance(old, XlList) and isinstance(new, XlList):
            return XlList(old.items + new.items, new.line)
        kinds = ("a string", "a list") if isinstance(new, XlString) else ("a list", "a string")
        _fail(
            self._file,
            key.line,
            f"'{key.text} +=' adds {kinds[0]} to {kinds[1]}",
            f"'{key.text}' was assigned in line {old.line}; make both of one kind",
        )

    def _value(self, depth: int) -> XlValue:
        token = self._token
        if token.kind in ("string", "number"):
            self._next()
            text = self._unquote(token) if token.kind == "string" else token.text
            return XlString(text, token.line)
        if token.kind != "[":
            self._expected(_VALUE)
        if depth >= MAX_DEPTH:
            _fail(
                self._file, token.line, f"lists nest deeper than {MAX_DEPTH}", "xl needs two levels"
            )
        self._next()
        return self._list(token.line, depth)

    def _list(self, line: int, depth: int) -> XlList:
        items: list[XlValue] = []
        self._skip_newlines()
        while self._token.kind != "]":
            items.append(self._value(depth + 1))
            self._skip_newlines()
            if self._token.kind == ",":
                self._next()
                self._skip_newlines()
            elif self._token.kind != "]":
                self._expected(f"',' or ']' in the list that begins in line {line}")
        self._next()
        return XlList(tuple(items), line)

    def _skip_newlines(self) -> None:
        while self._token.kind == "newline":
            self._next()

    def _next(self) -> None:
        self._token = self._scan()

    def _expected(self, what: str) -> NoReturn:
        token = self._token
        hint = "xl reads no Python, only key = value" if token.kind == "ident" else ""
        _fail(self._file, token.line, f"expected {what}, found {token}", hint)

    def _scan(self) -> _Token:
        while self._at < len(self._text):
            found = _TOKEN.match(self._text, self._at)
            if found is None:
                # flex's <lexerr> state reports nothing when the file ends in it: one stray byte
                # as the very last is no error to xl.
                if self._at == len(self._text) - 1 and self._text[self._at] < "\x80":
                    self._at += 1
                    break
                self._garbage()
            self._at = found.end()
            kind = found.lastgroup or ""
            token = _Token(found[0] if kind == "op" else kind, found[0], self._line)
            if kind == "newline":
                self._line += 1
            if kind != "blank":
                return token
        return _Token("end", "", self._line)

    def _garbage(self) -> NoReturn:
        char = self._text[self._at]
        rest = _GARBAGE.match(self._text, self._at)
        found = f"'{shown(rest[0] if rest else char)}'"
        if char == "#":
            what = "the comment in the last line has no end of line"
            hint = "end the file with a newline, or xl refuses it"
        elif char in "\"'":
            what, hint = "a string does not end in its line", f"close it with {char}"
        elif char == "\r":
            what = "there is a carriage return"
            hint = "save the file with Unix line ends"
        elif char.isascii() and char.isupper():
            what = f"{found} cannot stand here: keys and numbers are in lower case"
            hint = "put a value with a unit or capital letters in quotes"
        elif char == "\\":
            what, hint = f"{found} cannot stand here", "xl has no line continuation"
        else:
            what, hint = f"{found} cannot stand here", "a value other than a number needs quotes"
        _fail(self._file, self._line, what, hint)

    def _unquote(self, token: _Token) -> str:
        def escaped(found: re.Match[str]) -> str:
            char = found[1]
            if char in _ESCAPES:
                return _ESCAPES[char]
            _fail(
                self._file,
                token.line,
                f"\\{shown(char)} is no escape in a string",
                "there are \\\\ \\\" \\' \\a \\b \\f \\n \\r \\t \\v; xl cannot read numeric ones",
            )

        return re.sub(r"\\(.)", escaped, token.text[1:-1], flags=re.DOTALL)
