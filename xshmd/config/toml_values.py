# SPDX-License-Identifier: LGPL-2.1-or-later
"""The values of one TOML table, each read as what it has to be; all that is wrong is kept."""

from __future__ import annotations

import datetime
import difflib
import enum
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeVar

from xshmd.config.findings import config_error
from xshmd.config.toml_tree import Table, Value
from xshmd.config.xlcfg import shown
from xshmd.errors import ConfigError
from xshmd.model import Place
from xshmd.units import ADDRESS_LIMIT, PAGE_SIZE, human_size

_Word = TypeVar("_Word", bound=enum.StrEnum)

_UNITS: Final = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}
_SIZE: Final = re.compile(r"([0-9]{1,30})[ \t]*([A-Za-z]{1,8})", re.ASCII)
_EXAMPLE: Final = 'write a number of bytes, or text as "1 MiB"'
_TIME_UNITS: Final = {"ms": 1, "s": 1000, "min": 60_000}
_TIME: Final = re.compile(rf"([0-9]{{1,9}})[ \t]*({'|'.join(_TIME_UNITS)})", re.ASCII)
_TIME_EXAMPLE: Final = f'write text as "10 s"; units are {", ".join(_TIME_UNITS)}'


class Keys:
    """One table.

    Args:
        table: The table.
        known: The keys it may have; every other is an error at once.
        errors: Everything that is wrong is appended here.
    """

    def __init__(self, table: Table, known: Sequence[str], errors: list[ConfigError]) -> None:
        self._table = table
        self._known = known
        self._errors = errors
        for key, entry in table.entries.items():
            if key not in known:
                what = f"unknown key '{shown(key)}'"
                self.wrong_at(entry.place, "unknown-key", what, _did_you_mean(key, known))

    def __contains__(self, key: str) -> bool:
        return key in self._table.entries

    def place(self, key: str = "") -> Place:
        """Return where a key is, or where the table is if it has none of that name."""
        entry = self._table.entries.get(key)
        return self._table.place if entry is None else entry.place

    def wrong(self, key: str, rule: str, what: str, hint: str) -> None:
        """Note that something is wrong with a key."""
        self.wrong_at(self.place(key), rule, what, hint)

    def wrong_at(self, place: Place, rule: str, what: str, hint: str) -> None:
        """Note that something is wrong at a place."""
        self._errors.append(config_error(place, what, hint=hint, rule=rule))

    def tables(self, key: str) -> Iterator[tuple[str, Table]]:
        """Yield the tables within the table that is the key's, each with its name."""
        outer = self._table.entries.get(key)
        if outer is None:
            return
        if isinstance(outer, Value):
            what = f"it is {_kind(outer.value)}, not tables"
            self.wrong(key, "bad-type", what, f"write [{outer.place.key}.NAME]")
            return
        for name, entry in outer.entries.items():
            if isinstance(entry, Table):
                yield name, entry
            else:
                what = f"it is {_kind(entry.value)}, not a table"
                hint = f"write [{entry.place.key}] above its keys"
                self.wrong_at(entry.place, "bad-type", what, hint)

    def table(self, key: str) -> Table | None:
        """Return the table that is the key's; None if it is absent or wrong."""
        entry = self._table.entries.get(key)
        if isinstance(entry, Value):
            hint = f"write [{entry.place.key}] above its keys"
            self.wrong(key, "bad-type", f"it is {_kind(entry.value)}, not a table", hint)
            return None
        return entry

    def texts(self, key: str) -> tuple[str, ...] | None:
        """Return the texts of a list; None if it is absent or wrong."""
        remedy = 'write a list of texts, as in ["sensor-*", "ctl"]'
        found = self._of_type(key, list, "a list", remedy)
        if found is None:
            return None
        if not found or not all(isinstance(text, str) and text for text in found):
            what = "it is empty" if not found else "it has other things than texts"
            self.wrong(key, "bad-type", what, remedy)
            return None
        return tuple(found)

    def count(self, key: str) -> int | None:
        """Return a number of things; None if it is absent or wrong."""
        remedy = "write a whole number, 0 or more"
        found = self._of_type(key, int, "a whole number", remedy)
        if isinstance(found, bool):
            self.wrong(key, "bad-type", "it is true or false, not a whole number", remedy)
            return None
        if found is None:
            return None
        if not 0 <= found < ADDRESS_LIMIT:
            self.wrong(key, "bad-number", f"{self._said(key)} is no number of things", remedy)
            return None
        return int(found)

    def text(self, key: str) -> str | None:
        """Return a text; None if it is absent or wrong."""
        found: str | None = self._of_type(key, str, "text", 'write it in quotes, as in "ctl"')
        return found

    def flag(self, key: str, *, default: bool) -> bool:
        """Return a truth value."""
        found = self._of_type(key, bool, "true or false", "write true or false, without quotes")
        return default if found is None else found

    def word(self, key: str, words: type[_Word]) -> _Word | None:
        """Return one of some words; None if it is absent or wrong."""
        possible = {word.value: word for word in words}
        remedy = f"possible are {', '.join(possible)}"
        text = self._of_type(key, str, "text", remedy)
        if text is None or text in possible:
            return None if text is None else possible[text]
        close = {word.lower(): word for word in possible}.get(text.lower())
        what = f"'{shown(text)}' is not known"
        self.wrong(key, "bad-word", what, f'say "{close}"' if close else remedy)
        return None

    def milliseconds(self, key: str) -> int | None:
        """Return for how long something may last; None if it is absent or wrong."""
        text = self._of_type(key, str, "a time", _TIME_EXAMPLE)
        found = None if text is None else _TIME.fullmatch(text.strip())
        if text is not None and found is None:
            self.wrong(key, "bad-time", f"{self._said(key)} is not a time", _TIME_EXAMPLE)
        return None if found is None else int(found[1]) * _TIME_UNITS[found[2]]

    def frames(self, key: str) -> int | None:
        """Return how many frames, or which, a size or address is; None if absent or wrong."""
        return self._multiple(key, PAGE_SIZE, "memory is shared in whole pages")

    def mebibytes(self, key: str) -> int | None:
        """Return how many MiB a size is; None if it is absent or wrong."""
        return self._multiple(key, 1 << 20, "xl gives memory in MiB")

    def _multiple(self, key: str, unit: int, why: str) -> int | None:
        number = self._bytes(key)
        if number is None or number % unit == 0:
            return None if number is None else number // unit
        below = number - number % unit
        choices = f"{below:#x} or {below + unit:#x}" if below else f"{unit:#x}"
        what = f"{self._said(key)} is not a multiple of {human_size(unit)}"
        self.wrong(key, "unaligned", what, f"{why}: say {choices}")
        return None

    def _bytes(self, key: str) -> int | None:
        found = self._value(key)
        if isinstance(found, int) and not isinstance(found, bool):
            number = found
        elif isinstance(found, str):
            parsed = self._size(key, found)
            if parsed is None:
                return None
            number = parsed
        else:
            if found is not None:
                self.wrong(key, "bad-type", f"it is {_kind(found)}, not a whole number", _EXAMPLE)
            return None
        if number < 0:
            self.wrong(key, "bad-number", f"{self._said(key)} is less than nothing", _EXAMPLE)
        elif number >= ADDRESS_LIMIT:
            what = f"{self._said(key)} does not fit in 64 bits"
            self.wrong(key, "beyond-64-bits", what, "choose a smaller number")
        else:
            return number
        return None

    def _size(self, key: str, text: str) -> int | None:
        found = _SIZE.fullmatch(text.strip())
        unit = found[2] if found else ""
        if found and unit in _UNITS:
            return int(found[1]) << _UNITS[unit]
        what = f"{self._said(key)} is not a number of bytes"
        hint = f"units are {', '.join(_UNITS)}, with a whole number before them"
        if found:
            what = f"{self._said(key)} has no unit that is known"
            close = {known[0].lower(): known for known in _UNITS}.get(unit[0].lower())
            if close:
                hint = f'say "{found[1]} {close}"'
        elif text.strip().isalnum() and text.strip()[:1].isdigit():
            hint = "write a plain number without quotes, or give it a unit"
        self.wrong(key, "bad-number", what, hint)
        return None

    def _of_type(self, key: str, wanted: type[Any], name: str, hint: str) -> Any:
        found = self._value(key)
        if found is None or isinstance(found, wanted):
            return found
        self.wrong(key, "bad-type", f"it is {_kind(found)}, not {name}", hint)
        return None

    def _value(self, key: str) -> Any:
        entry = self._table.entries.get(key)
        return {} if isinstance(entry, Table) else None if entry is None else entry.value

    def _said(self, key: str) -> str:
        value = self._value(key)
        if isinstance(value, str):
            return f"'{shown(value)}'"
        return shown(f"{value:#x}") if abs(value) >= ADDRESS_LIMIT else str(value)


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, datetime.date | datetime.time):
        return "a date or time"
    if isinstance(value, float):
        return "a floating-point number"
    kinds = {int: "a number", str: "text", list: "a list", dict: "a table"}
    return kinds[type(value)]


def _did_you_mean(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key[:40].lower(), known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"possible are {', '.join(known)}"
