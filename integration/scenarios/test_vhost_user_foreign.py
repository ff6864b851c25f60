# SPDX-License-Identifier: LGPL-2.1-or-later
"""Another's front-end, QEMU's, against our back-end; the other way: test_vhost_user_backends.py.

No Xen takes part: the memory is plain.  It runs where the rig runs, with the rig's own QEMU.
"""

from __future__ import annotations

import os
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from integration.sources import PROJECT
from integration.toolroot import ToolRoot
from xshmd.vhost_user.backend import Backend
from xshmd.vhost_user.block import BlockDevice

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
