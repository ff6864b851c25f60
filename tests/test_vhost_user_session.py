# SPDX-License-Identifier: LGPL-2.1-or-later
"""A back-end's side of the protocol, message by message: what holds, and what ends a connection."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator

import pytest

from integration.virtio_driver import PAGE, Driver
from xshmd.vhost_user import payloads, virtqueue, vring, wire
from xshmd.vhost_user.memory import CannotMap, Memory
from xshmd.vhost_user.payloads import MemoryRegion, VringState
from xshmd.vhost_user.session import FEATURES, MAX_MEM_SLOTS, PROTOCOL_FEATURES, Session
from xshmd.vhost_user.virtqueue import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    BrokenQueue,
    Chain,
    read_all,
    write_all,
)
from xshmd.vhost_user.wire import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    VERSION,
    Message,
    ProtocolFeature,
    ProtocolViolation,
    Request,
)
from xshmd.xen.windows import Window

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")

AT, USER, SIZE = 0x3A000000, 0x7F0000000000, 16 * PAGE
REGION = MemoryRegion(guest_address=AT, size_bytes=SIZE, user_address=USER)


class Reverser:
    """Answers each request with its bytes in reverse."""

    features = 1 << 5
    queue_count = 2

    def config(self) -> bytes:
        return b"config"

    def handle(self, memory: Memory, queue: int, chain: Chain) -> int:
        data = read_all(memory, chain.readable)[::-1]
        if data.startswith(b"!"):
            raise BrokenQueue("as asked")
        write_all(memory, chain.writable, data)
        return len(data)


@pytest.fixture
def session() -> Iterator[Session]:
    session = Session(Reverser(), Memory())
    yield session
    session.close()
    session.close()


@pytest.fixture
def shared() -> Iterator[tuple[int, memoryview]]:
    """Memory of the front-end: its descriptor, and the front-end's own view of it."""
    fd = os.memfd_create("front-end")
    os.ftruncate(fd, SIZE)
    with Window(SIZE) as window:
        window.place(fd)
        yield fd, window.view()
    os.close(fd)


def ask(session: Session, request: int, payload: bytes = b"", *fds: int) -> bytes:
    """Send a request that has a reply, and return that."""
    reply = session.handle(Message(request, payload, fds))
    assert reply is not None
    assert (reply.request, reply.flags) == (request, VERSION | FLAG_REPLY)
    return reply.payload


def tell(session: Session, request: int, payload: bytes = b"", *fds: int) -> None:
    assert session.handle(Message(request, payload, fds)) is None


def u64(value: int) -> bytes:
    return payloads.encode_u64(value)


def state(index: int, num: int) -> bytes:
    return payloads.encode_state(VringState(index, num))


def event() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC)


def start(session: Session, driver: Driver, *, index: int = 0, enable: bool = True) -> None:
    """Set a queue up as front-ends do."""
    queue = driver.queue(index)
    tell(session, Request.SET_VRING_NUM, state(index, queue.size))
    tell(session, Request.SET_VRING_BASE, state(index, 0))
    tell(session, Request.SET_VRING_ADDR, payloads.encode_address(queue.where))
    tell(session, Request.SET_VRING_CALL, u64(index), os.dup(driver.call))
    tell(session, Request.SET_VRING_KICK, u64(index), os.dup(driver.kick))
    if enable:
        tell(session, Request.SET_VRING_ENABLE, state(index, 1))


@pytest.fixture
def driver(session: Session, shared: tuple[int, memoryview]) -> Iterator[Driver]:
    """A driver whose queue is started."""
    fd, view = shared
    tell(session, Request.SET_MEM_TABLE, payloads.encode_table([REGION], xen=False), os.dup(fd))
    driver = Driver(view, AT, USER)
    start(session, driver)
    yield driver
    driver.close()


# -- negotiation --------------------------------------------------------------------------------


def test_what_is_offered(session: Session) -> None:
    assert payloads.decode_u64(ask(session, Request.GET_FEATURES)) == FEATURES | 1 << 5
    assert payloads.decode_u64(ask(session, Request.GET_PROTOCOL_FEATURES)) == PROTOCOL_FEATURES
    assert payloads.decode_u64(ask(session, Request.GET_QUEUE_NUM)) == 2
    assert payloads.decode_u64(ask(session, Request.GET_MAX_MEM_SLOTS)) == MAX_MEM_SLOTS
    assert ProtocolFeature.XEN_MMAP in PROTOCOL_FEATURES
    config = payloads.decode_config(
        ask(session, Request.GET_CONFIG, payloads.encode_config(payloads.Config(3, 0, bytes(5))))
    )
    assert config.data == b"fig\0\0"


def test_an_acknowledgement_comes_if_agreed_and_asked_for(session: Session) -> None:
    wanted = Message(Request.SET_OWNER, flags=VERSION | FLAG_NEED_REPLY)
    assert session.handle(wanted) is None
    tell(session, Request.SET_PROTOCOL_FEATURES, u64(ProtocolFeature.REPLY_ACK))
    reply = session.handle(wanted)
    assert reply is not None
    assert payloads.decode_u64(reply.payload) == 0
    assert session.handle(Message(Request.SET_OWNER)) is None


def test_what_cannot_be_mapped_is_said_or_ends_it(session: Session) -> None:
    payload = payloads.encode_single(REGION, xen=False)
    with pytest.raises(CannotMap):
        session.handle(Message(Request.ADD_MEM_REG, payload, (os.memfd_create("empty"),)))
    tell(session, Request.SET_PROTOCOL_FEATURES, u64(ProtocolFeature.REPLY_ACK))
    fds = (os.memfd_create("empty"),)
    reply = session.handle(
        Message(Request.ADD_MEM_REG, payload, fds, flags=VERSION | FLAG_NEED_REPLY)
    )
    assert reply is not None
    assert payloads.decode_u64(reply.payload) == 1
    assert session.memory.regions == ()


def test_the_form_of_descriptions_is_agreed_before_there_are_any(
    session: Session, shared: tuple[int, memoryview]
) -> None:
    tell(session, Request.SET_PROTOCOL_FEATURES, u64(ProtocolFeature.XEN_MMAP))
    payload = payloads.encode_single(REGION, xen=True)
    tell(session, Request.ADD_MEM_REG, payload, os.dup(shared[0]))
    tell(session, Request.SET_PROTOCOL_FEATURES, u64(ProtocolFeature.XEN_MMAP))
    with pytest.raises(ProtocolViolation, match="after memory was given"):
        session.handle(Message(Request.SET_PROTOCOL_FEATURES, u64(0)))
    tell(session, Request.REM_MEM_REG, payload, os.dup(shared[0]))
    tell(session, Request.SET_PROTOCOL_FEATURES, u64(0))


@pytest.mark.parametrize(
    ("request_", "payload", "nr_fds", "says"),
    [
        (0, b"", 0, "request 0 is not known"),
        (6, bytes(16), 1, "request 6 is not known"),
        (0xFFFFFFFF, b"", 3, "is not known"),
        (Request.GET_FEATURES, b"1", 0, "none are expected"),
        (Request.GET_FEATURES, b"", 1, "GET_FEATURES came with 1 file"),
        (Request.SET_FEATURES, u64(1 << 63), 0, "more than were offered"),
        (Request.SET_PROTOCOL_FEATURES, u64(1 << 1), 0, "more than were offered"),
        (
            Request.SET_MEM_TABLE,
            payloads.encode_table([REGION], xen=False),
            2,
            "2 file descriptors",
        ),
        (Request.ADD_MEM_REG, payloads.encode_single(REGION, xen=False), 0, "0 file descriptors"),
        (Request.ADD_MEM_REG, payloads.encode_single(REGION, xen=True), 1, "48 bytes|40 bytes"),
        (Request.REM_MEM_REG, payloads.encode_single(REGION, xen=False), 0, "no region at"),
        (Request.REM_MEM_REG, payloads.encode_single(REGION, xen=False), 2, "2 file descriptors"),
        (Request.SET_VRING_NUM, state(2, 8), 0, "no queue 2"),
        (Request.GET_VRING_BASE, state(0xFFFFFFFF, 0), 0, "no queue"),
        (Request.SET_VRING_KICK, u64(0), 0, "0 file descriptors"),
        (Request.SET_VRING_KICK, u64(wire.VRING_NO_FD), 1, "1 file descriptors"),
        (Request.SET_VRING_KICK, u64(0), 1, "neither an eventfd nor a pipe"),
        (Request.SET_VRING_CALL, u64(7), 1, "no queue 7"),
        (Request.SET_VRING_ADDR, payloads._ADDRESS.pack(0, 0, 8, 0, 0, 0), 0, "not aligned"),
        (Request.SET_VRING_ADDR, payloads._ADDRESS.pack(9, 0, 0, 0, 0, 0), 0, "no queue 9"),
        (Request.SET_BACKEND_REQ_FD, b"", 0, "0 file descriptors"),
        (Request.SET_BACKEND_REQ_FD, b"", 2, "2 file descriptors"),
    ],
)
def test_what_ends_a_connection(
    session: Session, request_: int, payload: bytes, nr_fds: int, says: str
) -> None:
    fds = tuple(os.memfd_create("hostile") for _ in range(nr_fds))
    with pytest.raises(ProtocolViolation, match=says):
        session.handle(Message(request_, payload, fds))
    assert session.memory.regions == ()


def test_a_reply_is_no_request(session: Session) -> None:
    with pytest.raises(ProtocolViolation, match="as a reply"):
        session.handle(Message(Request.GET_FEATURES, flags=VERSION | FLAG_REPLY))


def test_there_is_a_limit_to_regions(session: Session, shared: tuple[int, memoryview]) -> None:
    for number in range(MAX_MEM_SLOTS):
        region = MemoryRegion(
            guest_address=number * SIZE, size_bytes=SIZE, user_address=number * SIZE
        )
        payload = payloads.encode_single(region, xen=False)
        tell(session, Request.ADD_MEM_REG, payload, os.dup(shared[0]))
    payload = payloads.encode_single(REGION, xen=False)
    with pytest.raises(ProtocolViolation, match="more than 64"):
        session.handle(Message(Request.ADD_MEM_REG, payload, (os.dup(shared[0]),)))


def test_status_and_backend_channel(session: Session) -> None:
    tell(session, Request.SET_STATUS, u64(7))
    assert payloads.decode_u64(ask(session, Request.GET_STATUS)) == 7
    tell(session, Request.SET_STATUS, u64(0))
    assert payloads.decode_u64(ask(session, Request.GET_STATUS)) == 0
    tell(session, Request.SET_BACKEND_REQ_FD, b"", event())
    tell(session, Request.SET_BACKEND_REQ_FD, b"", event())
    tell(session, Request.SET_CONFIG, payloads.encode_config(payloads.Config(0, 0, b"x")))


# -- queues -------------------------------------------------------------------------------------


def test_a_request_and_its_answer(session: Session, driver: Driver) -> None:
    driver.place(b"request", 16)
    assert session.process(0) == 1
    assert driver.answer(16)[:7] == b"tseuqer"
    assert os.eventfd_read(driver.call) == 1
    assert session.process(0) == 0


def test_more_requests_than_the_rings_number_goes_to(
    session: Session, shared: tuple[int, memoryview]
) -> None:
    """Both indices wrap at 65536, the slots at the queue's size."""
    fd, view = shared
    tell(session, Request.SET_MEM_TABLE, payloads.encode_table([REGION], xen=False), os.dup(fd))
    driver = Driver(view, AT, USER, already=65530)
    start(session, driver)
    tell(session, Request.SET_VRING_BASE, state(0, 65530))
    for _ in range(4):
        for _ in range(8):
            driver.place(b"abc", 3)
        assert session.process(0) == 8
        assert driver.answer(3) == b"cba"
    assert driver.used == (65530 + 32) % 65536
    assert (
        payloads.decode_state(ask(session, Request.GET_VRING_BASE, state(0, 0))).num == driver.used
    )
    driver.close()


def test_a_queue_that_is_not_enabled_is_left_alone(session: Session, driver: Driver) -> None:
    tell(session, Request.SET_VRING_ENABLE, state(0, 0))
    driver.place(b"abc", 3)
    assert session.process(0) == 0
    tell(session, Request.SET_VRING_ENABLE, state(0, 1))
    assert session.process(0) == 1


def test_without_protocol_features_queues_are_enabled(session: Session, driver: Driver) -> None:
    tell(session, Request.SET_VRING_ENABLE, state(0, 0))
    tell(session, Request.SET_FEATURES, u64(wire.VIRTIO_F_VERSION_1))
    driver.place(b"abc", 3)
    assert session.process(0) == 1


def test_a_stopped_queue_goes_on_where_it_was(session: Session, driver: Driver) -> None:
    driver.place(b"abc", 3)
    session.process(0)
    base = payloads.decode_state(ask(session, Request.GET_VRING_BASE, state(0, 0))).num
    assert base == 1
    driver.place(b"def", 3)
    tell(session, Request.SET_VRING_BASE, state(0, base))
    assert session.process(0) == 1
    assert driver.answer(3) == b"fed"


def test_the_driver_may_want_no_interrupt(session: Session, driver: Driver) -> None:
    driver.memory[PAGE] = 1
    driver.place(b"abc", 3)
    session.process(0)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(driver.call)


def test_an_indirect_request(session: Session, driver: Driver) -> None:
    at = 4 * PAGE
    table = struct.pack("<QIHH", AT + at + 64, 3, DESC_F_NEXT, 1)
    table += struct.pack("<QIHH", AT + at + 128, 3, DESC_F_WRITE, 0)
    driver.memory[at : at + 32] = table
    driver.memory[at + 64 : at + 67] = b"abc"
    driver.descriptor(3, AT + at, 32, DESC_F_INDIRECT, 0)
    driver.offer(3)
    assert session.process(0) == 1
    assert bytes(driver.memory[at + 128 : at + 131]) == b"cba"


def broken(driver: Driver, case: str) -> None:
    """Put what makes no sense into the queue."""
    at = AT + 4 * PAGE
    match case:
        case "a head that is none":
            driver.offer(8)
        case "a loop":
            driver.descriptor(0, at, 4, DESC_F_NEXT, 0)
            driver.offer(0)
        case "a descriptor that is none":
            driver.descriptor(0, at, 4, DESC_F_NEXT, 8)
            driver.offer(0)
        case "an address outside":
            driver.descriptor(0, AT + SIZE - 1, 2, 0, 0)
            driver.offer(0)
        case "an address that wraps":
            driver.descriptor(0, (1 << 64) - 1, 4, 0, 0)
            driver.offer(0)
        case "reading after writing":
            driver.descriptor(0, at, 4, DESC_F_NEXT | DESC_F_WRITE, 1)
            driver.descriptor(1, at, 4, 0, 0)
            driver.offer(0)
        case "more than there is room for":
            for _ in range(9):
                driver.place(b"abc", 3)
        case "too long a request":
            for index in range(8):
                driver.descriptor(index, at, 0xFFFFFFFF, DESC_F_NEXT, index + 1)
            driver.offer(0)
        case "an indirect table outside":
            driver.descriptor(0, AT + SIZE, 16, DESC_F_INDIRECT, 0)
            driver.offer(0)
        case "half an indirect table":
            driver.descriptor(0, at, 17, DESC_F_INDIRECT, 0)
            driver.offer(0)
        case "an indirect table in one":
            driver.memory[4 * PAGE : 4 * PAGE + 16] = struct.pack(
                "<QIHH", at, 16, DESC_F_INDIRECT, 0
            )
            driver.descriptor(0, at, 16, DESC_F_INDIRECT, 0)
            driver.offer(0)
        case "what the device refuses":
            driver.place(b"abc!", 4)


BROKEN = [
    "a head that is none", "a loop", "a descriptor that is none", "an address outside",
    "an address that wraps", "reading after writing", "more than there is room for",
    "too long a request", "an indirect table outside", "half an indirect table",
    "an indirect table in one", "what the device refuses",
]  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_a_driver_may_not_do_stops_its_queue_alone(
    session: Session, driver: Driver, case: str
) -> None:
    error = event()
    tell(session, Request.SET_VRING_ERR, u64(0), os.dup(error))
    before = driver.used
    broken(driver, case)
    assert session.process(0) == 0
    assert driver.used == before
    assert os.eventfd_read(error) == 1
    os.close(error)
    # It is not looked at again until it is set up anew.
    assert session.process(0) == 0
    ask(session, Request.GET_VRING_BASE, state(0, 0))
    driver.memory[:] = bytes(SIZE)
    fresh = Driver(driver.memory, AT, USER)
    start(session, fresh)
    fresh.place(b"abc", 3)
    assert session.process(0) == 1
    fresh.close()


def test_a_request_has_a_limit(
    session: Session, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptors may all name the same memory, again and again."""
    monkeypatch.setattr(virtqueue, "MAX_CHAIN_BYTES", 6)
    driver.place(b"abc", 3)
    assert session.process(0) == 1
    driver.place(b"abc", 4)
    assert session.process(0) == 0
    assert session.vrings[0].broken


@pytest.mark.parametrize("size", [0, 3, 65536, 0x80000000])
def test_a_size_that_no_queue_has(session: Session, driver: Driver, size: int) -> None:
    ask(session, Request.GET_VRING_BASE, state(0, 0))
    tell(session, Request.SET_VRING_NUM, state(0, size))
    driver.place(b"abc", 3)
    assert session.process(0) == 0


def test_memory_that_goes_takes_the_queue_along(session: Session, driver: Driver) -> None:
    tell(session, Request.REM_MEM_REG, payloads.encode_single(REGION, xen=False))
    driver.place(b"abc", 3)
    assert session.process(0) == 0
    assert session.vrings[0].broken


class Fed(Reverser):
    """A device whose driver offers a request for each that it answers."""

    driver: Driver

    def handle(self, memory: Memory, queue: int, chain: Chain) -> int:
        self.driver.offer(0)
        return super().handle(memory, queue, chain)


def test_a_driver_that_goes_on_and_on_is_not_answered_in_one_go(
    shared: tuple[int, memoryview],
) -> None:
    device = Fed()
    session = Session(device, Memory())
    fd, view = shared
    tell(session, Request.SET_MEM_TABLE, payloads.encode_table([REGION], xen=False), os.dup(fd))
    driver = device.driver = Driver(view, AT, USER)
    start(session, driver)
    driver.place(b"abc", 3)
    for _ in range(3):
        assert session.process(0) == driver.size
        assert session.vrings[0].more
    driver.close()
    session.close()


def test_long_requests_are_not_all_answered_in_one_go(
    session: Session, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two buffers and the eight pages they are make ten; empty buffers count as well."""
    monkeypatch.setattr(vring, "TURN_WEIGHT", 25)
    driver.descriptor(0, driver.at(0), 4 * PAGE, DESC_F_NEXT, 1)
    driver.descriptor(1, driver.at(0), 4 * PAGE, DESC_F_WRITE, 0)
    for head in range(2, 8):
        driver.descriptor(head, driver.at(0), 0, DESC_F_NEXT if head < 7 else 0, head + 1)
    for head in (0, 0, 0, 2, 2, 2, 2):
        driver.offer(head)
    assert [session.process(0) for _ in range(3)] == [3, 4, 0]
    for _ in range(4):
        driver.offer(0)
    done = session.process(0)
    assert done == 3
    assert session.vrings[0].more
    assert session.process(0) == 1
    assert not session.vrings[0].more


def test_a_full_event_does_not_hold_the_device_up(session: Session, driver: Driver) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, bytes(4096))
    os.set_blocking(write, True)
    tell(session, Request.SET_VRING_CALL, u64(0), write)
    driver.place(b"abc", 3)
    assert session.process(0) == 1
    os.close(read)
    driver.place(b"abc", 3)
    assert session.process(0) == 1
