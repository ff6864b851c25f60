# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages byte by byte as the protocol has them, with and without the fields for Xen."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xshmd.vhost_user import payloads, wire
from xshmd.vhost_user.payloads import Config, MemoryRegion, VringAddress, VringState, XenFlag
from xshmd.vhost_user.wire import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    VERSION,
    Inbox,
    Message,
    ProtocolFeature,
    ProtocolViolation,
    Request,
)

ONE = MemoryRegion(
    guest_address=0x3A000000, size_bytes=0x100000, user_address=0x7F0011223000, mmap_offset=0x5000
)
TWO = MemoryRegion(
    guest_address=0x40200000, size_bytes=0x2000, user_address=0x3A000000,
    xen_flags=XenFlag.FOREIGN, domid=7,
)  # fmt: skip
GRANTED = MemoryRegion(
    guest_address=(1 << 63) | 0x8000, size_bytes=0x1000, user_address=0,
    xen_flags=XenFlag.GRANT | XenFlag.NO_ADVANCE_MAP, domid=9,
)  # fmt: skip
ONE_HEX = "0000003a00000000 0000100000000000 00302211007f0000 0050000000000000"
TWO_HEX = "0000204000000000 0020000000000000 0000003a00000000 0000000000000000"
"""Written for a little-endian machine, as all that Xen runs on are."""

GOLDEN = [
    (Message(Request.GET_FEATURES), "01000000 01000000 00000000"),
    (
        Message(Request.SET_FEATURES, payloads.encode_u64(1 << 32)),
        "02000000 01000000 08000000 0000000001000000",
    ),
    (Message(Request.SET_OWNER), "03000000 01000000 00000000"),
    (Message(Request.RESET_OWNER), "04000000 01000000 00000000"),
    (
        Message(Request.SET_MEM_TABLE, payloads.encode_table([ONE], xen=False)),
        f"05000000 01000000 28000000 01000000 00000000 {ONE_HEX}",
    ),
    (
        Message(Request.SET_MEM_TABLE, payloads.encode_table([ONE, TWO], xen=True)),
        f"05000000 01000000 58000000 02000000 00000000 {ONE_HEX} 0000000000000000"
        f"{TWO_HEX} 01000000 07000000",
    ),
    (
        Message(Request.SET_VRING_NUM, payloads.encode_state(VringState(1, 256))),
        "08000000 01000000 08000000 01000000 00010000",
    ),
    (
        Message(
            Request.SET_VRING_ADDR,
            payloads.encode_address(
                VringAddress(index=2, flags=1, descriptors=0x10, used=0x20, available=0x30, log=4)
            ),
        ),
        "09000000 01000000 28000000 02000000 01000000 1000000000000000 2000000000000000"
        "3000000000000000 0400000000000000",
    ),
    (
        Message(Request.SET_VRING_BASE, payloads.encode_state(VringState(0, 9))),
        "0a000000 01000000 08000000 00000000 09000000",
    ),
    (
        Message(Request.GET_VRING_BASE, payloads.encode_state(VringState(3, 0))),
        "0b000000 01000000 08000000 03000000 00000000",
    ),
    (
        Message(Request.SET_VRING_KICK, payloads.encode_u64(1)),
        "0c000000 01000000 08000000 0100000000000000",
    ),
    (
        Message(Request.SET_VRING_CALL, payloads.encode_u64(wire.VRING_NO_FD)),
        "0d000000 01000000 08000000 0001000000000000",
    ),
    (
        Message(Request.SET_VRING_ERR, payloads.encode_u64(wire.VRING_NO_FD | 2)),
        "0e000000 01000000 08000000 0201000000000000",
    ),
    (Message(Request.GET_PROTOCOL_FEATURES), "0f000000 01000000 00000000"),
    (
        Message(
            Request.SET_PROTOCOL_FEATURES,
            payloads.encode_u64(
                ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.BACKEND_REQ
                | ProtocolFeature.CONFIGURE_MEM_SLOTS | ProtocolFeature.XEN_MMAP
            ),
        ),
        "10000000 01000000 08000000 2980020000000000",
    ),
    (Message(Request.GET_QUEUE_NUM), "11000000 01000000 00000000"),
    (
        Message(Request.SET_VRING_ENABLE, payloads.encode_state(VringState(0, 1))),
        "12000000 01000000 08000000 00000000 01000000",
    ),
    (Message(Request.SET_BACKEND_REQ_FD), "15000000 01000000 00000000"),
    (
        Message(Request.GET_CONFIG, payloads.encode_config(Config(4, 0, b"\1\2\3"))),
        "18000000 01000000 0f000000 04000000 03000000 00000000 010203",
    ),
    (
        Message(Request.SET_CONFIG, payloads.encode_config(Config(0, 1, b"\xff"))),
        "19000000 01000000 0d000000 00000000 01000000 01000000 ff",
    ),
    (Message(Request.RESET_DEVICE), "22000000 01000000 00000000"),
    (Message(Request.GET_MAX_MEM_SLOTS), "24000000 01000000 00000000"),
    (
        Message(
            Request.ADD_MEM_REG, payloads.encode_single(ONE, xen=False),
            flags=VERSION | FLAG_NEED_REPLY,
        ),
        f"25000000 09000000 28000000 0000000000000000 {ONE_HEX}",
    ),
    (
        Message(Request.ADD_MEM_REG, payloads.encode_single(GRANTED, xen=True)),
        "25000000 01000000 30000000 0000000000000000 0080000000000080 0010000000000000"
        "0000000000000000 0000000000000000 02010000 09000000",
    ),
    (
        Message(Request.REM_MEM_REG, payloads.encode_single(TWO, xen=True)),
        f"26000000 01000000 30000000 0000000000000000 {TWO_HEX} 01000000 07000000",
    ),
    (
        Message(Request.SET_STATUS, payloads.encode_u64(7)),
        "27000000 01000000 08000000 0700000000000000",
    ),
    (Message(Request.GET_STATUS), "28000000 01000000 00000000"),
]  # fmt: skip


ACKNOWLEDGED = VERSION | FLAG_REPLY


def reply(request: Request, payload: bytes) -> Message:
    return Message(request, payload, flags=ACKNOWLEDGED)


def ack(request: Request, hexes: str) -> tuple[Message, str]:
    """REPLY_ACK's answer to a request that has none of its own: it went well."""
    return reply(request, payloads.encode_u64(0)), f"{hexes} 05000000 08000000 0000000000000000"


REPLIES = [
    (
        reply(Request.GET_FEATURES, payloads.encode_u64(0x140000000)),
        "01000000 05000000 08000000 0000004001000000",
    ),
    (
        reply(
            Request.GET_PROTOCOL_FEATURES,
            payloads.encode_u64(ProtocolFeature.REPLY_ACK | ProtocolFeature.XEN_MMAP),
        ),
        "0f000000 05000000 08000000 0800020000000000",
    ),
    (
        reply(Request.GET_QUEUE_NUM, payloads.encode_u64(2)),
        "11000000 05000000 08000000 0200000000000000",
    ),
    (
        reply(Request.GET_MAX_MEM_SLOTS, payloads.encode_u64(64)),
        "24000000 05000000 08000000 4000000000000000",
    ),
    (
        reply(Request.GET_VRING_BASE, payloads.encode_state(VringState(3, 65535))),
        "0b000000 05000000 08000000 03000000 ffff0000",
    ),
    (
        reply(Request.GET_CONFIG, payloads.encode_config(Config(4, 0, b"\1\2\3"))),
        "18000000 05000000 0f000000 04000000 03000000 00000000 010203",
    ),
    (
        reply(Request.GET_STATUS, payloads.encode_u64(0xF)),
        "28000000 05000000 08000000 0f00000000000000",
    ),
    ack(Request.SET_FEATURES, "02000000"),
    ack(Request.SET_OWNER, "03000000"),
    ack(Request.RESET_OWNER, "04000000"),
    ack(Request.SET_MEM_TABLE, "05000000"),
    ack(Request.SET_VRING_NUM, "08000000"),
    ack(Request.SET_VRING_ADDR, "09000000"),
    ack(Request.SET_VRING_BASE, "0a000000"),
    ack(Request.SET_VRING_KICK, "0c000000"),
    ack(Request.SET_VRING_CALL, "0d000000"),
    ack(Request.SET_VRING_ERR, "0e000000"),
    ack(Request.SET_PROTOCOL_FEATURES, "10000000"),
    ack(Request.SET_VRING_ENABLE, "12000000"),
    ack(Request.SET_BACKEND_REQ_FD, "15000000"),
    ack(Request.SET_CONFIG, "19000000"),
    ack(Request.RESET_DEVICE, "22000000"),
    ack(Request.ADD_MEM_REG, "25000000"),
    ack(Request.REM_MEM_REG, "26000000"),
    ack(Request.SET_STATUS, "27000000"),
    (
        reply(Request.ADD_MEM_REG, payloads.encode_u64(1)),
        "25000000 05000000 08000000 0100000000000000",
    ),
]

IN_ADVANCE = "0080000000000080 0010000000000000 0000000000000000 0000000000000000"
TABLES = [
    (Request.SET_MEM_TABLE, (), False, "05000000 01000000 08000000 00000000 00000000"),
    (Request.SET_MEM_TABLE, (), True, "05000000 01000000 08000000 00000000 00000000"),
    (
        Request.SET_MEM_TABLE, (ONE,) * 8, False,
        "05000000 01000000 08010000 08000000 00000000" + ONE_HEX * 8,
    ),
    (
        Request.SET_MEM_TABLE, (GRANTED,) * 8, True,
        "05000000 01000000 48010000 08000000 00000000" + f"{IN_ADVANCE} 02010000 09000000" * 8,
    ),
    (Request.ADD_MEM_REG, (ONE,), False, f"25000000 01000000 28000000 0000000000000000 {ONE_HEX}"),
    (
        Request.ADD_MEM_REG, (ONE,), True,
        f"25000000 01000000 30000000 0000000000000000 {ONE_HEX} 0000000000000000",
    ),
    (
        Request.ADD_MEM_REG, (TWO,), True,
        f"25000000 01000000 30000000 0000000000000000 {TWO_HEX} 01000000 07000000",
    ),
    (
        Request.ADD_MEM_REG, (GRANTED,), True,
        f"25000000 01000000 30000000 0000000000000000 {IN_ADVANCE} 02010000 09000000",
    ),
    (Request.REM_MEM_REG, (ONE,), False, f"26000000 01000000 28000000 0000000000000000 {ONE_HEX}"),
    (
        Request.REM_MEM_REG, (ONE,), True,
        f"26000000 01000000 30000000 0000000000000000 {ONE_HEX} 0000000000000000",
    ),
    (
        Request.REM_MEM_REG, (GRANTED,), True,
        f"26000000 01000000 30000000 0000000000000000 {IN_ADVANCE} 02010000 09000000",
    ),
]  # fmt: skip
"""Whatever describes memory: request, regions, whether with the fields for Xen, bytes."""


def feed(inbox: Inbox, data: bytes) -> list[Message]:
    """Feed bytes as a socket would give them: never more than is wanted."""
    found = []
    while data:
        piece, data = data[: inbox.wanted], data[inbox.wanted :]
        if (message := inbox.feed(piece)) is not None:
            found.append(message)
    return found


@pytest.mark.parametrize(("message", "hexes"), GOLDEN + REPLIES)
def test_golden(message: Message, hexes: str) -> None:
    assert sys.byteorder == "little"
    assert wire.encode(message) == bytes.fromhex(hexes)
    assert feed(Inbox(), bytes.fromhex(hexes)) == [message]


@pytest.mark.parametrize(("request_", "regions", "xen", "hexes"), TABLES)
def test_golden_memory(
    request_: Request, regions: tuple[MemoryRegion, ...], xen: bool, hexes: str
) -> None:
    """Its bytes mean the regions, and the regions these bytes."""
    (message,) = feed(Inbox(), bytes.fromhex(hexes))
    assert (message.request, message.flags) == (request_, VERSION)
    if request_ == Request.SET_MEM_TABLE:
        assert payloads.decode_table(message.payload, xen=xen) == regions
        assert payloads.encode_table(regions, xen=xen) == message.payload
    else:
        assert (payloads.decode_single(message.payload, xen=xen),) == regions
        assert payloads.encode_single(regions[0], xen=xen) == message.payload


def foreign(guest_address: int, size_bytes: int, user_address: int) -> MemoryRegion:
    return MemoryRegion(
        guest_address=guest_address, size_bytes=size_bytes, user_address=user_address,
        xen_flags=XenFlag.FOREIGN, domid=5,
    )  # fmt: skip


def test_what_rust_vmm_sends() -> None:
    """Recorded from the front-end of Debian 13's librust-vhost-dev 0.13.0, built for Xen."""
    (table,) = feed(
        Inbox(),
        bytes.fromhex(
            "05000000 09000000 58000000 02000000 00000000"
            "0000204000000000 0020000000000000 0000003a00000000 0000000000000000 01000000 05000000"
            "0020204000000000 0010000000000000 0020003a00000000 0000000000000000 01000000 05000000"
        ),
    )
    regions = (foreign(0x40200000, 0x2000, 0x3A000000), foreign(0x40202000, 0x1000, 0x3A002000))
    assert payloads.decode_table(table.payload, xen=True) == regions
    assert payloads.encode_table(regions, xen=True) == table.payload
    granted = MemoryRegion(
        guest_address=(1 << 63) | 0x8000, size_bytes=0x1000, user_address=0,
        xen_flags=XenFlag.GRANT | XenFlag.NO_ADVANCE_MAP_RUST_VMM, domid=5,
    )  # fmt: skip
    for request, number in ((Request.ADD_MEM_REG, "25"), (Request.REM_MEM_REG, "26")):
        (single,) = feed(
            Inbox(),
            bytes.fromhex(
                f"{number}000000 09000000 30000000 0000000000000000 0080000000000080"
                "0010000000000000 0000000000000000 0000000000000000 0a000000 05000000"
            ),
        )
        assert single.request == request
        assert payloads.decode_single(single.payload, xen=True) == granted
        assert payloads.encode_single(granted, xen=True) == single.payload


def test_no_message_is_longer_than_may_be() -> None:
    table = payloads.encode_table([ONE] * wire.MAX_TABLE_REGIONS, xen=True)
    config = payloads.encode_config(Config(0, 0, bytes(wire.MAX_CONFIG_BYTES)))
    assert max(len(table), len(config)) == wire.MAX_PAYLOAD_BYTES


def test_every_request_has_a_vector() -> None:
    assert {message.request for message, _ in GOLDEN} == set(Request)
    assert {message.request for message, _ in REPLIES} == set(Request)
    memory = {Request.SET_MEM_TABLE, Request.ADD_MEM_REG, Request.REM_MEM_REG}
    for with_xen in (False, True):
        assert {request for request, _, xen, _ in TABLES if xen == with_xen} == memory


def test_payloads_come_back() -> None:
    assert payloads.decode_table(payloads.encode_table([ONE, TWO], xen=True), xen=True) == (
        ONE,
        TWO,
    )
    assert payloads.decode_table(payloads.encode_table([ONE], xen=False), xen=False) == (ONE,)
    assert payloads.decode_table(payloads.encode_table([], xen=True), xen=True) == ()
    assert payloads.decode_single(payloads.encode_single(GRANTED, xen=True), xen=True) == GRANTED
    address = VringAddress(index=1, flags=0, descriptors=16, used=32, available=64, log=0)
    assert payloads.decode_address(payloads.encode_address(address)) == address
    assert payloads.decode_config(payloads.encode_config(Config(1, 2, b"abc"))) == Config(
        1, 2, b"abc"
    )


def test_plain_descriptions_are_told_from_xens_by_their_size() -> None:
    """QEMU agrees to XEN_MMAP without knowing it; see _region_size()."""
    assert (
        payloads.decode_table(payloads.encode_table([ONE] * 5, xen=False), xen=True) == (ONE,) * 5
    )
    assert payloads.decode_single(payloads.encode_single(ONE, xen=False), xen=True) == ONE
    with pytest.raises(ProtocolViolation):
        payloads.decode_single(payloads.encode_single(ONE, xen=True), xen=False)


@pytest.mark.parametrize(
    ("read", "payload"),
    [
        (payloads.decode_u64, b"1234567"),
        (payloads.decode_state, bytes(9)),
        (payloads.decode_address, bytes(39)),
        (payloads.decode_config, bytes(11)),
        (payloads.decode_config, payloads.encode_config(Config(0, 0, bytes(257)))),
        (payloads.decode_config, payloads.encode_config(Config(0xFFFFFFFF, 0, b"a"))),
        (payloads.decode_config, payloads.encode_config(Config(0, 0, b"abc"))[:-1]),
        (lambda data: payloads.decode_table(data, xen=True), b"\1\0\0\0"),
        (lambda data: payloads.decode_table(data, xen=True), b"\1\0\0\0\0\0\0\0" + bytes(36)),
        (lambda data: payloads.decode_table(data, xen=True), b"\xff\xff\xff\xff\0\0\0\0"),
        (lambda data: payloads.decode_table(data, xen=False), b"\x09\0\0\0\0\0\0\0" + bytes(288)),
        (lambda data: payloads.decode_single(data, xen=False), bytes(7)),
    ],
)
def test_payloads_of_the_wrong_size(read: Callable[[bytes], object], payload: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        read(payload)


@pytest.mark.parametrize(
    "header",
    [
        wire.HEADER.pack(1, 0, 0),  # no version
        wire.HEADER.pack(1, 2, 0),
        wire.HEADER.pack(1, VERSION | 16, 0),
        wire.HEADER.pack(5, VERSION, wire.MAX_PAYLOAD_BYTES + 1),
        wire.HEADER.pack(5, VERSION, 0xFFFFFFFF),
    ],
)
def test_headers_that_there_cannot_be(header: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        Inbox().feed(header)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_any_cut_gives_the_same_messages(cuts: list[int]) -> None:
    stream = b"".join(bytes.fromhex(hexes) for _, hexes in GOLDEN)
    inbox, found, at = Inbox(), [], 0
    while at < len(stream):
        size = cuts[at % len(cuts)]
        found += feed(inbox, stream[at : at + size])
        at += size
    assert found == [message for message, _ in GOLDEN]
    assert not inbox.pending


def test_descriptors_are_those_of_the_message_they_came_with() -> None:
    inbox = Inbox()
    data = wire.encode(Message(Request.SET_VRING_KICK, payloads.encode_u64(0)))
    assert inbox.feed(data[:5], [3]) is None
    assert inbox.feed(data[5:12], [4]) is None
    message = inbox.feed(data[12:])
    assert message is not None
    assert message.fds == (3, 4)
    assert feed(inbox, data)[0].fds == ()


def test_too_many_descriptors() -> None:
    inbox = Inbox()
    fds = [os.dup(0) for _ in range(9)]
    with pytest.raises(ProtocolViolation):
        inbox.feed(b"\1", fds)
    assert list(inbox.abandon()) == fds
    for fd in fds:
        os.close(fd)
