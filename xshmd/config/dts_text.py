# SPDX-License-Identifier: LGPL-2.1-or-later
"""Device tree source as text: values, comments and names, so that nothing said can break out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

INDENT: Final = "    "
_NO_NAME: Final = re.compile(r"[^0-9a-zA-Z_]+")


def cells(*numbers: int) -> str:
    """Write 64-bit numbers, each in two cells: for #address-cells and #size-cells of 2."""
    words = [f"{word:#x}" for number in numbers for word in (number >> 32, number & 0xFFFFFFFF)]
    return f"<{' '.join(words)}>"


def string(text: str) -> str:
    """Write a string value."""
    escaped = printable(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def printable(text: str) -> str:
    """Return the text in one line of ASCII."""
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1]


def comment(*lines: str) -> str:
    """Write a comment that C and dtc understand, whatever the text is."""
    safe = [printable(line).replace("*/", "* /").replace("/*", "/ *") for line in lines]
    if len(safe) == 1:
        return f"/* {safe[0]} */\n"
    return "/*\n" + "".join(f" * {line}".rstrip() + "\n" for line in safe) + " */\n"


def node(name: str, body: Iterable[str], *, label: str = "") -> list[str]:
    """Return the lines of a node around those of its body."""
    head = f"{label}: {name}" if label else name
    return [f"{head} {{", *(f"{INDENT}{line}" if line else "" for line in body), "};"]


def identifiers(texts: Sequence[str]) -> tuple[str, ...]:
    """Return a name of ``[A-Za-z0-9_]`` for each text, all different even if case is ignored.

    A text that needs no change keeps its name, wherever in the sequence it stands.
    """
    plain = [_NO_NAME.sub("_", text) or "_" for text in texts]
    found = ["" for _ in texts]
    taken: set[str] = set()
    for index, (text, name) in enumerate(zip(texts, plain, strict=True)):
        if text == name and name.lower() not in taken:
            found[index] = name
            taken.add(name.lower())
    for index, name in enumerate(plain):
        if not found[index]:
            wanted, number = name, 1
            while wanted.lower() in taken:
                number += 1
                wanted = f"{name}_{number}"
            found[index] = wanted
            taken.add(wanted.lower())
    return tuple(found)
