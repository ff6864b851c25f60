# SPDX-License-Identifier: LGPL-2.1-or-later
"""Another's implementations, those of QEMU, against ours: both ends of the protocol, both ways.

No Xen takes part: the memory is plain.  It runs where the rig runs, with the rig's own QEMU.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from integration.sources import PROJECT
from integration.toolroot import ToolRoot
from integration.virtio_driver import Driver
from xshmd.vhost_user.backend import Backend
from xshmd.vhost_user.block import BlockDevice
from xshmd.vhost_user.channel import Channel
from xshmd.vhost_user.frontend import Frontend
from xshmd.vhost_user.payloads import MemoryRegion
from xshmd.vhost_user.wire import ProtocolFeature

pytestmark = pytest.mark.alike

SECTOR = 512
MIB = 1 << 20
RIGHT = 0x10 << 1 | 1
"""What isa-debug-exit makes of the boot sector's 0x10."""
LIMIT_S = 180.0
INSIDE = "/rig/shared"


@pytest.fixture
def folder(arch: str, tmp_path: Path) -> Path:
    """Seen by the programs of the tool root at INSIDE, and by us.

    The path of a socket has room for 107 characters: this one is short.
    """
    assert arch
    return tmp_path


@contextmanager
def served(path: Path, file: Path) -> Iterator[list[str]]:
    """Our disk, served at a socket; what it says of connections that ended."""
    said: list[str] = []
    fd = os.open(file, os.O_RDWR)
    backend = Backend(lambda: BlockDevice(fd), said.append)
    backend.listen(path)
    thread = threading.Thread(target=backend.run)
    thread.start()
    try:
        yield said
    finally:
        backend.stop()
        thread.join(LIMIT_S)
        os.close(fd)


def boot_sector(tools: ToolRoot, folder: Path) -> bytes:
    """The sector that integration/boot_sector.S says."""
    binds = {folder: INSIDE, PROJECT / "integration": "/rig/source"}
    compile_ = ["gcc", "-m32", "-c", "-o", f"{INSIDE}/boot.o", "/rig/source/boot_sector.S"]
    tools.run(compile_, binds=binds)
    link = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary"]
    tools.run([*link, "-o", f"{INSIDE}/boot.bin", f"{INSIDE}/boot.o"], binds=binds)
    return (folder / "boot.bin").read_bytes()


def test_qemu_boots_from_our_disk(folder: Path) -> None:
    """QEMU's front-end gives us its guest's memory, and its BIOS reads and writes through a queue
    in it: handshake, table, vrings, requests, all of a foreign make."""
    tools = ToolRoot.get()
    disk = folder / "disk"
    number = struct.pack("<I", 41)
    sectors = [boot_sector(tools, folder), (b"XSHM" + number).ljust(SECTOR, b"\0")]
    disk.write_bytes(b"".join(sectors).ljust(MIB, b"\0"))
    with served(folder / "socket", disk) as said:
        process = tools.popen(
            [
                *("qemu-system-x86_64", "-machine", "q35,memory-backend=ram", "-m", "64"),
                *("-object", "memory-backend-memfd,id=ram,size=64M,share=on"),
                *("-chardev", f"socket,id=disk,path={INSIDE}/socket"),
                *("-device", "vhost-user-blk-pci,chardev=disk,bootindex=0"),
                *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
                *("-nodefaults", "-display", "none", "-no-reboot"),
            ],
            binds={folder: INSIDE},
            stdin=subprocess.DEVNULL,
        )
        try:
            assert process.wait(LIMIT_S) == RIGHT
        finally:
            process.kill()
            process.wait()
    assert disk.read_bytes()[2 * SECTOR : 2 * SECTOR + 8] == b"XSHM" + struct.pack("<I", 42)
    # It reads of the end when it sees it, or is stopped before; nothing else ended it.
    assert [text for text in said if "the peer closed the connection" not in text] == []


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
def exported(folder: Path) -> Iterator[None]:
    """QEMU's own vhost-user-blk back-end (libvhost-user), serving folder/disk at folder/socket."""
    process = ToolRoot.get().popen(
        [
            *("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"),
            *("-blockdev", f"driver=file,node-name=disk,filename={INSIDE}/disk", "-qmp", "stdio"),
        ],
        binds={folder: INSIDE},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        Qmp(process).ask(
            "block-export-add", type="vhost-user-blk", id="export", writable=True,
            addr={"type": "unix", "path": f"{INSIDE}/socket"}, **{"node-name": "disk"},
        )  # fmt: skip
        yield
    finally:
        process.kill()
        process.communicate()


def test_qemus_disk_serves_our_frontend(folder: Path) -> None:
    """Our front-end negotiates with libvhost-user, gives it memory one region after the other,
    takes it away, and a queue in that memory is answered; then all of it once more."""
    data = os.urandom(64 * SECTOR)
    (folder / "disk").write_bytes(data)
    fd = os.memfd_create("memory")
    os.ftruncate(fd, MIB)
    memory = mmap.mmap(fd, MIB)
    at, user = 0x4000_0000, 0x7F00_0000_0000
    region = MemoryRegion(guest_address=at, size_bytes=MIB, user_address=user)
    other = MemoryRegion(guest_address=0, size_bytes=MIB, user_address=0)
    with exported(folder):
        for turn in range(2):  # it is there again for whoever connects again
            connected = socket.socket(socket.AF_UNIX)
            connected.connect(str(folder / "socket"))
            channel = Channel(connected)
            frontend = Frontend(channel, timeout_s=LIMIT_S)
            frontend.negotiate(xen=False)
            assert ProtocolFeature.REPLY_ACK in frontend.protocol
            assert frontend.slots > 8
            frontend.give([region], lambda _: os.dup(fd))
            frontend.give([region, other], lambda _: os.dup(fd))
            frontend.give([region], lambda _: os.dup(fd))
            driver = Driver(memoryview(memory), at, user)
            frontend.start(driver.queue())
            answer = driver.ask(struct.pack("<IIQ", 0, 0, 7), SECTOR + 1, LIMIT_S)
            assert answer == data[7 * SECTOR : 8 * SECTOR] + b"\0"
            ours = bytes([turn]) * SECTOR
            assert driver.ask(struct.pack("<IIQ", 1, 0, 9) + ours, 1, LIMIT_S) == b"\0"
            assert frontend.stop(0) == 2
            frontend.give([], lambda _: -1)
            channel.close()
            driver.close()
    assert (folder / "disk").read_bytes()[9 * SECTOR : 10 * SECTOR] == ours
    os.close(fd)
