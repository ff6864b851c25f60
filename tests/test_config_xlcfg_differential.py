# SPDX-License-Identifier: LGPL-2.1-or-later
"""Our reading of xl's configuration language, held against libxlutil itself.

Where no libxlutil is installed this module has no tests at all: they are defined below only if it
could be loaded, so nothing is reported as skipped that was never going to run.  The rig's dom0
always has it (libxenmisc), and so has any machine with xl.
"""

import ctypes
import re
from dataclasses import dataclass

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

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

    def test_both_outcomes_are_compared() -> None:
        assert compare("a=[1,\n'x']\na+=[[2]]\n") == "accepted"
        assert compare("a=1") == "accepted"
        assert compare("a=256M") == "accepted"
        assert compare("a=256M\n") == "refused"
        assert compare(r"a='\012x'") == "octal"
