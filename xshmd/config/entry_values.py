# SPDX-License-Identifier: LGPL-2.1-or-later
"""The values of one entry of ``static_shm``: each read once, and what is wrong with it noted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, TypeVar

from xshmd.config.findings import config_error
from xshmd.config.xlcfg import shown
from xshmd.errors import ConfigError
from xshmd.model import Place
from xshmd.units import ADDRESS_LIMIT, PAGE_SIZE, frames_of, human_size

EXAMPLE: Final = "id=ID1, begin=0x3a000000, size=0x100000, role=owner"

_T = TypeVar("_T")

_NUMBER: Final = re.compile(r"0[xX][0-9a-fA-F]+|0|[1-9][0-9]*")
_HEX: Final = re.compile(r"0[xX][0-9a-fA-F]+")


class Values:
    """What an entry says, key by key; ``errors`` has everything that is wrong with it.

    A key that is not there reads as None, and so does one that is wrong.
    """

    def __init__(self, place: Place) -> None:
        self.errors: list[ConfigError] = []
        self.texts: dict[str, str] = {}
        self._place = place

    def wrong(self, rule: str, what: str, hint: str) -> None:
        """Note that something is wrong; see :func:`xshmd.config.findings.config_error`."""
        self.errors.append(config_error(self._place, what, hint=hint, rule=rule))

    def text(self, key: str) -> str | None:
        """Return the text of a key; an empty one is wrong."""
        text = self.texts.get(key)
        if text == "":
            self.wrong("no-value", f"'{key}' has no value", f"as in {EXAMPLE}")
            return None
        return text

    def word(self, key: str, words: Mapping[str, _T]) -> _T | None:
        """Return what a key's word stands for."""
        text = self.text(key)
        if text is not None and text not in words:
            close = {word.lower(): word for word in words}.get(text.lower())
            hint = f"say {close}" if close else f"possible are {', '.join(words)}"
            self.wrong("bad-word", f"{key}={shown(text)} is not known", hint)
        return words.get(text) if text is not None else None

    def number(self, key: str, what: str, hint: str) -> int | None:
        """Return an unsigned number of at most 64 bits, decimal or hexadecimal."""
        return self._number(key, _NUMBER, what, hint, ADDRESS_LIMIT)

    def frame(self, key: str) -> int | None:
        """Return the guest frame number that a key of the proposal of 2017 has."""
        hint = "the proposal of 2017 has guest frame numbers, all hexadecimal as in 0x20000"
        limit = ADDRESS_LIMIT // PAGE_SIZE + 1
        return self._number(key, _HEX, "a frame number", hint, limit)

    def pages(self, key: str) -> int | None:
        """Return how many frames a key's bytes are."""
        hint = "write bytes, decimal or 0x..., without a unit or a leading zero"
        number = self.number(key, "a number of bytes", hint)
        if number is None or number % PAGE_SIZE == 0:
            return None if number is None else frames_of(number)
        below = number - number % PAGE_SIZE
        choices = f"{below:#x} or {below + PAGE_SIZE:#x}" if below else f"{PAGE_SIZE:#x}"
        self.wrong(
            "unaligned",
            f"{key}={self.texts[key]} is not a multiple of {human_size(PAGE_SIZE)}",
            f"memory is shared in whole pages: say {choices}",
        )
        return None

    def _number(
        self, key: str, pattern: re.Pattern[str], what: str, hint: str, limit: int
    ) -> int | None:
        text = self.text(key)
        if text is None:
            return None
        if not pattern.fullmatch(text):
            self.wrong("bad-number", f"{key}={shown(text)} is not {what}", hint)
            return None
        # Python limits how many decimal digits it converts; 64 bits are long done by then.
        number = int(text, 0) if len(text) < 100 else limit
        if number >= limit:
            self.wrong(
                "beyond-64-bits",
                f"{key}={shown(text)} does not fit in 64 bits",
                "choose a smaller number",
            )
            return None
        return number
