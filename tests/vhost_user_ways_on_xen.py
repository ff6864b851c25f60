# SPDX-License-Identifier: LGPL-2.1-or-later
"""Granted and foreign memory through both ends of vhost-user, in dom0 of a real Xen.

    python3 -m tests.vhost_user_ways_on_xen

A holder grants frames to dom0; a front-end describes them by their references, a back-end maps them
through /dev/xen/gntdev and answers a queue in them: mapped in advance, and only while it is needed.
The same frames are mapped through /dev/xen/privcmd as they are needed.
"""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import threading
from pathlib import Path

from integration.virtio_driver import Driver
from xshmd.engine.holders import enlarge_paging_pool
from xshmd.policy.identity import new_holder_uuid
from xshmd.units import DOMID_0, PAGE_SHIFT, DomId, Gfn, address_of, bytes_of
from xshmd.vhost_user.backend import Backend
from xshmd.vhost_user.block import BlockDevice
from xshmd.vhost_user.channel import Channel
from xshmd.vhost_user.frontend import Frontend
from xshmd.vhost_user.payloads import MemoryRegion, XenFlag
from xshmd.vhost_user.table import GRANT_ADDRESS_BIT
from xshmd.xen.device_maps import GNTDEV, open_restricted
from xshmd.xen.hypervisor import XenHypervisor

FIRST_GFN, FIRST_REF, FRAMES, USER = Gfn(0x40200), 8, 16, 0x10000
GRANTED_AT = GRANT_ADDRESS_BIT | FIRST_REF << PAGE_SHIFT
WAIT_S = 120.0


def open_device(region: MemoryRegion) -> int:
    """Open what the region is to be mapped through."""
    if XenFlag.GRANT in region.xen_flags:
        return os.open(GNTDEV, os.O_RDWR | os.O_CLOEXEC)
    return open_restricted(DomId(region.domid))


def ask(frontend: Frontend, memory: memoryview, region: MemoryRegion) -> bytes:
    """Read a sector through a queue in the granted frames."""
    driver = Driver(memory, region.guest_address, region.user_address)
    frontend.start(driver.queue())
    answer = driver.ask(struct.pack("<IIQ", 0, 0, 3), 513, WAIT_S)
    frontend.stop(0)
    driver.close()
    return answer


def serve(xen: XenHypervisor, holder: DomId, memory: memoryview, disk: int) -> None:
    """Give a back-end the frames in each of the ways, and say how it went."""
    said: list[str] = []
    backend = Backend(lambda: BlockDevice(disk), said.append)
    ours, theirs = socket.socketpair()
    backend.add(theirs)
    thread = threading.Thread(target=backend.run)
    thread.start()
    channel = Channel(ours)
    frontend = Frontend(channel, timeout_s=WAIT_S)
    frontend.negotiate(xen=True)
    for flags in (
        XenFlag.GRANT,
        XenFlag.GRANT | XenFlag.NO_ADVANCE_MAP,
        XenFlag.GRANT | XenFlag.NO_ADVANCE_MAP_RUST_VMM,
        XenFlag.FOREIGN | XenFlag.NO_ADVANCE_MAP,
    ):
        granted = XenFlag.GRANT in flags
        region = MemoryRegion(
            guest_address=GRANTED_AT if granted else address_of(FIRST_GFN),
            size_bytes=bytes_of(FRAMES), user_address=USER, xen_flags=flags, domid=holder,
        )  # fmt: skip
        memory[:] = bytes(len(memory))
        frontend.give([region], open_device)
        mapped = xen.grants_in_use(holder, FIRST_REF, FRAMES)
        right = ask(frontend, memory, region) == os.pread(disk, 512, 3 * 512) + b"\0"
        after = xen.grants_in_use(holder, FIRST_REF, FRAMES)
        frontend.give([], lambda _: -1)
        left = xen.grants_in_use(holder, FIRST_REF, FRAMES)
        print(f"flags {int(flags):#x}: mapped {mapped}, right {right}, mapped {after}, left {left}")
    channel.close()
    backend.stop()
    thread.join(WAIT_S)
    assert [text for text in said if "closed the connection" not in text] == []


def main() -> None:
    with XenHypervisor() as xen, tempfile.TemporaryDirectory() as folder:
        disk = os.open(Path(folder, "disk"), os.O_RDWR | os.O_CREAT)
        os.pwrite(disk, os.urandom(16 * 512), 0)
        holder = xen.create_holder_domain(new_holder_uuid(), nr_grant_frames=4)
        try:
            enlarge_paging_pool(xen, holder, [FRAMES])
            xen.set_max_pages(holder, FRAMES)
            xen.populate(holder, FIRST_GFN, FRAMES)
            xen.set_max_pages(holder, 0)
            xen.write_grants(holder, FIRST_REF, FRAMES, FIRST_GFN, DOMID_0, readonly=False)
            pages = xen.map_pages(holder, FIRST_GFN, FRAMES, writable=True)
            memory = pages.into_view(lambda: None)
            serve(xen, holder, memory, disk)
            memory.release()
            print(f"{xen.end_grants(holder, FIRST_REF, FRAMES)} in use at the end")
        finally:
            xen.destroy(holder)
            os.close(disk)


if __name__ == "__main__":
    main()
