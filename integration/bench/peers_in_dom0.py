#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What doorbells and rings of messages cost guests, next to what has neither.

    peers_in_dom0.py PAIRS

All guests are there all the time; those that are not being looked at are paused.  Two ring each
other directly; two do it by dom0, where now xshmd passes rings on and now a C program.  Two send
each other messages of each size, and so do two Linux guests by libxenvchan.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xshmd.ports import PageMap
from xshmd.units import DomId, Gfn
from xshmd.varlink.client import Client
from xshmd.xen.hypervisor import XenHypervisor

if TYPE_CHECKING:
    from integration.bench import in_dom0 as bench
else:  # beside this file, in dom0
    sys.path.insert(0, str(Path(__file__).parent))
    import in_dom0 as bench

WINDOW_S: Final = 1.5
"""How long rounds or bytes are counted for a figure."""
FOR_EVER: Final = 0xFFFFFFFF
SIZES: Final = (64, 4096)
PING_AT: Final = 128 + 8
"""Where the guest in slot 0 counts its rounds (integration/guests/README.md)."""
RING_AT: Final = 4096
"""Where its ring of messages begins: with the count of bytes written (xshm_peer.h)."""
WORD_BYTES: Final = 8
"""Before each message in the ring."""
MODULES: Final = ("xen-evtchn", "xen-gntalloc", "xen-gntdev")
LINE: Final = re.compile(r"vchan bytes=(\d+) messages=(\d+) us=(\d+)")


def create(xen: XenHypervisor, name: str, extra: str, *lines: str) -> DomId:
    """Create a guest; its domid."""
    text = [f'name = "{name}"', 'type = "pvh"', "vcpus = 1", f'extra = "name={name} {extra}"']
    if bench.ARCH == "x86_64":
        text += ['tsc_mode = "native"', f'cpus = "{os.cpu_count()}"']
    path = Path(f"/etc/xen/{name}.cfg")
    path.write_text("\n".join((*text, *lines, "")))
    subprocess.run(["xl", "create", path], check=True, stdout=subprocess.DEVNULL)
    done = subprocess.run(["xl", "domid", name], check=True, capture_output=True, text=True)
    return DomId(int(done.stdout))


class Pair:
    """Two guests that run only while :meth:`running`."""

    def __init__(self, xen: XenHypervisor, domids: list[DomId]) -> None:
        self._xen, self.domids = xen, domids
        for domid in domids:
            xen.pause(domid)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let them run."""
        for domid in self.domids:
            self._xen.unpause(domid)
        yield
        for domid in self.domids:
            self._xen.pause(domid)

    def destroy(self) -> None:
        """End them."""
        for domid in reversed(self.domids):
            subprocess.run(["xl", "destroy", str(domid)], check=True)


class Peers(Pair):
    """Two bare-metal guests with a region of their own, and a word of it that counts."""

    def __init__(
        self, xen: XenHypervisor, region: str, verbs: tuple[str, str], word_at: int, more: str = ""
    ) -> None:
        baremetal = ('kernel = "/rig/guests/baremetal"', "memory = 8")
        at, domids = bench.SMALL_AT[bench.ARCH], []
        for slot, verb in enumerate(verbs):
            role = "borrower" if slot else f"owner, doorbells=2{more}"
            domids.append(
                create(
                    xen,
                    f"{region}{slot}",
                    f"shm={at:#x},{bench.MIB:#x} do={verb} slot={slot} ticks={FOR_EVER}",
                    *baremetal,
                    f'static_shm = [ "{bench.entry(region, role)}" ]',
                )
            )
        with Client() as client:
            found = client.call("ShowRegion", id=region)["region"]
        self.ports = [
            next(one["ports"] for one in found["members"] if one["domainId"] == domid)
            for domid in domids
        ]
        frame, self._skip = divmod(word_at, 4096)
        gfn = Gfn(found["holderFirstFrame"] + frame)
        self._page: PageMap = xen.map_pages(found["holderDomainId"], gfn, 1, writable=False)
        self.moves()
        super().__init__(xen, domids)

    def count(self) -> int:
        """The word now."""
        return int.from_bytes(self._page.read(self._skip, 4), "little")

    def moves(self) -> None:
        """Wait until the guests are at it."""
        before = self.count()
        bench.wait(lambda: self.count() != before, "the guests go on")

    def seconds_each(self) -> float:
        """How long one step of the word takes."""
        with self.running():
            self.moves()
            before, began = self.count(), time.perf_counter()
            time.sleep(WINDOW_S)
            after, ended = self.count(), time.perf_counter()
        return (ended - began) / ((after - before) % (1 << 32))

    def destroy(self) -> None:
        """End them, and let the region's frame go, so that the region can."""
        self._page.close()
        super().destroy()


# -- doorbells ------------------------------------------------------------------------------------


@contextlib.contextmanager
def bare_relay(pair: Peers) -> Iterator[None]:
    """Have the C program between two guests, in the place of xshmd."""
    one, other = pair.domids
    ends = [str(number) for number in (one, pair.ports[0][1], other, pair.ports[1][0])]
    with subprocess.Popen(
        [bench.HERE / "bell_loop", "relay", *ends], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
        process.kill()


def rings_by_dom0() -> int:
    """How many have come to xshmd."""
    with Client() as client:
        return int(client.call("Status")["status"]["counters"]["doorbell_rings"])


def by_xshmd(pair: Peers) -> float:
    """A round trip of two rings that xshmd passes on."""
    before = rings_by_dom0()
    took = pair.seconds_each()
    assert rings_by_dom0() - before > WINDOW_S / took
    return took


def directly(pair: Peers) -> float:
    """A round trip that xshmd hears nothing of."""
    before = rings_by_dom0()
    took = pair.seconds_each()
    assert rings_by_dom0() - before < 10
    return took


# -- messages -------------------------------------------------------------------------------------


def ramdisk() -> str:
    """What the test guests' Linux boots from, with libxenvchan's loop in place of its verbs."""
    tree = Path("/tmp/vchan")
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "bin").mkdir(parents=True)
    shutil.copy(bench.HERE / "vchan_loop", tree / "bin/vchan_loop")
    shutil.copy(bench.HERE / "vchan-init.sh", tree / "init")
    drivers = Path("/usr/lib/modules") / os.uname().release / "kernel/drivers/xen"
    for name in MODULES:
        (tree / f"{name}.ko").write_bytes(lzma.decompress((drivers / f"{name}.ko.xz").read_bytes()))
    pack = "find . -mindepth 1 | busybox cpio -o -H newc 2>/dev/null | gzip -1"
    packed = subprocess.run(["sh", "-c", pack], cwd=tree, check=True, capture_output=True).stdout
    path = Path("/tmp/vchan.cpio.gz")
    path.write_bytes(Path("/rig/guests/linux.cpio.gz").read_bytes() + packed)
    return str(path)


class Vchan(Pair):
    """Two Linux guests that send each other messages."""

    def __init__(self, xen: XenHypervisor) -> None:
        lines = ('kernel = "/rig/guests/vmlinuz"', f'ramdisk = "{ramdisk()}"', "memory = 160")
        self._log = Path("/var/log/xen/console/guest-vsend.log")
        # Each must know the other's number; Xen gives them in order.
        last = max(info.domid for info in xen.domains())
        words = [f"console=hvc0 quiet do={do}" for do in ("receive", "send")]
        receiver = create(xen, "vreceive", f"{words[0]} peer={last + 2}", *lines)
        sender = create(xen, "vsend", f"{words[1]} peer={receiver}", *lines)
        assert (receiver, sender) == (last + 1, last + 2)
        bench.wait(lambda: len(self._said()) >= len(SIZES), "the Linux guests send messages")
        super().__init__(xen, [receiver, sender])

    def _said(self) -> list[tuple[int, int, int]]:
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        return [tuple(map(int, found)) for found in LINE.findall(text)]  # type: ignore[misc]

    def seconds_each(self) -> dict[str, float]:
        """How long a message of each size takes."""
        before = len(self._said())
        with self.running():
            # The first has the pause in it.
            bench.wait(lambda: len(self._said()) > before + len(SIZES), "messages of all sizes")
        found = self._said()[-len(SIZES) :]
        return {f"vchan {size}": us / 1e6 / messages for size, messages, us in found}


# -- all of it ------------------------------------------------------------------------------------


def measure(pairs: int) -> dict[str, Any]:
    """Look at everybody in turn, again and again."""
    series = bench.Series()
    ping = ("bell-ping", "bell-pong")
    with XenHypervisor() as xen:
        daemon = bench.Daemon()
        relayed = Peers(xen, "relayed", ping, PING_AT, ", doorbell_route=relayed")
        direct = Peers(xen, "direct", ping, PING_AT)
        rings = {}
        for size in SIZES:
            verbs = f"send bytes={size}", f"receive bytes={size}"
            rings[size] = Peers(xen, f"ring{size}", verbs, RING_AT)
        vchan = Vchan(xen)
        for turn in range(pairs + 1):  # the first is to warm up
            figures: dict[str, float] = {}
            for kind in bench.turned(("ours", "direct", "bare"), turn):
                if kind == "ours":
                    figures[kind] = by_xshmd(relayed)
                elif kind == "direct":
                    figures[kind] = directly(direct)
                else:
                    daemon.stop()
                    with bare_relay(relayed):
                        figures[kind] = relayed.seconds_each()
                    daemon = bench.Daemon()
            for kind in bench.turned(("rings", "vchan"), turn):
                if kind == "vchan":
                    figures |= vchan.seconds_each()
                    continue
                for size, peers in rings.items():
                    figures[f"ring {size}"] = peers.seconds_each() * (WORD_BYTES + size)
            if turn:
                series.add(figures)
            said = " ".join(f"{name}={figure * 1e6:.1f}us" for name, figure in figures.items())
            bench.note(f"peers {turn}/{pairs}: {said}")
        for pair in (relayed, direct, *rings.values(), vchan):
            pair.destroy()
        bench.wait(lambda: len(xen.domains()) == 1, "all guests are gone")
        daemon.stop()
    for path in Path("/etc/xen").glob("*.cfg"):
        path.unlink()
    return {"series": series.columns, "sizes": SIZES}


if __name__ == "__main__":
    with bench.console_of_xl_quiet():
        done = measure(int(sys.argv[1]))
    print(json.dumps(done))
