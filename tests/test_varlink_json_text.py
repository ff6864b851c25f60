# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is read and written without the json module is what it would have read and written."""

from __future__ import annotations

import json
import sys
from typing import Any, NoReturn

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from xshmd.varlink import json_text

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
SEPARATORS = (",", ":")


def pairs(found: list[tuple[str, Any]]) -> list[Any]:
    """Keep a key that comes twice."""
    return ["object", *map(list, found)]


def refuse(name: str) -> NoReturn:
    raise KeyError(name)


def outcome(work: Any, text: str) -> tuple[str, Any]:
    try:
        return "value", repr(work(text))
    except (ValueError, RecursionError, KeyError) as error:
        return "error", isinstance(error, ValueError) or type(error)


class Both:
    """The two ways side by side, made once."""

    def __init__(self) -> None:
        self.read, self.write = json_text.reader(pairs, refuse), json_text.writer()


def by_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=pairs, parse_constant=refuse)


OURS = Both()


@given(st.one_of(st.text(), st.text(alphabet='{}[]",:0123456789.eE+-\\utrfalsenl \t\r\nNI')))
@example("")
@example(" \n\t\r")
@example("\ufeff{}")
@example("\x0b{}")
@example("{} {}")
@example("[1,]")
@example('{"a":1,"a":2}')
@example("NaN")
@example("[-Infinity]")
@example('"\\ud800"')
@example('"\n"')
@example("[" * 100_000)
@example("1" * 5000)
def test_texts_are_read_alike(text: str) -> None:
    assert outcome(OURS.read, text) == outcome(by_json, text)


@given(VALUES)
@example("\ud800")
def test_values_are_written_alike(value: Any) -> None:
    assert OURS.write(value) == json.dumps(value, ensure_ascii=False, separators=SEPARATORS)


def test_what_is_no_json_is_refused() -> None:
    for value in (float("nan"), float("inf"), [float("-inf")]):
        with pytest.raises(ValueError, match="not JSON compliant"):
            OURS.write(value)
    for strange in ({1}, object(), [b"bytes"]):
        with pytest.raises(TypeError):
            OURS.write(strange)


def test_without_the_c_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "_json", None)
    both = Both()
    assert both.read(' {"a": [1, "\u00e9"]} ') == ["object", ["a", [1, "\u00e9"]]]
    assert both.write({"a": [1, "\u00e9"]}) == '{"a":[1,"\u00e9"]}'
    with pytest.raises(KeyError):
        both.read("NaN")
    with pytest.raises(ValueError, match="Extra data"):
        both.read("{} {}")
    with pytest.raises(TypeError):
        both.write({1})
