# SPDX-License-Identifier: LGPL-2.1-or-later
"""The wire: what is a message, what is a call, and what closes the connection."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xshmd.varlink import wire
from xshmd.varlink.wire import Call, Decoder, Flag, ProtocolViolation, Reply

LIMIT = 64


def messages_of(decoder: Decoder) -> list[bytes]:
    found = []
    while (message := decoder.next_message()) is not None:
        found.append(message)
    return found


@given(
    st.lists(st.binary(max_size=LIMIT).map(lambda data: data.replace(b"\0", b""))),
    st.lists(st.integers(min_value=1, max_value=LIMIT)),
)
def test_any_split_of_the_stream_gives_the_same_messages(
    messages: list[bytes], cuts: list[int]
) -> None:
    stream = b"".join(message + b"\0" for message in messages)
    decoder = Decoder(LIMIT)
    found = []
    for cut in cuts:
        decoder.feed(stream[:cut])
        stream = stream[cut:]
        found += messages_of(decoder)
    decoder.feed(stream)
    assert found + messages_of(decoder) == messages
    assert not decoder.pending


def test_half_a_message_is_pending_until_its_end_comes() -> None:
    decoder = Decoder(LIMIT)
    decoder.feed(b'{"method"')
    assert decoder.next_message() is None
    assert decoder.pending
    decoder.feed(b":1}\0")
    assert decoder.next_message() == b'{"method":1}'
    assert not decoder.pending


def test_a_message_of_exactly_the_limit_passes() -> None:
    decoder = Decoder(LIMIT)
    decoder.feed(b"x" * LIMIT + b"\0")
    assert decoder.next_message() == b"x" * LIMIT


@pytest.mark.parametrize("end", [b"", b"\0"])
def test_a_message_beyond_the_limit_is_refused_even_unfinished(end: bytes) -> None:
    decoder = Decoder(LIMIT)
    decoder.feed(b"x" * (LIMIT + 1) + end)
    with pytest.raises(ProtocolViolation, match="longer than 64"):
        decoder.next_message()


def test_a_long_message_after_good_ones_does_not_take_them_along() -> None:
    decoder = Decoder(LIMIT)
    decoder.feed(b"a\0b\0" + b"x" * (LIMIT + 1))
    assert decoder.next_message() == b"a"
    assert decoder.next_message() == b"b"
    with pytest.raises(ProtocolViolation):
        decoder.next_message()


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (b'{"method":"a.B"}', Call("a.B", {})),
        (b' {"method" : "a.B",\n"parameters":null} ', Call("a.B", {})),
        (b'{"method":"a.B","parameters":{}}', Call("a.B", {})),
        (b'{"method":"a.B","parameters":{"c":[1]}}', Call("a.B", {"c": [1]})),
        (b'{"method":"a.B","more":true,"oneway":false}', Call("a.B", {}, Flag.MORE)),
        (b'{"method":"a.B","oneway":true,"more":null}', Call("a.B", {}, Flag.ONEWAY)),
        (b'{"method":"a.B","upgrade":true}', Call("a.B", {}, Flag.UPGRADE)),
        (b'{"method":"a.B","org.example":{"x":1}}', Call("a.B", {})),
        (
            '{"method":"a.B","parameters":{"c":"\\ud83d\\ude00é"}}'.encode(),
            Call("a.B", {"c": "😀é"}),
        ),
    ],
)
def test_good_calls(message: bytes, call: Call) -> None:
    expected = Call(call.method, call.parameters, call.flag, len(message))
    assert wire.parse_call(message) == expected


def nested(levels: int) -> bytes:
    """Return a call whose innermost value is ``levels`` deep, the call itself counted."""
    arrays = levels - 2
    return b'{"method":"a.B","parameters":{"c":' + b"[" * arrays + b"]" * arrays + b"}}"


BAD_CALLS = {
    "empty": b"",
    "not JSON": b"{",
    "no object": b"[]",
    "null": b"null",
    "two values": b'{"method":"a.B"}{}',
    "no method": b"{}",
    "null method": b'{"method":null}',
    "method no string": b'{"method":1}',
    "parameters an array": b'{"method":"a.B","parameters":[]}',
    "flag a number": b'{"method":"a.B","more":1}',
    "flag a string": b'{"method":"a.B","oneway":"true"}',
    "two flags": b'{"method":"a.B","more":true,"oneway":true}',
    "two other flags": b'{"method":"a.B","upgrade":true,"oneway":true}',
    "unknown key": b'{"method":"a.B","extra":1}',
    "X- key": b'{"method":"a.B","X-extra":1}',
    "reply key": b'{"method":"a.B","continues":true}',
    "key twice": b'{"method":"a.B","method":"a.C"}',
    "parameter twice": b'{"method":"a.B","parameters":{"c":1,"c":2}}',
    "invalid UTF-8": b'{"method":"a.B\xff"}',
    "UTF-8 surrogate": b'{"method":"a.B\xed\xa0\x80"}',
    "UTF-16": '{"method":"a.B"}'.encode("utf-16"),
    "BOM": b'\xef\xbb\xbf{"method":"a.B"}',
    "half surrogate pair": b'{"method":"a.B","parameters":{"c":"\\ud800"}}',
    "half surrogate pair in a key": b'{"method":"a.B","parameters":{"\\udfff":1}}',
    "half surrogate pair in the method": b'{"method":"a.\\ud800"}',
    "NaN": b'{"method":"a.B","parameters":{"c":NaN}}',
    "Infinity": b'{"method":"a.B","parameters":{"c":-Infinity}}',
    "endless integer": b'{"method":"a.B","parameters":{"c":' + b"9" * 5000 + b"}}",
    "raw control character": b'{"method":"a.\x01B"}',
    "too deep": nested(wire.MAX_DEPTH + 1),
    "far too deep": nested(100_000),
    "far too deep and unfinished": b"[" * 100_000,
}


@pytest.mark.parametrize("message", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_calls(message: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        wire.parse_call(message)


def test_the_deepest_call_allowed() -> None:
    assert wire.parse_call(nested(wire.MAX_DEPTH)).method == "a.B"


@pytest.mark.parametrize(
    "message",
    [
        b'{"error":"a.B","continues":true}',
        b'{"error":""}',
        b'{"error":1}',
        b'{"parameters":1}',
        b'{"method":"a.B"}',
        b'{"continues":1}',
        b"1",
    ],
)
def test_bad_replies(message: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        wire.parse_reply(message)


def test_absent_null_and_empty_parameters_are_the_same_in_a_reply() -> None:
    for message in (b"{}", b'{"parameters":null}', b'{"parameters":{},"continues":false}'):
        assert wire.parse_reply(message) == Reply({})


def test_what_is_empty_is_left_out() -> None:
    assert wire.encode_call(Call("a.B", {})) == b'{"method":"a.B"}\0'
    assert wire.encode_reply(Reply({})) == b"{}\0"


FLAGS = (Flag.NONE, Flag.MORE, Flag.ONEWAY, Flag.UPGRADE)
TEXT = st.text(st.characters(codec="utf-8"))
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(TEXT, st.dictionaries(TEXT, VALUES, max_size=3), st.sampled_from(FLAGS))
def test_calls_come_out_as_they_went_in(
    method: str, parameters: dict[str, Any], flag: Flag
) -> None:
    data = wire.encode_call(Call(method, parameters, flag))
    assert data.count(b"\0") == 1
    assert wire.parse_call(data[:-1]) == Call(method, parameters, flag, len(data) - 1)


@given(st.dictionaries(TEXT, VALUES, max_size=3), TEXT, st.booleans())
def test_replies_come_out_as_they_went_in(
    parameters: dict[str, Any], error: str, continues: bool
) -> None:
    reply = Reply(parameters, error, continues and not error)
    data = wire.encode_reply(reply)
    assert data.count(b"\0") == 1
    assert wire.parse_reply(data[:-1]) == reply


@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_nothing_but_a_violation_comes_of_garbage(message: bytes) -> None:
    for parse in (wire.parse_call, wire.parse_reply):
        try:
            parse(message)
        except ProtocolViolation:
            continue


def test_an_undecodable_file_name_can_still_be_told_of() -> None:
    data = wire.encode_reply(Reply({"message": "b\udcff.cfg"}))
    assert wire.parse_reply(data[:-1]).parameters == {"message": "b?.cfg"}
