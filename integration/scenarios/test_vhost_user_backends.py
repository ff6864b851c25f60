# SPDX-License-Identifier: LGPL-2.1-or-later
"""Back-ends of three others against our front-end: QEMU's disk, virtiofsd's files, DPDK's network.

No Xen takes part: the memory is plain, which is all they know.  What they are given they map, what
they are to give up they have unmapped when they say so, and a queue of ours in it they answer.
They have nothing in common: libvhost-user, rust-vmm's crates and DPDK's own library.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from integration.foreign import Foreign
from integration.sources import PROJECT
from integration.toolroot import ToolRoot
from integration.virtio_driver import DATA, PAGE, Driver
from xshmd.vhost_user.channel import Channel
from xshmd.vhost_user.frontend import Frontend
from xshmd.vhost_user.payloads import MemoryRegion
from xshmd.vhost_user.virtqueue import DESC_F_WRITE
from xshmd.vhost_user.wire import VIRTIO_F_VERSION_1, ProtocolFeature

pytestmark = pytest.mark.alike

SECTOR = 512
MIB = 1 << 20
AT, USER = 0x4000_0000, 0x7F00_0000_0000
REGION = MemoryRegion(guest_address=AT, size_bytes=MIB, user_address=USER)
OTHER = MemoryRegion(guest_address=0, size_bytes=MIB, user_address=0)
NAME = "given"
LIMIT_S = 180.0
INSIDE = "/rig/shared"
SLOTS = ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIGURE_MEM_SLOTS


@pytest.fixture
def folder(arch: str, tmp_path: Path) -> Path:
    """Seen by the back-ends at INSIDE, and by us.

    The path of a socket has room for 107 characters: this one is short.
    """
    assert arch
    return tmp_path


class Shared:
    """Memory of ours, and how often another process has it mapped."""

    def __init__(self) -> None:
        self.fd = os.memfd_create(NAME)
        os.ftruncate(self.fd, MIB)
        self._map = mmap.mmap(self.fd, MIB)
        self.view = memoryview(self._map)

    def open(self, _region: MemoryRegion) -> int:
        return os.dup(self.fd)

    def mapped_by(self, process: subprocess.Popen[bytes]) -> int:
        """How often it has all of it mapped."""
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        return sum(f"/memfd:{NAME} " in line for line in maps.splitlines())

    def close(self) -> None:
        self.view.release()
        self._map.close()
        os.close(self.fd)


@pytest.fixture
def shared() -> Iterator[Shared]:
    found = Shared()
    yield found
    found.close()


@contextmanager
def agreed(path: Path, protocol: ProtocolFeature) -> Iterator[Frontend]:
    """A front-end that has agreed on just this with the back-end at a socket."""
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(str(path))
    channel = Channel(connected)
    try:
        frontend = Frontend(channel, timeout_s=LIMIT_S)
        frontend.negotiate(xen=False)
        assert frontend.protocol == protocol
        assert frontend.features & VIRTIO_F_VERSION_1
        yield frontend
    finally:
        channel.close()


def give_and_take(frontend: Frontend, shared: Shared, process: subprocess.Popen[bytes]) -> None:
    """Have it map two regions and then one, and look at what it has mapped each time."""
    for table in ([REGION], [REGION, OTHER], [REGION]):
        frontend.give(table, shared.open)
        assert frontend.table == tuple(table)
        assert shared.mapped_by(process) == len(table)


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Kill a back-end at the end."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# -- QEMU -----------------------------------------------------------------------------------------


class Qmp:
    """QEMU's monitor, on its standard streams."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._line()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> None:
        """Have it do something; an error fails the test."""
        assert self._process.stdin is not None
        text = json.dumps({"execute": command, "arguments": arguments})
        self._process.stdin.write(text.encode() + b"\n")
        self._process.stdin.flush()
        while "return" not in (answer := self._line()):
            assert "error" not in answer, answer

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@contextmanager
def exported(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """QEMU's vhost-user-blk back-end, which is qemu-storage-daemon's: folder/disk at a socket."""
    process = ToolRoot.get().popen(
        [
            *("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"),
            *("-blockdev", f"driver=file,node-name=disk,filename={INSIDE}/disk", "-qmp", "stdio"),
        ],
        binds={folder: INSIDE},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with ended(process):
        Qmp(process).ask(
            "block-export-add", type="vhost-user-blk", id="export", writable=True,
            addr={"type": "unix", "path": f"{INSIDE}/socket"}, **{"node-name": "disk"},
        )  # fmt: skip
        yield process


def test_qemus_disk(folder: Path, shared: Shared) -> None:
    """A sector is read and one written; then all of it once more, on another connection."""
    data = os.urandom(64 * SECTOR)
    (folder / "disk").write_bytes(data)
    with exported(folder) as process:
        for turn in range(2):  # it is there again for whoever connects again
            with agreed(folder / "socket", SLOTS) as frontend:
                assert frontend.slots > 8
                give_and_take(frontend, shared, process)
                driver = Driver(shared.view, AT, USER)
                frontend.start(driver.queue())
                answer = driver.ask(struct.pack("<IIQ", 0, 0, 7), SECTOR + 1, LIMIT_S)
                assert answer == data[7 * SECTOR : 8 * SECTOR] + b"\0"
                ours = bytes([turn]) * SECTOR
                assert driver.ask(struct.pack("<IIQ", 1, 0, 9) + ours, 1, LIMIT_S) == b"\0"
                assert frontend.stop(0) == 2
                frontend.give([], shared.open)
                assert shared.mapped_by(process) == 0
                driver.close()
    assert (folder / "disk").read_bytes()[9 * SECTOR : 10 * SECTOR] == ours


# -- virtiofsd ------------------------------------------------------------------------------------

FUSE_LOOKUP, FUSE_OPEN, FUSE_READ, FUSE_INIT = 1, 14, 15, 26
FUSE_ROOT = 1
FUSE_IN = struct.Struct("<IIQQIIIHH")
"""struct fuse_in_header of Linux' include/uapi/linux/fuse.h."""
FUSE_OUT = struct.Struct("<IiQ")
REQUESTS = 1
"""The queue for requests; queue 0 is for those that cannot wait (virtio 1.2, 5.11.2)."""


class Files:
    """A driver of a file system: requests of FUSE through a queue."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._count = 0

    def ask(self, operation: int, node: int, argument: bytes, room: int) -> bytes:
        """Return what a request is answered."""
        self._count += 1
        size = FUSE_IN.size + len(argument)
        head = FUSE_IN.pack(size, operation, self._count, node, 0, 0, 0, 0, 0)
        answer = self._driver.ask(head + argument, FUSE_OUT.size + room, LIMIT_S)
        length, error, which = FUSE_OUT.unpack_from(answer)
        assert (error, which) == (0, self._count)
        return answer[FUSE_OUT.size : length]


def test_virtiofsds_files(folder: Path, shared: Shared) -> None:
    """A file is found, opened and read."""
    text = os.urandom(1000)
    (folder / "files").mkdir()
    (folder / "files" / "greeting").write_bytes(text)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen()
    process = Foreign.get().popen(
        [
            *("/rig/foreign/usr/libexec/virtiofsd", f"--fd={listener.fileno()}"),
            *(f"--shared-dir={INSIDE}/files", "--sandbox=none", "--seccomp=none"),
        ],
        binds={folder: INSIDE},
        stdin=subprocess.DEVNULL,
        pass_fds=[listener.fileno()],
    )
    listener.close()
    with ended(process), agreed(folder / "socket", SLOTS) as frontend:
        assert frontend.slots > 8
        give_and_take(frontend, shared, process)
        driver = Driver(shared.view, AT, USER)
        frontend.start(driver.queue(REQUESTS))
        files = Files(driver)
        files.ask(FUSE_INIT, 0, struct.pack("<IIII48x", 7, 31, 0, 0), 64)
        (node,) = struct.unpack_from("<Q", files.ask(FUSE_LOOKUP, FUSE_ROOT, b"greeting\0", 128))
        (handle,) = struct.unpack_from("<Q", files.ask(FUSE_OPEN, node, bytes(8), 16))
        read = struct.pack("<QQIIQII", handle, 0, PAGE // 2, 0, 0, 0, 0)
        assert files.ask(FUSE_READ, node, read, PAGE // 2) == text
        assert frontend.stop(REQUESTS) == 4
        frontend.give([], shared.open)
        assert shared.mapped_by(process) == 0
        driver.close()


# -- DPDK -----------------------------------------------------------------------------------------

NET_HEADER = bytes(12)
"""struct virtio_net_hdr: nothing is offloaded."""


@contextmanager
def echoing(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """DPDK's vhost library, serving a network card at a socket."""
    process = Foreign.get().popen(
        ["python3", "/rig/source/dpdk_echo.py", f"{INSIDE}/socket"],
        binds={folder: INSIDE, PROJECT / "integration": "/rig/source"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    with ended(process):
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process


def frames(drivers: Sequence[Driver], sent: Sequence[bytes]) -> list[bytes]:
    """Send frames and return those that come back."""
    receiving, sending = drivers
    for slot, frame in enumerate(sent):
        receiving.descriptor(slot, receiving.at(slot), PAGE, DESC_F_WRITE, 0)
        receiving.offer(slot)
        data = NET_HEADER + frame
        sending.memory[DATA + slot * PAGE : DATA + slot * PAGE + len(data)] = data
        sending.descriptor(slot, sending.at(slot), len(data), 0, 0)
        sending.offer(slot)
    os.eventfd_write(sending.kick, 1)
    receiving.wait(LIMIT_S)
    found = []
    for slot, frame in enumerate(sent):
        at = DATA + slot * PAGE + len(NET_HEADER)
        found.append(bytes(receiving.memory[at : at + len(frame)]))
    return found


def test_dpdks_network(folder: Path, shared: Shared) -> None:
    """Frames go out by one queue and come in by the other.

    It does not know CONFIGURE_MEM_SLOTS: every table is a SET_MEM_TABLE, the empty one too.
    """
    half = MIB // 2
    with echoing(folder) as process:
        for _ in range(2):
            with agreed(folder / "socket", ProtocolFeature.REPLY_ACK) as frontend:
                assert frontend.slots == 8
                give_and_take(frontend, shared, process)
                drivers = (
                    Driver(shared.view[:half], AT, USER),
                    Driver(shared.view[half:], AT + half, USER + half),
                )
                for index, driver in enumerate(drivers):
                    frontend.start(driver.queue(index))
                sent = [b"\xff" * 6 + os.urandom(54 + 100 * slot) for slot in range(8)]
                assert frames(drivers, sent) == sent
                assert [frontend.stop(index) for index in (0, 1)] == [8, 8]
                frontend.give([], shared.open)
                assert shared.mapped_by(process) == 0
                for driver in drivers:
                    driver.memory.release()
                    driver.close()
