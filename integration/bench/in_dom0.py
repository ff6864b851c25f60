#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The part of the benchmark that runs in dom0: one verb a call, its measurements as JSON on stdout.

    in_dom0.py map PAIRS | creates PAIRS | restarts PAIRS | counts | client PAIRS | versions

Everything here is measured next to what it is compared with, again and again, in an order that
changes with every round.  Nothing is judged here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from xshmd.engine.attach import Mapping, attach, check
from xshmd.engine.holders import enlarge_paging_pool
from xshmd.machine import Arch
from xshmd.model import Guest, GuestState, Holder, RegionRequest, Role
from xshmd.policy.identity import new_generation, new_holder_uuid
from xshmd.units import DomId, Gfn
from xshmd.xen.hypervisor import XenHypervisor

HERE: Final = Path(__file__).resolve().parent
MIB: Final = 1 << 20
FRAMES: Final = 65536
"""256 MiB."""
SINGLES: Final = 4096
"""Frames removed one by one in a round; the rest go by multicall, lest a round take 10 s."""
HOLDER_GFN: Final = Gfn(0x40200)
GUEST_AT: Final = {"arm64": 0x1_0000_0000, "x86_64": 0x20_0000_0000}
SMALL_AT: Final = {"arm64": 0x3A000000, "x86_64": 0x10_0000_0000}
CYCLES: Final = 20
WAIT_S: Final = 60.0
ARCH: Final = "arm64" if platform.machine() == "aarch64" else "x86_64"


def note(text: str) -> None:
    """Say how far it is."""
    print(text, file=sys.stderr, flush=True)


def turned(names: Sequence[str], turn: int) -> list[str]:
    """The names in the order of this turn; all orders in as many turns, so none favours a name."""
    orders = list(itertools.permutations(names))
    return list(orders[turn % len(orders)])


def wait(condition: Callable[[], bool], what: str) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {WAIT_S:.0f} s: {what}")
        time.sleep(0.05)


# -- the attach itself ------------------------------------------------------------------------


class Loop:
    """The C program."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [HERE / "attach_loop"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, verb: str, *numbers: int) -> tuple[float, int]:
        """Have it do something; its own seconds and hypercalls."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join([verb, *map(str, numbers)]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().split()
        if answer[:1] != ["ok"]:
            raise RuntimeError(f"attach_loop {verb} {numbers}: {' '.join(answer)}")
        return int(answer[1]) / 1e9, int(answer[2])


class Scratch:
    """Domains by the holder recipe that are there for one round."""

    def __init__(self, xen: XenHypervisor) -> None:
        self._xen = xen
        self._made: list[DomId] = []

    def guest(self) -> Guest:
        """A new domain for something to be mapped into; it stands still for ever."""
        uuid = new_holder_uuid()
        domid = self._xen.create_holder_domain(uuid)
        self._made.append(domid)
        request = RegionRequest(
            region_id="bench", first_gfn=Gfn(GUEST_AT[ARCH] >> 12), nr_frames=FRAMES,
            role=Role.OWNER,
        )  # fmt: skip
        return Guest(
            domid=domid, uuid=uuid, name="bench", generation=new_generation(),
            state=GuestState.MAPPING, requests=(request,),
        )  # fmt: skip

    def holder(self) -> Holder:
        """A new domain that owns 256 MiB."""
        uuid = new_holder_uuid()
        domid = self._xen.create_holder_domain(uuid)
        self._made.append(domid)
        enlarge_paging_pool(self._xen, domid, [FRAMES])
        self._xen.set_max_pages(domid, FRAMES)
        self._xen.populate(domid, HOLDER_GFN, FRAMES)
        self._xen.set_max_pages(domid, 0)
        return Holder(uuid=uuid, domid=domid, next_gfn=Gfn(HOLDER_GFN + FRAMES))

    def clear(self, keep: int = 1) -> None:
        """Destroy all but the first."""
        while len(self._made) > keep:
            self._xen.destroy(self._made.pop())


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def settled(xen: XenHypervisor, domains: int) -> int:
    """The host's free pages, once only so many domains are left, those that die included.

    The last pages of a domain come back up to two seconds after it has left the list (RCU).
    """
    wait(lambda: len(xen.domains()) == domains, f"{domains} domains are left")
    while True:
        before = xen.host_info().free_pages
        time.sleep(3)
        if xen.host_info().free_pages == before:
            return before


def measure_map(pairs: int) -> dict[str, Any]:
    """Attach and detach 256 MiB, by xshmd and by the C loop."""
    loop, series = Loop(), Series()
    calls: dict[str, int] = {}
    with XenHypervisor() as xen:
        free_pages = 0
        null_s, _ = loop.ask("null", 2000)
        scratch = Scratch(xen)
        holder = scratch.holder()
        seed = 0x5853484D << 32
        loop.ask("fill", holder.domid, HOLDER_GFN, FRAMES, seed)
        for turn in range(pairs + 1):  # the first is to warm up
            into = {name: scratch.guest() for name in ("c", "map", "attach")}
            for name in ("c", "map"):
                domid = into[name].domid
                enlarge_paging_pool(xen, domid, [FRAMES])
                xen.set_target(domid, holder.domid)
            figures: dict[str, float] = {}
            for name in turned(("c", "map", "attach"), turn):
                guest = into[name]
                first = guest.requests[0].first_gfn
                if name == "c":
                    figures["map_c"], calls["map_c"] = loop.ask(
                        "map", guest.domid, holder.domid, first, HOLDER_GFN, FRAMES
                    )
                elif name == "map":
                    figures["map_python"] = timed(
                        lambda domid=guest.domid, first=first: xen.map_foreign(  # type: ignore[misc]
                            domid, first, holder.domid, HOLDER_GFN, FRAMES
                        )
                    )
                else:
                    wanted = [Mapping(request=guest.requests[0], holder_gfn=HOLDER_GFN)]
                    figures["check"] = timed(
                        lambda guest=guest, wanted=wanted: check(xen, guest, wanted)  # type: ignore[misc]
                    )
                    figures["attach"] = timed(
                        lambda guest=guest, wanted=wanted: attach(  # type: ignore[misc]
                            xen, guest, holder, wanted, again=False
                        )
                    )
            first = into["c"].requests[0].first_gfn
            if ARCH == "x86_64":
                # As the C program sees them, and as xshmd does.  On Arm dom0 cannot: Xen maps no
                # frame that is a foreign one already (xen/arch/arm/mm.c); there what proves the
                # map is that each frame can be removed, once.
                for guest in into.values():
                    loop.ask("check", guest.domid, first, FRAMES, seed)
                    last = Gfn(first + FRAMES - 1)
                    with xen.map_pages(guest.domid, last, 1, writable=False) as page:
                        assert page.read(0, 8) == (seed + FRAMES - 1).to_bytes(8, "little")
            for name in turned(("c", "map", "attach"), turn):
                domid = into[name].domid
                if name == "c":
                    figures["single_c"], calls["single_c"] = loop.ask(
                        "single", domid, first, SINGLES
                    )
                    loop.ask("multi", domid, first + SINGLES, FRAMES - SINGLES)
                elif name == "map":
                    removed: list[int] = []
                    figures["unmap_python"] = timed(
                        lambda domid=domid, removed=removed, first=first: removed.append(  # type: ignore[misc]
                            xen.unmap(domid, first, FRAMES)
                        )
                    )
                    assert removed == [FRAMES]
                else:
                    figures["multi_c"], calls["multi_c"] = loop.ask("multi", domid, first, FRAMES)
            scratch.clear()
            if turn:
                series.add(figures)
            else:
                free_pages = settled(xen, domains=2)
            note(f"map {turn}/{pairs}: " + " ".join(f"{k}={v:.3f}" for k, v in figures.items()))
        left = free_pages - settled(xen, domains=2)
        scratch.clear(keep=0)
    return {
        "series": series.columns, "hypercalls": calls, "null_hypercall_s": null_s / 2000,
        "pages_not_back": left, "frames": FRAMES, "singles": SINGLES,
    }  # fmt: skip


class Series:
    """Columns of figures, a row a round."""

    def __init__(self) -> None:
        self.columns: dict[str, list[float]] = {}

    def add(self, figures: dict[str, float]) -> None:
        """Append a row."""
        for name, figure in figures.items():
            self.columns.setdefault(name, []).append(figure)


# -- the daemon and guests --------------------------------------------------------------------


class Daemon:
    """xshmd, as systemd would start it: READY is what it says on its notification socket."""

    def __init__(self, command: Sequence[str | Path] = ("xshmd",)) -> None:
        path = "/tmp/bench-notify"
        Path(path).unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(path)
            notify.settimeout(WAIT_S)
            with open("/var/log/xshmd-bench.log", "ab") as log:
                began = time.perf_counter()
                self._process = subprocess.Popen(
                    list(command), stdout=log, stderr=log, env={**os.environ, "NOTIFY_SOCKET": path}
                )
            while not notify.recv(4096).startswith(b"READY=1"):
                pass
            self.ready_s = time.perf_counter() - began

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def cpu_s(self) -> float:
        """CPU seconds of all its threads so far (clock_getcpuclockid(3))."""
        return time.clock_gettime((~self.pid << 3) | 2)

    def memory_kib(self) -> dict[str, int]:
        """What it has of memory."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        words = [line.split() for line in text.splitlines()]
        return {w[0].rstrip(":"): int(w[1]) for w in words if w[0] in ("Rss:", "Pss:")}

    def stop(self) -> None:
        """End it; regions and guests stay."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(WAIT_S)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def config(name: str, *entries: str, linux: bool = False) -> str:
    """Write the configuration of a guest where xl and xshmd look; its path."""
    lines = [f'name = "{name}"', 'type = "pvh"', "vcpus = 1"]
    if linux:
        lines += ['kernel = "/rig/guests/vmlinuz"', 'ramdisk = "/rig/guests/linux.cpio.gz"']
        lines += ['extra = "console=hvc0 quiet iomem=relaxed"', "memory = 160"]
    else:
        lines += ['kernel = "/rig/guests/baremetal"', 'extra = "do=stay"', "memory = 8"]
    if ARCH == "x86_64":
        lines += ['tsc_mode = "native"', f'cpus = "{os.cpu_count()}"']  # the first not dom0's
    if entries:
        lines.append("static_shm = [ " + ", ".join(f'"{entry}"' for entry in entries) + " ]")
    path = Path(f"/etc/xen/{name}.cfg")
    path.write_text("\n".join((*lines, "")))
    return str(path)


def entry(region: str, role: str, size_bytes: int = MIB) -> str:
    """One entry of static_shm."""
    at = SMALL_AT[ARCH] if size_bytes <= 64 * MIB else GUEST_AT[ARCH]
    return f"id={region}, begin={at:#x}, size={size_bytes:#x}, role={role}"


@dataclasses.dataclass
class Created:
    """What one ``xl create`` took."""

    seconds: float
    xl_cpu_s: float
    daemon_cpu_s: float = 0.0


class Guests:
    """Creates and destroys guests, and waits until nothing of them is left."""

    def __init__(self, xen: XenHypervisor) -> None:
        self._xen = xen

    def create(self, path: str, daemon: Daemon | None = None) -> Created:
        """Plain ``xl create``, timed."""
        os.sync()
        cpu = daemon.cpu_s() if daemon else 0.0
        began = time.perf_counter()
        pid = os.posix_spawnp("xl", ["xl", "create", "-q", path], os.environ)
        _, status, used = os.wait4(pid, 0)
        seconds = time.perf_counter() - began
        if status:
            raise RuntimeError(f"xl create {path} failed")
        return Created(
            seconds, used.ru_utime + used.ru_stime, daemon.cpu_s() - cpu if daemon else 0.0
        )

    def domains(self) -> int:
        """How many there are, those that die included."""
        return len(self._xen.domains())

    def destroy(self, name: str, remaining: int) -> None:
        """``xl destroy``; returns when so many domains are left and the daemon is quiet."""
        subprocess.run(["xl", "destroy", name], check=True)
        wait(lambda: self.domains() == remaining, f"{remaining} domains are left")
        time.sleep(0.2)


@contextlib.contextmanager
def console_of_xl_quiet() -> Iterator[None]:
    """Keep xl's own words, and those of its children, off our stdout."""
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def measure_creates(pairs: int, linux_pairs: int) -> dict[str, Any]:
    """``xl create`` without a region, with a new one, with one that another guest has already."""
    result: dict[str, Any] = {}
    with XenHypervisor() as xen, Daemon() as daemon:
        guests = Guests(xen)
        result["memory_ready_kib"] = daemon.memory_kib()
        guests.create(config("resident", entry("shared", "owner")), daemon)
        domains = guests.domains()
        cycles = 0
        for kind, rounds in (("baremetal", pairs), ("linux", linux_pairs)):
            linux = kind == "linux"
            paths = {
                "none": config("none", linux=linux),
                "new": config("new", entry("fresh", "owner"), linux=linux),
                "join": config("join", entry("shared", "borrower"), linux=linux),
            }
            series = Series()
            for turn in range(rounds + 1 if rounds else 0):
                figures: dict[str, float] = {}
                for name in turned(tuple(paths), turn):
                    made = guests.create(paths[name], daemon)
                    guests.destroy(name, domains)
                    cycles += 1
                    figures[name] = made.seconds
                    figures[f"{name}_daemon_cpu"] = made.daemon_cpu_s
                    figures[f"{name}_xl_cpu"] = made.xl_cpu_s
                    if cycles == CYCLES:
                        result["memory_after_20_kib"] = daemon.memory_kib()
                if turn:
                    series.add(figures)
                note(f"creates {kind} {turn}/{rounds}: {figures}")
            result[kind] = series.columns
        while pairs and cycles < CYCLES:
            guests.create(paths["new"], daemon)
            guests.destroy("new", domains)
            cycles += 1
        result.setdefault("memory_after_20_kib", daemon.memory_kib())
        result["memory_end_kib"], result["cycles"] = daemon.memory_kib(), cycles
        guests.destroy("resident", 1)
        for path in Path("/etc/xen").glob("*.cfg"):
            path.unlink()
    return result


def measure_restarts(pairs: int) -> dict[str, Any]:
    """``xl create`` of a guest without regions, xshmd running or not; and xshmd's own start."""
    series = Series()
    path = config("none")
    with XenHypervisor() as xen:
        guests = Guests(xen)
        for turn in range(pairs + 1):
            figures: dict[str, float] = {}
            for name in turned(("on", "off"), turn):
                if name == "on":
                    figures["import_trio"] = timed(
                        lambda: subprocess.run(["python3", "-I", "-c", "import trio"], check=True)
                    )
                    with Daemon() as daemon:
                        figures["ready"] = daemon.ready_s
                        figures["on"] = guests.create(path, daemon).seconds
                        guests.destroy("none", 1)
                else:
                    figures["off"] = guests.create(path).seconds
                    guests.destroy("none", 1)
            if turn:
                series.add(figures)
            note(f"restarts {turn}/{pairs}: {figures}")
    Path(path).unlink()
    return {"series": series.columns}


# -- counts -----------------------------------------------------------------------------------

SIZES: Final = {"4 KiB": 4096, "1 MiB": MIB, "256 MiB": 256 * MIB}


def measure_counts() -> dict[str, Any]:
    """What is asked of xenstore for one attach, and where the time goes inside the daemon."""
    log = Path("/tmp/bench-counts")
    log.write_text("")
    result: dict[str, Any] = {}
    command: list[str | Path] = ["python3", "-I", HERE / "counted_daemon.py", log]
    with XenHypervisor() as xen, Daemon(command) as daemon:
        guests = Guests(xen)

        def create(path: str) -> tuple[list[list[Any]], Created, float]:
            before = log.stat().st_size
            began = time.monotonic()
            made = guests.create(path, daemon)
            time.sleep(0.5)
            with log.open() as file:
                file.seek(before)
                return [json.loads(line) for line in file], made, began

        guests.create(config("warm", entry("warm", "owner")), daemon)
        guests.destroy("warm", 1)
        records, made, began = create(config("none"))
        guests.destroy("none", 1)
        result["no region"] = digest(records, made, began)
        for label, size_bytes in SIZES.items():
            records, made, began = create(config("first", entry("counted", "owner", size_bytes)))
            result[f"new {label}"] = digest(records, made, began)
            domains = guests.domains()
            records, made, began = create(
                config("second", entry("counted", "borrower", size_bytes))
            )
            result[f"join {label}"] = digest(records, made, began)
            guests.destroy("second", domains)
            guests.destroy("first", 1)
    for path in Path("/etc/xen").glob("*.cfg"):
        path.unlink()
    return result


def digest(records: Sequence[Sequence[Any]], made: Created, began: float) -> dict[str, Any]:
    """Count the messages of one guest's way through the gate, and add up its steps."""
    messages = [
        {"op": op, "path": path, "step": step}
        for kind, op, path, step in (r[:4] for r in records if r[0] == "message")
        if kind
    ]
    steps: dict[str, list[float]] = {}
    timeline = []
    for record in records:
        if record[0] == "step":
            _, name, outer, at, seconds = record
            steps.setdefault(name, []).append(seconds)
            timeline.append([round(at - began, 4), round(seconds, 4), f"{outer}/{name}"])
    attach_step = [m for m in messages if "Passage._attach_if_built" in m["step"]]
    polls = [m for m in attach_step if m["op"] == "IS_DOMAIN_INTRODUCED"]
    return {
        "messages": len(messages),
        "by_op": Counter(m["op"] for m in messages),
        "by_step": Counter(m["step"].rpartition("/")[0] or m["step"] for m in messages),
        "attach_step": len(attach_step),
        "attach_step_less_polls": len(attach_step) - len(polls) + bool(polls),
        "list": messages,
        "seconds": made.seconds,
        "daemon_cpu_s": made.daemon_cpu_s,
        "steps": {name: [len(all_), round(sum(all_), 4)] for name, all_ in sorted(steps.items())},
        "timeline": sorted(timeline),
    }


# -- the client -------------------------------------------------------------------------------


def measure_client(pairs: int) -> dict[str, Any]:
    """``xshmctl list`` next to a Python that does nothing."""
    series = Series()
    commands = {
        "list": ["xshmctl", "list"],
        "bare": ["python3", "-I", "-S", "-c", "pass"],
        "site": ["python3", "-I", "-c", "pass"],
    }
    with Daemon():
        for turn in range(pairs + 1):
            figures = {
                name: timed(
                    lambda name=name: subprocess.run(  # type: ignore[misc]
                        commands[name], check=True, stdout=subprocess.DEVNULL
                    )
                )
                for name in turned(tuple(commands), turn)
            }
            if turn:
                series.add(figures)
    return {"series": series.columns}


def versions() -> dict[str, Any]:
    """What this was measured on."""
    with XenHypervisor() as xen:
        host = xen.host_info()
    assert host.arch == Arch(ARCH) or host.arch.value == ARCH
    return {
        "xen": host.xen_text, "xen_command_line": host.xen_command_line,
        "kernel": platform.release(), "python": platform.python_version(),
        "dom0_vcpus": os.cpu_count(),
    }  # fmt: skip


def main() -> int:
    """Run one verb."""
    verb, *numbers = sys.argv[1:]
    counts = [int(number) for number in numbers]
    verbs: dict[str, Callable[..., dict[str, Any]]] = {
        "map": measure_map,
        "creates": measure_creates,
        "restarts": measure_restarts,
        "counts": measure_counts,
        "client": measure_client,
        "versions": versions,
    }
    with console_of_xl_quiet():
        result = verbs[verb](*counts)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
