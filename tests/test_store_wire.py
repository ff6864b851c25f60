# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xshmd.errors import StoreError
from xshmd.xen import store_wire as wire
from xshmd.xen.store_wire import Frame, FrameDecoder, Op, WireError

u32 = st.integers(0, 0xFFFF_FFFF)
frames = st.builds(
    Frame,
    op=st.sampled_from(sorted(wire.KNOWN_OPS)),
    rq_id=u32,
    tx_id=u32,
    payload=st.binary(max_size=200) | st.binary(min_size=4090, max_size=4096),
)
cuts = st.lists(st.integers(0, 20_000), max_size=12)


def header(op: int, length: int) -> bytes:
    return struct.pack("=IIII", op, 1, 0, length)


def split(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted(min(place, len(data)) for place in places)
    return [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)]


def decode(pieces: list[bytes]) -> tuple[list[Frame], str]:
    decoder, found = FrameDecoder(), []
    try:
        for piece in pieces:
            decoder.feed(piece)
            while frame := decoder.next_frame():
                found.append(frame)
    except WireError as exc:
        return found, str(exc)
    return found, "within a frame" if decoder.in_frame else ""


@given(st.lists(frames, max_size=5), cuts)
def test_what_is_encoded_is_decoded_however_it_is_split(
    sent: list[Frame], places: list[int]
) -> None:
    data = b"".join(map(wire.encode_frame, sent))
    assert decode(split(data, places)) == (sent, "")


@given(st.lists(frames, max_size=3), st.binary(max_size=64), cuts)
def test_the_outcome_of_any_bytes_does_not_depend_on_the_split(
    sent: list[Frame], junk: bytes, places: list[int]
) -> None:
    data = b"".join(map(wire.encode_frame, sent)) + junk
    assert decode(split(data, places)) == decode([data])


def test_bytes_on_the_wire_are_those_of_xs_wire_h() -> None:
    frame = Frame(op=Op.DIRECTORY_PART, rq_id=7, tx_id=9, payload=b"/a\x000\0")
    assert wire.encode_frame(frame) == struct.pack("=IIII", 22, 7, 9, 5) + b"/a\x000\0"
    assert (Op.READ, Op.WRITE, Op.RM, Op.WATCH_EVENT, Op.ERROR) == (2, 11, 13, 15, 16)


def test_a_payload_over_the_limit_is_not_encoded() -> None:
    wire.encode_frame(Frame(op=Op.READ, rq_id=1, payload=bytes(4096)))
    with pytest.raises(ValueError, match="4097"):
        wire.encode_frame(Frame(op=Op.READ, rq_id=1, payload=bytes(4097)))


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (header(Op.READ, 4097), "READ"),
        (header(Op.DIRECTORY, wire.DIRECTORY_REPLY_MAX + 1), "DIRECTORY"),
        (header(20, 0), "0x14"),  # RESTRICT, removed
        (header(0xFFFF, 0), "0xffff"),
    ],
)
def test_an_impossible_header_is_an_error_and_stays_one(bad: bytes, what: str) -> None:
    decoder = FrameDecoder()
    decoder.feed(bad)
    for _ in range(2):
        with pytest.raises(WireError, match=what):
            decoder.next_frame()


def test_the_long_directory_of_oxenstored_is_taken() -> None:
    decoder = FrameDecoder()
    decoder.feed(header(Op.DIRECTORY, 9000) + bytes(9000))
    frame = decoder.next_frame()
    assert frame is not None
    assert len(frame.payload) == 9000


LONG = "/" + "a" * 3071


@pytest.mark.parametrize("path", ["/", "/a", "/a-b/_c/@d/0", LONG, "/local/domain/7/" + "a" * 2048])
def test_good_paths(path: str) -> None:
    assert wire.encode_path(path) == path.encode()


@pytest.mark.parametrize(
    "path",
    [
        "", "a", "//", "/a/", "/a//b", "/a b", "/a\0b", "/a\n", "/\u00e9", "/a+b", "@releaseDomain",
        LONG + "a", "/local/domain/7/" + "a" * 2049,
    ],
)  # fmt: skip
def test_bad_paths(path: str) -> None:
    with pytest.raises(StoreError) as caught:
        wire.encode_path(path)
    assert caught.value.facts["error"] == "EINVAL"


def test_special_paths_only_where_allowed() -> None:
    for path in ("@introduceDomain", "@releaseDomain/7"):
        assert wire.encode_path(path, special_allowed=True) == path.encode()
    for path in ("@", "@a/", "@a//b", "@a b"):
        with pytest.raises(StoreError):
            wire.encode_path(path, special_allowed=True)


def test_values_fit_beside_their_path_or_are_refused() -> None:
    room = 4096 - len("/a\0")
    assert len(wire.encode_write("/a", "v" * room)) == 4096
    for value in ("v" * (room + 1), "\u00e9" * (room // 2 + 1)):
        with pytest.raises(StoreError, match="too long") as caught:
            wire.encode_write("/a", value)
        assert caught.value.facts == {"path": "/a", "error": "E2BIG"}
    with pytest.raises(StoreError, match="UTF-8"):
        wire.encode_write("/a", "\ud800")


@given(st.text())
def test_text_comes_back(value: str) -> None:
    try:
        data = value.encode()
    except UnicodeEncodeError:
        return
    assert wire.decode_value(data) == value


@given(st.binary())
def test_any_bytes_of_a_guest_become_text_that_can_be_encoded(data: bytes) -> None:
    wire.decode_value(data).encode()


def test_permissions() -> None:
    assert wire.encode_permissions("/a", ("n0", "r65535")) == b"/a\0n0\0r65535\0"
    for bad in ((), ("x0",), ("n",), ("n-1",), ("n65536",), ("n00",), ("n0 r1",), ("n0\n",)):
        with pytest.raises(StoreError):
            wire.encode_permissions("/a", bad)
    with pytest.raises(StoreError, match="too many"):
        wire.encode_permissions("/a", ["r65535"] * 600)


def test_strings_must_be_ended_ascii() -> None:
    assert wire.split_strings(b"") == ()
    assert wire.split_strings(b"a\0\0b\0") == ("a", "", "b")
    for bad in (b"a", b"a\0b", b"\xff\0"):
        with pytest.raises(WireError):
            wire.split_strings(bad)


def test_error_names() -> None:
    assert wire.decode_error(b"EQUOTA\0") == "EQUOTA"
    assert wire.decode_error(b"ENOENT") == "ENOENT"
    assert wire.decode_error(b"\xffE\0") == "EINVAL"


def test_parts_of_a_directory() -> None:
    assert wire.decode_directory_part(b"12\0a\0b\0") == (b"12", b"a\0b\0", False)
    assert wire.decode_directory_part(b"12\0a\0b\0\0") == (b"12", b"a\0b\0", True)
    assert wire.decode_directory_part(b"12\0\0") == (b"12", b"", True)
    for bad in (b"", b"12", b"12\0", b"12\0a"):
        with pytest.raises(WireError):
            wire.decode_directory_part(bad)


@pytest.mark.parametrize(
    ("op", "good", "bad"),
    [
        (Op.DIRECTORY, [b"", b"a\0"], [b"a"]),
        (Op.DIRECTORY_PART, [b"1\0a\0"], [b"1", b"1\0\xff\0"]),
        (
            Op.TRANSACTION_START,
            [b"1\0", b"4294967295\0"],
            [b"", b"0\0", b"-1\0", b"4294967296\0", b"x\0", b"0" * 5000],
        ),
        (Op.IS_DOMAIN_INTRODUCED, [b"T\0", b"F\0"], [b"", b"T", b"X\0"]),
        (Op.READ, [b"", b"\xff"], []),
    ],
)
def test_replies_are_checked(op: Op, good: list[bytes], bad: list[bytes]) -> None:
    for payload in good:
        wire.check_reply(Frame(op=op, rq_id=1, payload=payload))
    for payload in bad:
        with pytest.raises(WireError):
            wire.check_reply(Frame(op=op, rq_id=1, payload=payload))


def test_events() -> None:
    assert wire.decode_event(b"/a\0t\0") == ("/a", "t")
    for bad in (b"/a\0", b"/a\0t\0u\0", b"/a\0t"):
        with pytest.raises(WireError):
            wire.decode_event(bad)
