# SPDX-License-Identifier: LGPL-2.1-or-later
"""Our reading of xl's configuration language, held against libxlutil itself.

Where no libxlutil is installed most of these tests are not there at all: they are defined below
only if it could be loaded, so nothing is reported as skipped that was never going to run.  Any
machine with xl has it (libxenmisc), and so has the Debian 13 that the unit tests are run on
(integration/debian13.py), which insists on it by an environment variable.
"""

import ctypes
import os
import re
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from test_config_xlcfg import ACCEPTED, REFUSED

from xshmd.config.xlcfg import XlConfig, XlList, XlValue, parse
from xshmd.errors import ConfigUnreadable


def _load() -> ctypes.CDLL | None:
    for minor in range(30, 16, -1):
        try:
            return ctypes.CDLL(f"libxlutil.so.4.{minor}")
        except OSError:
            continue
    return None


LIBRARY = _load()
XLU_LIST = 1


@dataclass
class Reading:
    """What libxlutil made of a text."""

    refused: bool
    settings: dict[str, tuple[int, object]]
    """Key to line and value; in a value each part is with its line."""


class LibXlu:
    """The few functions of libxlutil that read a configuration."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._xlu = library
        self._libc = ctypes.CDLL(None)
        pointer = ctypes.c_void_p
        self._libc.open_memstream.restype = pointer
        library.xlu_cfg_init.restype = pointer
        library.xlu_cfg_init.argtypes = [pointer, ctypes.c_char_p]
        library.xlu_cfg_readdata.argtypes = [pointer, ctypes.c_char_p, ctypes.c_int]
        library.xlu_cfg_destroy.argtypes = [pointer]
        library.xlu_cfg_get_string.argtypes = [pointer, ctypes.c_char_p, pointer, ctypes.c_int]
        library.xlu_cfg_get_list.argtypes = [pointer, ctypes.c_char_p, *[pointer] * 2, ctypes.c_int]
        library.xlu_cfg_value_type.argtypes = [pointer]
        library.xlu_cfg_value_get_string.argtypes = [pointer, pointer, pointer, ctypes.c_int]
        library.xlu_cfg_value_get_list.argtypes = [pointer, pointer, pointer, ctypes.c_int]
        library.xlu_cfg_get_listitem2.argtypes = [pointer, ctypes.c_int]
        library.xlu_cfg_get_listitem2.restype = pointer
        self._libc.fflush.argtypes = self._libc.fclose.argtypes = [pointer]
        self._libc.free.argtypes = [pointer]

    def read(self, text: bytes, keys: list[str]) -> Reading:
        self._text, size = ctypes.c_void_p(), ctypes.c_size_t()
        self._report = self._libc.open_memstream(ctypes.byref(self._text), ctypes.byref(size))
        self._said = 0
        self._config = self._xlu.xlu_cfg_init(self._report, b"f")
        try:
            if self._xlu.xlu_cfg_readdata(self._config, text, len(text)):
                # Its line numbers of errors are not compared: xl's are one less at a line's end.
                assert self._news().startswith(b"f:")
                return Reading(True, {})
            return Reading(False, {key: self._setting(key.encode()) for key in keys})
        finally:
            self._xlu.xlu_cfg_destroy(self._config)
            self._libc.fclose(self._report)
            self._libc.free(self._text)

    def _news(self) -> bytes:
        self._libc.fflush(self._report)
        report = ctypes.string_at(self._text.value) if self._text.value else b""
        news, self._said = report[self._said :], len(report)
        return news

    def _line(self) -> int:
        found = re.match(rb"f:(\d+):", self._news())
        assert found
        return int(found[1])

    def _setting(self, key: bytes) -> tuple[int, object]:
        text, items = ctypes.c_char_p(), ctypes.c_void_p()
        # Asking for the wrong kind, with warnings on, is how to learn the line.
        if self._xlu.xlu_cfg_get_string(self._config, key, ctypes.byref(text), 0) == 0:
            assert self._xlu.xlu_cfg_get_list(self._config, key, ctypes.byref(items), None, 0)
            return self._line(), text.value
        line = self._line()
        assert not self._xlu.xlu_cfg_get_list(self._config, key, ctypes.byref(items), None, 0)
        return line, self._items(items)

    def _items(self, items: ctypes.c_void_p) -> list[tuple[int, object]]:
        found: list[tuple[int, object]] = []
        while (item := self._xlu.xlu_cfg_get_listitem2(items, len(found))) is not None:
            found.append(self._value(item))
        return found

    def _value(self, value: int) -> tuple[int, object]:
        text, items = ctypes.c_char_p(), ctypes.c_void_p()
        xlu, config = self._xlu, self._config
        if xlu.xlu_cfg_value_type(value) == XLU_LIST:
            # A list's own location is that of its first element, so it is not compared.
            xlu.xlu_cfg_value_get_list(config, value, ctypes.byref(items), 0)
            return 0, self._items(items)
        xlu.xlu_cfg_value_get_string(config, value, ctypes.byref(text), 0)
        xlu.xlu_cfg_value_get_list(config, value, ctypes.byref(items), 0)
        return self._line(), text.value


def as_theirs(value: XlValue) -> tuple[int, object]:
    """Return a value of ours in the form of :class:`Reading`."""
    if isinstance(value, XlList):
        return 0, [as_theirs(item) for item in value.items]
    return value.line, value.text.encode()


GAP = st.sampled_from(["", "", " ", "\t"])
NEWLINES = st.sampled_from(["", "", "", "\n", " # c\n", "\n\n", "#'\n"])
STRING = st.one_of(
    st.from_regex(r"[0-9][0-9a-fx]{0,3}", fullmatch=True),
    st.text('aZ0 #,;[]=é"\r\t', max_size=5).map(lambda text: f"'{text}'"),
    st.lists(st.sampled_from(["x", r"\n", r"\\", r"\"", r"\'", r"\v", "'"]), max_size=4).map(
        lambda parts: '"' + "".join(parts) + '"'
    ),
)


@st.composite
def a_list(draw: st.DrawFn, inner: st.SearchStrategy[str]) -> str:
    items = draw(st.lists(inner, max_size=4))
    text = "[" + draw(NEWLINES)
    for index, item in enumerate(items):
        last = index == len(items) - 1
        comma = "," if not last else draw(st.sampled_from(["", ","]))
        text += item + draw(NEWLINES) + comma + (draw(NEWLINES) if comma else "")
    return text + "]"


VALUE = st.recursive(STRING, a_list, max_leaves=6)


@st.composite
def good_texts(draw: st.DrawFn) -> str:
    text = draw(NEWLINES)
    for _ in range(draw(st.integers(0, 5))):
        key = draw(st.sampled_from(["a", "b", "a.b", "c_9"]))
        gap = draw(GAP)
        text += key + gap + draw(st.sampled_from(["=", "=", "+="])) + gap + draw(VALUE) + draw(GAP)
        text += draw(st.sampled_from(["\n", ";", "# c\n", ";;\n"]))
    return text


FRAGMENTS = st.sampled_from([
    "a", "Z", "=", "+=", "+", "[", "]", ",", ";", "\n", "#", "# c\n", "'", '"', "\\", "x", "12",
    "256M", " ", "\t", "\r", "é", "-", "'x'", '"y"', "a=1", "b=[", "\x01", "\\x41", "\\q",
])  # fmt: skip


@st.composite
def damaged_texts(draw: st.DrawFn) -> str:
    text = draw(good_texts())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(FRAGMENTS) + text[at + draw(st.integers(0, 2)) :]
    return text


TEXTS = st.one_of(good_texts(), damaged_texts(), st.lists(FRAGMENTS, max_size=12).map("".join))


TRAPS = [
    # Words and numbers: no capitals, no '-'; a number is kept as it is written.
    ("Name='x'\n", "refused"), ("my-key=1\n", "refused"), ("a._9=1\n", "accepted"),
    ("9a=1\n", "refused"), ("_a=1\n", "refused"), ("a=0x1F\n", "refused"),
    ("a=0x1f\n", "accepted"), ("a=007\n", "accepted"), ("a=-1\n", "refused"),
    ("a=1.5\n", "refused"), ("a=True\n", "refused"), ("a=256M\n", "refused"),
    ("a=256M", "accepted"), ("a=256M b=1", "refused"), ("a=bare\n", "refused"),
    # Blanks are spaces and tabs.
    ("a=1\r\n", "refused"), ("a='x'\r\n", "refused"), ("a=\v1\n", "refused"),
    ("a=\f1\n", "refused"), (" \ta\t=\t1\t\n", "accepted"), ("\ufeffa=1\n", "refused"),
    # Comments, and the one in the last line.
    ("a=1 # c\n", "accepted"), ("a=1 # c", "refused"), ("# c", "refused"), ("#\n", "accepted"),
    ("a='# x'\n", "accepted"), ("a=[1 # ]\n]\n", "accepted"), ("#\\\na=1\n", "accepted"),
    # Strings.
    ("a='é'\n", "accepted"), ("a=\"it's\"\n", "accepted"), ("a='say \"x\"'\n", "accepted"),
    ("a='x\ny'\n", "refused"), ("a='x\\\ny'\n", "refused"), ("a='x\n", "refused"),
    ("a='x''y'\n", "refused"), ("a=''\n", "accepted"), ("a=\"\"\n", "accepted"),
    (r"a='\a\b\f\n\r\t\v\\\'\"'", "accepted"), (r"a='\x41'", "refused"),
    (r"a='\e'", "refused"), (r"a='\q'", "refused"), (r"a='\8'", "refused"),
    (r"a='\101'", "octal"), (r"a='\0'", "refused"), (r"a='\777'", "octal"),
    # Statements.
    ("", "accepted"), (";;\n;\n", "accepted"), ("a=1;b=2", "accepted"), ("a=1;;b=2;\n", "accepted"),
    ("a=1 b=2\n", "refused"), ("a\n=1\n", "refused"), ("a=\n1\n", "refused"),
    ("a= # c\n1\n", "refused"), ("a=1\\\nb=2\n", "refused"), ("a==1\n", "refused"),
    ("a = = 1\n", "refused"), ("a + = 1\n", "refused"), ("a\n", "refused"), ("a=\n", "refused"),
    ("a=b=1\n", "refused"), ("(a)=1\n", "refused"), ("if a: b=1\n", "refused"),
    # Assignments: the last one counts, += adds one kind to itself.
    ("a=1\na=[2]\na='x'\n", "accepted"), ("a+='x'\n", "accepted"), ("a=1\na+=2\n", "accepted"),
    ("a=[1]\na+=[2]\na+=[]\n", "accepted"), ("a=[1]\na+='x'\n", "refused"),
    ("a='x'\na+=['x']\n", "refused"), ("a=[1]\na='x'\na+='y'\n", "accepted"),
    # Lists.
    ("a=[]\n", "accepted"), ("a=[\n\n]\n", "accepted"), ("a=[1,\n2\n,3,\n]\n", "accepted"),
    ("a=[ # c\n1 # c\n, # c\n]\n", "accepted"), ("a=[\n,1]\n", "refused"), ("a=[,]\n", "refused"),
    ("a=[1,,2]\n", "refused"), ("a=[1 2]\n", "refused"), ("a=[1\n2]\n", "refused"),
    ("a=[1;2]\n", "refused"), ("a=[[1],['x',[]]]\n", "accepted"), ("a=[b]\n", "refused"),
    ("a=[1]]\n", "refused"), ("a=[1\n", "refused"), ("a=[b=1]\n", "refused"),
    ("a=[1]['x']\n", "refused"), ("a=[1] b=2\n", "refused"), ("a=(1,2)\n", "refused"),
    ("a={1:2}\n", "refused"),
    # A single stray byte as the very last is nothing to flex.
    ("a=1 #", "accepted"), ("a=1 '", "accepted"), ("a=1\r", "accepted"), ("a=1\\", "accepted"),
    ("a=1 ##", "refused"), ("a=1 Z", "accepted"), ("a=1 ZZ", "refused"), ("a=1 Z\n", "refused"),
]  # fmt: skip
"""A text for each way in which the language is not what it seems, and what becomes of it."""
STRICTER = ("nest deeper", "NUL byte", "is not UTF-8")
"""What of REFUSED we alone refuse, on purpose; a NUL byte makes xl abort."""


def test_the_library_is_there_where_it_is_promised() -> None:
    assert LIBRARY is not None or "XSHMD_EXPECT_LIBXLUTIL" not in os.environ


if LIBRARY is not None:
    XLU = LibXlu(LIBRARY)

    def compare(text: str) -> str:
        """Read a text both ways, and return what both made of it."""
        try:
            ours: XlConfig | None = parse(text, "f")
        except ConfigUnreadable:
            ours = None
        theirs = XLU.read(text.encode(), list(ours or ()))
        if ours is None:
            if theirs.refused:
                return "refused"
            # The one thing that xl accepts, as nothing at all, and we refuse on purpose.
            assert re.search(r"\\[0-7]", text), "xl accepts what we refuse"
            return "octal"
        assert not theirs.refused, "xl refuses what we accept"
        mine = {key: (one.line, as_theirs(one.value)[1]) for key, one in ours.items()}
        assert mine == theirs.settings
        return "accepted"

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(TEXTS)
    def test_xl_and_we_read_the_same(text: str) -> None:
        event(compare(text))

    @settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(good_texts().filter(lambda text: "+=" not in text))
    def test_the_good_texts_are_good(text: str) -> None:
        assert compare(text) == "accepted"

    @pytest.mark.parametrize(("text", "outcome"), TRAPS)
    def test_every_trap(text: str, outcome: str) -> None:
        assert compare(text) == outcome

    @pytest.mark.parametrize("text", [text for text, _ in ACCEPTED])
    def test_what_we_say_is_accepted_is(text: str) -> None:
        assert compare(text) == "accepted"

    @pytest.mark.parametrize(
        "text",
        [
            text
            for text, _, what, _ in REFUSED
            if isinstance(text, str) and not any(one in what for one in STRICTER)
        ],
    )
    def test_what_we_say_is_refused_is(text: str) -> None:
        assert compare(text) in ("refused", "octal")

    @pytest.mark.parametrize("nr_entries", [1, 10_000])
    def test_long_lists(nr_entries: int) -> None:
        entries = ",\n".join(f"'id=r{index}, role=borrower'" for index in range(nr_entries))
        assert compare(f"static_shm=[{entries}]\n") == "accepted"
