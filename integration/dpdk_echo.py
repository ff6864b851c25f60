#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A network card of DPDK's vhost library that sends back every frame it is sent.

    dpdk_echo.py SOCKET          "ready" once it listens; runs until it is killed

DPDK's own test program would do, with the drivers of all hardware there is linked to it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any, Final

TO_GUEST: Final = 0
FROM_GUEST: Final = 1
"""Numbers of a network card's queues (virtio 1.2, 5.1.2)."""
BURST: Final = 32
PACKETS: Final = 1023
ROOM: Final = 2048 + 128
"""Of a packet: RTE_MBUF_DEFAULT_BUF_SIZE."""
ANY_SOCKET: Final = -1

_Came = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
_Went = ctypes.CFUNCTYPE(None, ctypes.c_int)


class _Operations(ctypes.Structure):
    """struct rte_vhost_device_ops, of which the rest may be absent."""

    _fields_ = (
        ("new_device", _Came),
        ("destroy_device", _Went),
        ("others", ctypes.c_void_p * 8),
    )


def load(name: str) -> Any:
    """Load a library whose symbols others want."""
    return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)


def main() -> None:
    """Serve for ever."""
    path = sys.argv[1].encode()
    eal, mbuf, vhost = (load(f"librte_{name}.so.25") for name in ("eal", "mbuf", "vhost"))
    load("librte_mempool_ring.so.25")  # EAL takes no plug-in from a folder others may write to
    cpu = min(os.sched_getaffinity(0))
    words = f"echo --no-huge -m 64 --no-pci --no-shconf --no-telemetry --lcores 0@{cpu}".split()
    arguments = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
    assert eal.rte_eal_init(len(words), arguments) >= 0
    mbuf.rte_pktmbuf_pool_create.restype = ctypes.c_void_p
    pool = mbuf.rte_pktmbuf_pool_create(
        b"packets", PACKETS, 0, ctypes.c_uint16(0), ctypes.c_uint16(ROOM), ANY_SOCKET
    )
    assert pool

    there: set[int] = set()

    def came(which: int) -> int:
        there.add(which)
        return 0

    operations = _Operations(_Came(came), _Went(there.discard))
    assert vhost.rte_vhost_driver_register(path, ctypes.c_uint64(0)) == 0
    assert vhost.rte_vhost_driver_callback_register(path, ctypes.byref(operations)) == 0
    assert vhost.rte_vhost_driver_start(path) == 0
    print("ready", flush=True)

    packets = (ctypes.c_void_p * BURST)()
    while True:
        for which in tuple(there):
            count = vhost.rte_vhost_dequeue_burst(
                which, ctypes.c_uint16(FROM_GUEST), ctypes.c_void_p(pool), packets,
                ctypes.c_uint16(BURST),
            )  # fmt: skip
            vhost.rte_vhost_enqueue_burst(
                which, ctypes.c_uint16(TO_GUEST), packets, ctypes.c_uint16(count)
            )
            mbuf.rte_pktmbuf_free_bulk(packets, ctypes.c_uint(count))
        time.sleep(0.001)  # whoever uses DPDK in earnest never sleeps


if __name__ == "__main__":
    main()
