# SPDX-License-Identifier: LGPL-2.1-or-later
"""Our front-end and our back-end, each against the other through a socket; and hostile ones."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import os
import resource
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from descriptors import open_fds
from fakes.xen_devices import XenDevices

from integration.virtio_driver import PAGE, Driver
from xshmd.errors import Refused
from xshmd.units import DomId, Gfn
from xshmd.vhost_user import backend as backend_module
from xshmd.vhost_user import block, payloads, wire
from xshmd.vhost_user import session as session_module
from xshmd.vhost_user.backend import Backend
from xshmd.vhost_user.block import BlockDevice
from xshmd.vhost_user.channel import Channel, Disconnected
from xshmd.vhost_user.frontend import Frontend
from xshmd.vhost_user.memory import Memory
from xshmd.vhost_user.payloads import MemoryRegion, XenFlag
from xshmd.vhost_user.wire import Message, ProtocolFeature, ProtocolViolation, Request
from xshmd.xen.windows import Window

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")

AT, USER, SIZE = 0x3A000000, 0x7F0000000000, 16 * PAGE
REGION = MemoryRegion(guest_address=AT, size_bytes=SIZE, user_address=USER)
OTHER = dataclasses.replace(REGION, guest_address=AT + SIZE, user_address=USER + SIZE)
HOLDER = DomId(5)
READ = struct.Struct("<IIQ")
WAIT_S = 60.0


class Served:
    """A disk of 16 sectors, served in a thread of its own."""

    def __init__(self, folder: Path, devices: XenDevices) -> None:
        self.path = folder / "socket"
        self.said: list[str] = []
        self.disk = os.open(folder / "disk", os.O_RDWR | os.O_CREAT)
        os.pwrite(self.disk, bytes(range(16)) * 512, 0)
        self.sessions: list[session_module.Session] = []
        self.backend = Backend(
            lambda: BlockDevice(self.disk), self.said.append,
            memory=lambda: Memory(devices=devices),
        )  # fmt: skip
        self.backend.listen(self.path)
        self._thread = threading.Thread(target=self.backend.run)
        self._thread.start()

    def connect(self) -> Channel:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connected.connect(str(self.path))
        return Channel(connected)

    def raw(self) -> socket.socket:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connected.connect(str(self.path))
        connected.settimeout(WAIT_S)
        return connected

    def wait_said(self, what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not any(what in text for text in self.said):
            assert time.monotonic() < deadline, self.said
            time.sleep(0.001)

    def close(self) -> None:
        self.backend.stop()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        os.close(self.disk)


@pytest.fixture
def devices() -> Iterator[XenDevices]:
    found = XenDevices()
    yield found
    found.close()


@pytest.fixture
def served(tmp_path: Path, devices: XenDevices) -> Iterator[Served]:
    found = Served(tmp_path, devices)
    yield found
    found.close()


@pytest.fixture
def shared() -> Iterator[tuple[int, memoryview]]:
    fd = os.memfd_create("front-end")
    os.ftruncate(fd, 2 * SIZE)
    with Window(2 * SIZE) as window:
        window.place(fd)
        yield fd, window.view()
    os.close(fd)


def sector(driver: Driver, number: int) -> bytes:
    answer = driver.ask(READ.pack(0, 0, number), 513)
    assert answer[512] == 0
    return answer[:512]


def use(frontend: Frontend, view: memoryview, disk: int) -> None:
    """Read and write a sector through a queue in the memory that was given."""
    driver = Driver(view, AT, USER)
    frontend.start(driver.queue())
    assert sector(driver, 3) == os.pread(disk, 512, 3 * 512)
    data = bytes(512 * [7])
    assert driver.ask(READ.pack(1, 0, 4) + data, 1) == b"\0"
    assert os.pread(disk, 512, 4 * 512) == data
    assert frontend.stop(0) == 2
    driver.close()


def test_plain_memory(served: Served, shared: tuple[int, memoryview]) -> None:
    fd, view = shared
    channel = served.connect()
    frontend = Frontend(channel)
    frontend.negotiate(xen=False)
    assert not frontend.xen
    frontend.give([REGION], lambda _: os.dup(fd))
    use(frontend, view, served.disk)
    channel.close()
    served.wait_said("front-end 1 of")


def test_foreign_memory(served: Served, devices: XenDevices) -> None:
    """The page is the holder's, the address the guest's: both are said, and both count."""
    frames = devices.put(HOLDER, Gfn(0x40200), 16)
    region = dataclasses.replace(
        REGION, xen_flags=XenFlag.FOREIGN, domid=HOLDER, mmap_offset=0x40200000
    )
    channel = served.connect()
    frontend = Frontend(channel)
    frontend.negotiate(xen=True)
    assert frontend.xen
    frontend.give([region], lambda each: devices.open(DomId(each.domid)))
    with Window(SIZE) as window:
        window.place(frames)
        use(frontend, window.view(), served.disk)
    channel.close()


@pytest.mark.parametrize("slots", [True, False])
def test_the_table_is_kept_in_step(
    served: Served, shared: tuple[int, memoryview], slots: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd, _ = shared
    if not slots:
        known = session_module.PROTOCOL_FEATURES & ~ProtocolFeature.CONFIGURE_MEM_SLOTS
        monkeypatch.setattr(session_module, "PROTOCOL_FEATURES", known)
    opened: list[MemoryRegion] = []

    def open_fd(region: MemoryRegion) -> int:
        opened.append(region)
        return os.dup(fd)

    channel = served.connect()
    frontend = Frontend(channel)
    frontend.negotiate(xen=False)
    assert frontend.slots == (session_module.MAX_MEM_SLOTS if slots else 8)
    frontend.give([REGION], open_fd)
    frontend.give([REGION, OTHER], open_fd)
    assert opened == ([REGION, OTHER] if slots else [REGION, REGION, OTHER])
    frontend.give([REGION, OTHER], open_fd)
    frontend.give([OTHER], open_fd)
    assert frontend.table == (OTHER,)
    (session,) = (each.session for each in served.backend._connections)
    assert list(session.memory.regions) == [OTHER]
    frontend.give([], open_fd)
    assert not session.memory.regions
    channel.close()


def test_more_regions_than_it_takes(served: Served) -> None:
    channel = served.connect()
    frontend = Frontend(channel)
    frontend.negotiate(xen=False)
    with pytest.raises(Refused, match="takes 64 regions, and there are 65"):
        frontend.give([REGION] * 65, lambda _: -1)
    channel.close()


def test_a_backend_that_cannot_map_says_so(served: Served) -> None:
    channel = served.connect()
    frontend = Frontend(channel)
    frontend.negotiate(xen=False)
    with pytest.raises(Refused, match="could not do ADD_MEM_REG"):
        frontend.give([REGION], lambda _: os.memfd_create("empty"))
    assert frontend.table == ()
    channel.close()


def test_a_backend_that_does_not_know_xen(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    known = session_module.PROTOCOL_FEATURES & ~ProtocolFeature.XEN_MMAP
    monkeypatch.setattr(session_module, "PROTOCOL_FEATURES", known)
    channel = served.connect()
    with pytest.raises(Refused, match="does not know XEN_MMAP"):
        Frontend(channel).negotiate(xen=True)
    channel.close()


def test_a_queue_that_is_polled(served: Served, shared: tuple[int, memoryview]) -> None:
    """A guest has no event of dom0's to write to: the back-end looks by itself."""
    fd, view = shared
    channel = served.connect()
    frontend = Frontend(channel)
    frontend.negotiate(xen=False)
    frontend.give([REGION], lambda _: os.dup(fd))
    driver = Driver(view, AT, USER)
    frontend.start(driver.queue(events=False))
    driver.place(READ.pack(0, 0, 1), 513)
    deadline = time.monotonic() + WAIT_S
    while driver.used != 1:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert driver.answer(513)[:512] == os.pread(served.disk, 512, 512)
    driver.close()
    channel.close()


@pytest.mark.parametrize(
    ("request_", "room", "status"),
    [
        (READ.pack(0, 0, 16), 513, 1),  # past the end
        (READ.pack(0, 0, (1 << 64) - 1), 513, 1),
        (READ.pack(0, 0, 0), 512, 1),  # half a sector
        (READ.pack(1, 0, 16) + bytes(512), 1, 1),
        (READ.pack(1, 0, 0) + bytes(511), 1, 1),
        (READ.pack(4, 0, 0), 1, 0),
        (READ.pack(8, 0, 0), 21, 0),
        (READ.pack(99, 0, 0), 1, 2),
    ],
)
def test_the_disk(
    served: Served, shared: tuple[int, memoryview], request_: bytes, room: int, status: int
) -> None:
    fd, view = shared
    before = os.pread(served.disk, 16 * 512, 0)
    channel = served.connect()
    frontend = Frontend(channel)
    frontend.negotiate(xen=False)
    frontend.give([REGION], lambda _: os.dup(fd))
    driver = Driver(view, AT, USER)
    frontend.start(driver.queue())
    assert driver.ask(request_, room)[room - 1] == status
    assert os.pread(served.disk, 16 * 512, 0) == before
    driver.close()
    channel.close()


# -- hostile front-ends -------------------------------------------------------------------------


def table_of(count: int) -> bytes:
    regions = [
        dataclasses.replace(REGION, guest_address=SIZE * i, user_address=SIZE * i)
        for i in range(count)
    ]
    return wire.encode(Message(Request.SET_MEM_TABLE, payloads.encode_table(regions, xen=False)))


def is_ended(connected: socket.socket) -> bool:
    """Wait until the other end is closed; say whether nothing came before that."""
    try:
        return connected.recv(1) == b""
    except ConnectionResetError:  # it had not read all that was sent
        return True


def send(connected: socket.socket, data: bytes, fds: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    connected.sendmsg([data], rights)


def memfds(count: int) -> list[int]:
    made = [os.memfd_create("hostile") for _ in range(count)]
    for fd in made:
        os.ftruncate(fd, SIZE)
    return made


@pytest.mark.parametrize(
    ("data", "nr_fds", "says"),
    [
        (b"\1\0\0\0\0\0\0\0\0\0\0\0", 0, "flags 0x0"),
        (table_of(1)[:11] + b"\xff" + table_of(1)[12:], 1, "is to have"),
        (table_of(2), 1, "2 regions has 1 file"),
        (table_of(1), 9, "9 file descriptors"),
        (table_of(1), 16, "too many file descriptors"),
        (table_of(8)[:100], 8, "closed the connection"),
        (table_of(8)[:12], 8, "closed the connection"),
        (table_of(8)[:3], 1, "closed the connection"),
        (table_of(1) + b"\0" * 12, 1, "flags 0x0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_hostile_frontend_ends_its_own_connection(
    served: Served, shared: tuple[int, memoryview], data: bytes, nr_fds: int, says: str
) -> None:
    fd, view = shared
    good = served.connect()
    frontend = Frontend(good)
    frontend.negotiate(xen=False)
    frontend.give([REGION], lambda _: os.dup(fd))
    hostile = served.raw()
    fds = memfds(nr_fds)
    send(hostile, data, fds)
    hostile.shutdown(socket.SHUT_WR)
    assert is_ended(hostile)
    hostile.close()
    for each in fds:
        os.close(each)
    served.wait_said(says)
    assert len(served.said) == 1, "one sentence"
    use(frontend, view, served.disk)
    good.close()


def test_descriptors_by_the_thousand(served: Served) -> None:
    """Each message brings eight, of a table that cannot be meant; not one is kept."""
    before = open_fds()
    wrong = table_of(8)[:24] + bytes(256)  # overlapping regions of no size
    fds = memfds(8)
    for _ in range(100):
        hostile = served.raw()
        send(hostile, wrong, fds)
        assert is_ended(hostile)
        hostile.close()
    for each in fds:
        os.close(each)
    served.wait_said("front-end 100 of")
    assert open_fds() == before
    assert len(served.said) == 100


def test_whoever_sends_half_a_message_is_not_waited_for(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "MESSAGE_S", 0.01)
    hostile = served.raw()
    hostile.send(b"\1\0")
    assert is_ended(hostile)
    hostile.close()
    served.wait_said("not whole in time")


def test_whoever_does_not_read_is_not_waited_for(served: Served) -> None:
    hostile = served.raw()
    ask = wire.encode(Message(Request.GET_FEATURES)) * 64
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while True:
            hostile.sendall(ask)
    hostile.close()
    served.wait_said("does not take GET_FEATURES")


def test_there_are_not_more_than_so_many(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "MAX_CONNECTIONS", 2)
    held = [served.raw() for _ in range(3)]
    assert is_ended(held[2])
    served.wait_said("turned away: there are 2")
    for each in held:
        each.close()


def test_there_is_a_descriptor_for_everyone_or_they_are_turned_away(served: Served) -> None:
    """Otherwise one front-end could take those that another is about to send."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    each = 1 + session_module.Session(BlockDevice(served.disk), Memory()).most_fds
    few = backend_module.OTHER_FDS + 2 * each
    assert open_fds() < few
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
    try:
        held = [served.raw() for _ in range(3)]
        assert is_ended(held[2])
        served.wait_said("turned away: there are 2")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    for connected in held:
        connected.close()


def test_the_disk_takes_as_many_as_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    (tmp_path / "disk").write_bytes(bytes(512))
    path = tmp_path / "socket"
    seen: list[tuple[int, int]] = []

    def run(backend: Backend) -> None:
        seen.append(resource.getrlimit(resource.RLIMIT_NOFILE))
        assert path.is_socket()
        backend.close()

    monkeypatch.setattr(Backend, "run", run)
    try:
        assert block.main(["--socket", str(path), "--file", str(tmp_path / "disk")]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert seen == [(before[1], before[1])]
    assert not path.exists()
    assert capsys.readouterr().out == f"serving {tmp_path}/disk at {path}\n"


def kick(fd: int) -> Message:
    """The first queue's event."""
    return Message(Request.SET_VRING_KICK, payloads.encode_u64(0), (fd,))


def an_epoll() -> int:
    """What cannot be read, and is of a kind with an eventfd."""
    with select.epoll() as made:
        return os.dup(made.fileno())


def broken_pipe() -> int:
    """The end of a pipe that is for writing, and nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return write


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (an_epoll, "neither an eventfd nor a pipe"),
        (lambda: os.open("/dev/null", os.O_RDWR), "neither an eventfd nor a pipe"),
        (broken_pipe, "the event of queue 0 cannot be read"),
    ],
)
def test_an_event_that_is_none(
    served: Served, shared: tuple[int, memoryview], make: Callable[[], int], says: str
) -> None:
    fd, view = shared
    good = served.connect()
    frontend = Frontend(good)
    frontend.negotiate(xen=False)
    frontend.give([REGION], lambda _: os.dup(fd))
    hostile = served.connect()
    event = make()
    hostile.send(kick(event))
    served.wait_said(says)
    os.close(event)
    hostile.close()
    use(frontend, view, served.disk)
    good.close()


def test_an_event_that_was_replaced_wakes_nobody() -> None:
    """The front-end still has the one before open, and signals it."""
    ours, theirs = socket.socketpair()
    backend = Backend(lambda: BlockDevice(0))
    backend.add(theirs)
    channel = Channel(ours)
    events = [os.eventfd(0), os.eventfd(0)]
    for event in events:
        channel.send(kick(event))
        backend.turn(0)
    os.eventfd_write(events[0], 1)
    timer = threading.Timer(0.1, backend.stop)
    timer.start()
    backend.turn(WAIT_S)
    assert not backend._running, "it was woken by what is not its queue's event any more"
    timer.join()
    os.eventfd_write(events[1], 1)
    backend.turn(WAIT_S)
    assert backend.connection_count == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(events[1])  # it was taken
    backend.close()
    channel.close()
    for event in events:
        os.close(event)


def test_an_event_that_nobody_holds_any_more(served: Served) -> None:
    connected = served.raw()
    read, write = os.pipe()
    send(connected, wire.encode(kick(read)), [read])
    os.close(read)
    os.close(write)
    features = wire.encode(Message(Request.GET_FEATURES))
    connected.sendall(features)
    assert connected.recv(20) == wire.encode(
        Message(
            Request.GET_FEATURES,
            payloads.encode_u64(session_module.FEATURES | 1 << 9),
            flags=wire.VERSION | wire.FLAG_REPLY,
        )
    )
    connected.close()


# -- hostile back-ends --------------------------------------------------------------------------


def answering(reply: Callable[[Message], bytes]) -> tuple[Frontend, Channel, threading.Thread]:
    """A front-end whose back-end answers every message like that, until it is closed."""
    ours, theirs = socket.socketpair()

    def run() -> None:
        with theirs:
            peer = Channel(theirs.dup())
            try:
                while True:
                    theirs.sendall(reply(peer.receive(WAIT_S)))
            except (Disconnected, OSError):
                peer.close()

    thread = threading.Thread(target=run)
    thread.start()
    channel = Channel(ours)
    return Frontend(channel, timeout_s=5.0), channel, thread


@pytest.mark.parametrize(
    "reply",
    [
        wire.encode(Message(Request.SET_OWNER, bytes(8), flags=5)),  # of another request
        wire.encode(Message(Request.GET_FEATURES, bytes(8), flags=1)),  # no reply
        wire.encode(Message(Request.GET_FEATURES, bytes(4), flags=5)),  # of another size
        b"\0" * 12,
        b"\1\0\0\0\5\0\0\0\xff\xff\xff\xff",
    ],
)
def test_a_hostile_backend(reply: bytes) -> None:
    frontend, channel, thread = answering(lambda _: reply)
    with pytest.raises(ProtocolViolation):
        frontend.negotiate(xen=True)
    channel.close()
    thread.join(WAIT_S)


def test_a_backend_that_says_nothing() -> None:
    frontend, channel, thread = answering(lambda _: b"")
    frontend._timeout_s = 0.01
    with pytest.raises(TimeoutError):
        frontend.negotiate(xen=True)
    channel.close()
    thread.join(WAIT_S)


def test_an_old_backend_without_protocol_features(shared: tuple[int, memoryview]) -> None:
    heard: list[int] = []

    def reply(message: Message) -> bytes:
        heard.append(message.request)
        if message.request == Request.GET_FEATURES:
            return wire.encode(Message(message.request, payloads.encode_u64(1 << 32), flags=5))
        for fd in message.fds:
            os.close(fd)
        return b""

    frontend, channel, thread = answering(reply)
    frontend.negotiate(xen=False)
    assert frontend.slots == 8
    for table in ([REGION], [REGION, OTHER], []):
        frontend.give(table, lambda _: os.dup(shared[0]))
        assert frontend.table == tuple(table)
        # When it has answered, it has done what came before.
        assert heard[-2:] == [Request.SET_MEM_TABLE, Request.GET_FEATURES]
    nr_messages = len(heard)
    frontend.give([], lambda _: -1)
    assert len(heard) == nr_messages
    channel.close()
    thread.join(WAIT_S)
