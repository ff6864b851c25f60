#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a memory table costs a vhost-user back-end, next to mapping the same frames and no more.

    vhost_in_dom0.py PAIRS          its measurements as JSON on stdout

``table`` is SET_MEM_TABLE of 8 x 32 MiB, from its first byte to the acknowledgement, by a back-end
in a process of its own; ``bare`` is libxenforeignmemory mapping the same, from C.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from xshmd.engine.holders import enlarge_paging_pool
from xshmd.policy.identity import new_holder_uuid
from xshmd.units import DomId, Gfn, address_of, bytes_of
from xshmd.vhost_user.channel import Channel
from xshmd.vhost_user.frontend import Frontend
from xshmd.vhost_user.payloads import MemoryRegion, XenFlag
from xshmd.vhost_user.wire import ProtocolFeature
from xshmd.xen import device_maps
from xshmd.xen.hypervisor import XenHypervisor

HOLDER_GFN: Final = Gfn(0x40200)
REGIONS: Final = 8
FRAMES: Final = 8192
"""Of a region: 32 MiB."""
SOCKET: Final = Path("/run/vhost-bench.sock")
DISK: Final = Path("/run/vhost-bench.disk")
WAIT_S: Final = 60.0


def table(domid: DomId) -> list[MemoryRegion]:
    """All of the holder's frames, in eight regions."""
    starts = (address_of(Gfn(HOLDER_GFN + index * FRAMES)) for index in range(REGIONS))
    return [
        MemoryRegion(
            guest_address=start, size_bytes=bytes_of(FRAMES), user_address=start,
            xen_flags=XenFlag.FOREIGN, domid=domid,
        )
        for start in starts
    ]  # fmt: skip


def by_table(domid: DomId) -> float:
    """Have the back-end map it, on a connection of its own."""
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(str(SOCKET))
    channel = Channel(connected)
    frontend = Frontend(channel, timeout_s=WAIT_S)
    frontend.negotiate(xen=True)
    assert ProtocolFeature.REPLY_ACK in frontend.protocol
    frontend.protocol &= ~ProtocolFeature.CONFIGURE_MEM_SLOTS  # all in one message
    regions = table(domid)
    began = time.perf_counter()
    frontend.give(regions, lambda _: device_maps.open_restricted(domid))
    took = time.perf_counter() - began
    # It unmaps when it sees the end; the next connection is taken after that.
    channel.close()
    return took


def bare(xen: XenHypervisor, domid: DomId) -> float:
    """Map it here."""
    began = time.perf_counter()
    mapped = [
        xen.map_pages(domid, Gfn(HOLDER_GFN + index * FRAMES), FRAMES, writable=True)
        for index in range(REGIONS)
    ]
    took = time.perf_counter() - began
    for pages in mapped:
        pages.close()
    return took


def served() -> subprocess.Popen[str]:
    """The back-end."""
    DISK.write_bytes(bytes(4096))
    command = [sys.executable, "-m", "xshmd.vhost_user.block"]
    options = ["--socket", str(SOCKET), "--file", str(DISK)]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("serving")
    return process


def measure(pairs: int) -> dict[str, Any]:
    """Both in turn, again and again."""
    columns: dict[str, list[float]] = {"table": [], "bare": []}
    process = served()
    with XenHypervisor() as xen:
        domid = xen.create_holder_domain(new_holder_uuid())
        try:
            enlarge_paging_pool(xen, domid, [REGIONS * FRAMES])
            xen.set_max_pages(domid, REGIONS * FRAMES)
            xen.populate(domid, HOLDER_GFN, REGIONS * FRAMES)
            xen.set_max_pages(domid, 0)
            for turn in range(pairs + 1):  # the first is to warm up
                for name in ("table", "bare") if turn % 2 else ("bare", "table"):
                    took = by_table(domid) if name == "table" else bare(xen, domid)
                    if turn:
                        columns[name].append(took)
                print(f"vhost {turn}/{pairs}", file=sys.stderr, flush=True)
        finally:
            process.terminate()
            process.communicate(timeout=WAIT_S)
            xen.destroy(domid)
            DISK.unlink()
    return {"series": columns}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
