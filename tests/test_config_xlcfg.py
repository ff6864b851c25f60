# SPDX-License-Identifier: LGPL-2.1-or-later
"""xl's configuration language: what is read, and where each error is said to be."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xshmd.config.xlcfg import MAX_BYTES, MAX_DEPTH, Plain, XlList, parse, quote, render
from xshmd.errors import ConfigUnreadable

ACCEPTED = [
    ("", {}),
    ("\n\n;;\n", {}),
    ("# only a comment\n", {}),
    ("a=1", {"a": "1"}),
    ("a = 0x1f\n", {"a": "0x1f"}),
    ("a=1fx\n", {"a": "1fx"}),
    ("name = 12\n", {"name": "12"}),
    ("a.b_c9 = 'x'\n", {"a.b_c9": "x"}),
    ("\ta\t=\t'x' # c\n", {"a": "x"}),
    ("a='1';b='2';", {"a": "1", "b": "2"}),
    ("a='#no comment'\n", {"a": "#no comment"}),
    ("a='é\r'# \r\n", {"a": "é\r"}),
    ("a='say \"x\"'\n", {"a": 'say "x"'}),
    (r"""a="\"\'\\\a\b\f\n\r\t\v" """, {"a": "\"'\\\a\b\f\n\r\t\v"}),
    ("a=1\na=2\n", {"a": "2"}),
    ("a='x'\na+='y'\n", {"a": "xy"}),
    ("a+='y'\n", {"a": "y"}),
    ("a=[1]\na+=['x',[2]]\n", {"a": ["1", "x", ["2"]]}),
    ("a=[1]\na='s'\na+='t'\n", {"a": "st"}),
    ("a=[]\n", {"a": []}),
    ("a=[\n\n]\n", {"a": []}),
    ("a=[ # c\n 1 # c\n , # c\n 2,\n]\n", {"a": ["1", "2"]}),
    ("a=[1,]", {"a": ["1"]}),
    ("a=[[],[[1]]]", {"a": [[], [["1"]]]}),
    # One stray byte that ends the file is nothing to flex.
    ("a=256M", {"a": "256"}),
    ("a=1 #", {"a": "1"}),
    ('a=1 "', {"a": "1"}),
    ("a=1\r", {"a": "1"}),
]

REFUSED = [
    ("a=256M\n", 1, "'M' cannot stand here", "quotes"),
    ("a=1\nb=Yes\n", 2, "'Yes' cannot stand here", "quotes"),
    ("A=1\n", 1, "'A=1' cannot stand here", ""),
    ("my-key=1\n", 1, "'-key=1' cannot stand here", ""),
    ("a=1\n# no end", 2, "comment in the last line", "newline"),
    ("a=1\r\n", 1, "carriage return", "Unix"),
    ("a='x\n'\n", 1, "string does not end", "close it with '"),
    ('a=1\nb="x\n', 2, "string does not end", 'close it with "'),
    ("a=[1,\\\n2]\n", 1, "'\\' cannot stand here", "continuation"),
    ("a=\x01\n", 1, r"'\x01' cannot stand here", ""),
    ("a=1é", 1, "'é' cannot stand here", ""),
    (r"a='\x41'", 1, r"\x is no escape", "numeric"),
    (r"a='\012'", 1, r"\0 is no escape", "numeric"),
    ("\na='\\q'", 2, r"\q is no escape", "there are"),
    ("a='\\\x07'", 1, r"\\x07 is no escape", "there are"),
    ("a=b\n", 1, "expected a value: a number, a string in quotes or a [list], found 'b'", "Python"),
    ("a\n=1\n", 1, "expected '=' or '+=' after 'a', found the end of the line", ""),
    ("a=\n1\n", 1, "expected a value: a number, a string in quotes or a [list], found the", ""),
    ("a= # c\n1\n", 1, "found a comment", ""),
    ("a=", 1, "found the end of the file", ""),
    ("a='x' 'y'\n", 1, "expected the end of the line or ';' after the value, found ''y''", ""),
    ("a=5g=6\n", 1, "expected the end of the line or ';' after the value, found 'g'", ""),
    ("=1\n", 1, "expected a key in lower case, as in key = value, found '='", ""),
    ("'a'=1\n", 1, "expected a key", ""),
    ("a=[1\n 2]\n", 2, "expected ',' or ']' in the list that begins in line 1, found '2'", ""),
    ("\na=[1;2]\n", 2, "found ';'", ""),
    ("a=[,]\n", 1, "found ','", ""),
    ("a=[1,,2]\n", 1, "found ','", ""),
    ("a=[1,\n\n", 3, "found the end of the file", ""),
    ("a=[1]]\n", 1, "found ']'", ""),
    ("a=1\nb=2\na+=[1]\n", 3, "'a +=' adds a list to a string", "line 1"),
    ("a=[1]\na+='x'\n", 2, "'a +=' adds a string to a list", "line 1"),
    ("a=1\nif a:\n", 2, "expected '=' or '+=' after 'if', found 'a'", "Python"),
    ("a=" + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), 1, "nest deeper", ""),
    ("a=1\nb='x\0y'\n", 2, "NUL byte", "remove"),
    ("\0", 1, "NUL byte", "remove"),
    ("a=" + "Z" * 41 + "\n", 1, "'" + "Z" * 37 + "...' cannot stand here", ""),
    ("a=" + "Z" * 40 + "\n", 1, "'" + "Z" * 40 + "' cannot stand here", ""),
    (b"a=1\nb='\xff'\n", 2, "byte 0xff is not UTF-8", "UTF-8"),
    ("a=1\n\nb='\ud800'\n", 3, "is not UTF-8", "UTF-8"),
]


@pytest.mark.parametrize(("text", "settings"), ACCEPTED)
def test_text_that_xl_accepts(text: str, settings: dict[str, Plain]) -> None:
    assert parse(text, "vm.cfg").plain() == settings
    assert parse(text.encode(), "vm.cfg").plain() == settings


@pytest.mark.parametrize(("text", "line", "what", "hint"), REFUSED)
def test_text_that_is_refused_with_its_line(
    text: str | bytes, line: int, what: str, hint: str
) -> None:
    with pytest.raises(ConfigUnreadable) as caught:
        parse(text, "vm.cfg")
    assert caught.value.message.startswith(f"vm.cfg:{line}: ")
    assert what in caught.value.message
    assert hint in caught.value.hint
    rule = "not-utf-8" if "UTF-8" in what else "not-xl"
    assert caught.value.facts == {"file": "vm.cfg", "line": line, "rule": rule}
    assert caught.value.message.isprintable()


def test_every_assignment_and_every_element_has_its_line() -> None:
    config = parse("\n# c\na = [ 'x',\n  # c\n  'y', [\n 'z' ] ]\nb=1\nb+='2'\na += ['w']\n", "f")
    value = config["a"].value
    assert isinstance(value, XlList)
    assert [item.line for item in value.items] == [3, 5, 5, 9]
    nested = value.items[2]
    assert isinstance(nested, XlList)
    assert nested.items[0].line == 6
    assert (config["a"].line, config["b"].line) == (9, 8)
    assert str(config.place("b")) == "f:8: b"
    assert config.place("absent").line == 0


def test_a_plus_assignment_is_remembered_until_the_next_plain_one() -> None:
    config = parse("a+='1'\nb+='1'\nb='2'\n", "f")
    assert config["a"].added
    assert not config["b"].added


def test_text_of_a_list_or_an_absent_key_is_none() -> None:
    config = parse("a=[1]\nb=''\n", "f")
    assert (config.text("a"), config.text("b"), config.text("c")) == (None, "", None)


def test_size_limit() -> None:
    fits = "#" * (MAX_BYTES - 1) + "\n"
    assert len(parse(fits, "f")) == 0
    with pytest.raises(ConfigUnreadable, match="longer than 1048576 bytes") as caught:
        parse(fits + "\n", "f")
    assert caught.value.facts["rule"] == "too-long"


def test_deepest_list_that_is_read() -> None:
    assert len(parse("a=" + "[" * MAX_DEPTH + "]" * MAX_DEPTH, "f")) == 1


strings = st.text(
    st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=20
)
keys = st.from_regex(r"[a-z][._0-9a-z]{0,6}", fullmatch=True)
values = st.recursive(strings, lambda inner: st.lists(inner, max_size=4), max_leaves=8)


@given(st.dictionaries(keys, values, max_size=4))
def test_what_is_rendered_is_read_back(settings: dict[str, Plain]) -> None:
    assert parse(render(settings), "f").plain() == settings


@given(st.text() | st.binary())
def test_any_text_is_read_or_refused(text: str | bytes) -> None:
    with contextlib.suppress(ConfigUnreadable):
        parse(text, "f")


def test_a_nul_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="NUL"):
        quote("a\0b")
