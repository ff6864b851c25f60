# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads ``.varlink`` files, so that the contract itself says what a call may carry.

The grammar is that of UAPI.20 less ``any``, which systemd 257 cannot read.  Text and values from
elsewhere are checked against it by :meth:`Interface.check`.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from xshmd.varlink.wire import Parameters

INT_MIN: Final = -(1 << 63)
INT_MAX: Final = (1 << 63) - 1
"""What an ``int`` may be: UAPI.20 asks for 64 bits, systemd has no more."""

_TOKEN: Final = re.compile(
    r"(?:\s|#[^\n]*(?:\n|\Z))*"
    r"(?P<token>->|\[string\]|\[\]|[():,?]|[A-Za-z][A-Za-z0-9._-]*|\Z)"
)
_INTERFACE_NAME: Final = re.compile(r"[A-Za-z](-*[A-Za-z0-9])*(\.[A-Za-z0-9](-*[A-Za-z0-9])*)+")
_NAME: Final = re.compile(r"[A-Z][A-Za-z0-9]*")
_FIELD_NAME: Final = re.compile(r"[A-Za-z](_?[A-Za-z0-9])*")
_SCALARS: Final = ("bool", "int", "float", "string", "object")


class IdlError(ValueError):
    """A ``.varlink`` text is not of its language: a bug of whoever wrote it."""


class Mismatch(ValueError):
    """A value is not what the interface declares.

    Args:
        field: Name of the outermost field that is wrong.
        reason: What is wrong with it.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field


@dataclasses.dataclass(frozen=True, slots=True)
class Scalar:
    """One of the built-in types, by its keyword."""

    keyword: str


@dataclasses.dataclass(frozen=True, slots=True)
class Named:
    """A reference to a ``type`` of the same interface."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Maybe:
    """``?of``."""

    of: Type


@dataclasses.dataclass(frozen=True, slots=True)
class Array:
    """``[]of``."""

    of: Type


@dataclasses.dataclass(frozen=True, slots=True)
class Dictionary:
    """``[string]of``."""

    of: Type


@dataclasses.dataclass(frozen=True, slots=True)
class Enumeration:
    """``(one, two)``."""

    values: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Struct:
    """``(field: type, ...)``."""

    fields: Mapping[str, Type]


Type = Scalar | Named | Maybe | Array | Dictionary | Enumeration | Struct


@dataclasses.dataclass(frozen=True, slots=True)
class MethodType:
    """What a method takes and what it replies."""

    takes: Struct
    gives: Struct


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """One interface as its file declares it."""

    name: str
    text: str
    types: Mapping[str, Struct | Enumeration]
    methods: Mapping[str, MethodType]
    errors: Mapping[str, Struct]

    def check(self, struct: Struct, values: Parameters) -> None:
        """Check an object against a declared structure; absent and null are the same.

        Raises:
            Mismatch: A field is missing, unknown or of another type.
        """
        for name in values:
            if name not in struct.fields:
                raise Mismatch(name, "is not known")
        for name, declared in struct.fields.items():
            try:
                self._check_value(declared, values.get(name))
            except Mismatch as exc:
                raise Mismatch(name, str(exc)) from None

    def _check_value(self, declared: Type, value: Any) -> None:
        match declared:
            case Named(name):
                self._check_value(self.types[name], value)
            case Maybe(inner):
                if value is not None:
                    self._check_value(inner, value)
            case Scalar(keyword):
                _check_scalar(keyword, value)
            case Enumeration(allowed):
                if not isinstance(value, str) or value not in allowed:
                    raise Mismatch("value", f"is none of {', '.join(allowed)}")
            case Array(inner):
                if not isinstance(value, list):
                    raise Mismatch("value", "is not an array")
                for item in value:
                    self._check_value(inner, item)
            case Dictionary(inner):
                if not isinstance(value, dict):
                    raise Mismatch("value", "is not an object")
                for item in value.values():
                    self._check_value(inner, item)
            case Struct():
                if not isinstance(value, dict):
                    raise Mismatch("value", "is not an object")
                self.check(declared, value)


def _check_scalar(keyword: str, value: Any) -> None:
    match keyword:
        case "int":
            good = type(value) is int and INT_MIN <= value <= INT_MAX
        case "bool":
            good = isinstance(value, bool)
        case "float":
            good = type(value) in (int, float)
        case "string":
            good = isinstance(value, str)
        case _:
            good = isinstance(value, dict)
    if not good:
        raise Mismatch("value", f"is not of type {keyword}")


def load(name: str) -> Interface:
    """Return the interface of that name that this package ships."""
    file = importlib.resources.files("xshmd.varlink").joinpath(f"{name}.varlink")
    return parse(file.read_text(encoding="utf-8"))


def parse(text: str) -> Interface:
    """Return the interface a ``.varlink`` text declares.

    Raises:
        IdlError: The text is not of the language, or names a type it does not declare.
    """
    return _Parser(text).interface()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = _tokens(text)
        self._token = next(self._tokens)
        self._named: set[str] = set()

    def interface(self) -> Interface:
        self._expect("interface")
        name = self._word(_INTERFACE_NAME)
        types: dict[str, Struct | Enumeration] = {}
        methods: dict[str, MethodType] = {}
        errors: dict[str, Struct] = {}
        members: set[str] = set()
        while self._token:
            keyword = self._take()
            member = self._word(_NAME)
            if member in members:
                raise IdlError(f"{member} is declared twice")
            members.add(member)
            match keyword:
                case "type":
                    types[member] = self._struct_or_enumeration()
                case "method":
                    takes = self._struct()
                    self._expect("->")
                    methods[member] = MethodType(takes, self._struct())
                case "error":
                    errors[member] = self._struct()
                case _:
                    raise IdlError(f"{keyword!r} begins no member")
        if missing := self._named - types.keys():
            raise IdlError(f"no type is called {', '.join(sorted(missing))}")
        return Interface(name=name, text=self._text, types=types, methods=methods, errors=errors)

    def _type(self) -> Type:
        if self._token == "?":
            self._take()
            inner = self._type()
            if isinstance(inner, Maybe):
                raise IdlError("?? is not a type")
            return Maybe(inner)
        if self._token == "[]":
            self._take()
            return Array(self._type())
        if self._token == "[string]":
            self._take()
            return Dictionary(self._type())
        if self._token == "(":
            return self._struct_or_enumeration()
        if self._token in _SCALARS:
            return Scalar(self._take())
        name = self._word(_NAME)
        self._named.add(name)
        return Named(name)

    def _struct(self) -> Struct:
        found = self._struct_or_enumeration()
        if not isinstance(found, Struct):
            raise IdlError("an enumeration stands where a structure must")
        return found

    def _struct_or_enumeration(self) -> Struct | Enumeration:
        self._expect("(")
        fields: dict[str, Type | None] = {}
        while self._token != ")":
            if fields:
                self._expect(",")
            name = self._word(_FIELD_NAME)
            if name in fields:
                raise IdlError(f"{name} is declared twice")
            fields[name] = None
            if self._token == ":":
                self._take()
                fields[name] = self._type()
        self._take()
        typed = {name: declared for name, declared in fields.items() if declared is not None}
        if len(typed) == len(fields):
            return Struct(typed)
        if typed:
            raise IdlError("a structure has fields without a type")
        return Enumeration(tuple(fields))

    def _take(self) -> str:
        taken = self._token
        if not taken:
            raise IdlError("the text ends too early")
        self._token = next(self._tokens)
        return taken

    def _expect(self, token: str) -> None:
        if (found := self._take()) != token:
            raise IdlError(f"{token!r} is expected, {found!r} found")

    def _word(self, pattern: re.Pattern[str]) -> str:
        word = self._take()
        if not pattern.fullmatch(word):
            raise IdlError(f"{word!r} is no name here")
        return word


def _tokens(text: str) -> Iterator[str]:
    """Yield the tokens of a text and at its end the empty one."""
    at = 0
    while True:
        match = _TOKEN.match(text, at)
        if match is None:
            raise IdlError(f"nothing can begin with {text[at : at + 20].strip()!r}")
        yield match["token"]
        at = match.end()
        if not match["token"]:
            return
