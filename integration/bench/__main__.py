# SPDX-License-Identifier: LGPL-2.1-or-later
"""Boots once and reports what xshmd costs: a table on stdout, everything in artefacts/.

Each ratio is the median over interleaved pairs of one boot, with a 95 % bootstrap interval; times
of an emulated machine mean nothing by themselves.  Counts are exact.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from integration.arch import ARCHES
from integration.bench.stats import ratio
from integration.cache import BuildError, Cache
from integration.dom0 import CommandFailed, Dom0Error
from integration.extensions import get_sysroot
from integration.machine import BootError, Machine, prepare
from integration.progress import note, step
from integration.qemu import accelerator
from integration.sources import PROJECT
from integration.toolroot import ToolError

HERE: Final = Path(__file__).resolve().parent
IN_DOM0: Final = "/rig/bench"
TIME_LIMIT_S: Final = 3600.0
PHASES: Final = (
    "map", "vhost", "grants", "scatter", "bells", "peers", "windows", "creates", "restarts",
    "client", "counts", "linux",
)  # fmt: skip
PROGRAMS: Final = {"arm64": "qemu-system-aarch64", "x86_64": "qemu-system-x86_64"}
C_PROGRAMS: Final = {
    "attach_loop": ("xencall", "xenforeignmemory"),
    "bell_loop": ("xenevtchn",),
    "vchan_loop": (
        "xenvchan", "xenstore", "xenevtchn", "xengnttab", "xentoollog", "xentoolcore", "pthread",
    ),
}  # fmt: skip
"""What is measured against, and the libraries each needs."""
IN_GUESTS: Final = {"vchan_loop"}
"""Those that run where no library is."""
FILES: Final = ("vchan-init.sh",)

ALONE: Final = {
    "grants": "grants_in_dom0.py", "scatter": "scatter_in_dom0.py", "bells": "bells_in_dom0.py",
    "windows": "windows_in_dom0.py", "vhost": "vhost_in_dom0.py", "peers": "peers_in_dom0.py",
}  # fmt: skip
"""Phases with a program of their own."""
SCATTER_AIMS: Final = {"4 KiB": 0.5, "64 KiB": 0.9, "2 MiB": 0.95}
"""Bandwidth of a copy by lists, of memcpy's."""
XEN_ARGS: Final = ("xsm=dummy",)
"""Debian's default on Arm has guests talk to dom0 only: neither direct channels nor vchan."""

Row = tuple[str, str, str]


def build(arch_name: str) -> tuple[dict[str, bytes], str]:
    """The C side of the benchmark, for this architecture; and which QEMU there is."""
    cache = Cache()
    parts = prepare(arch_name, cache)
    qemu = parts.tools.run([PROGRAMS[arch_name], "--version"], capture=True).splitlines()[0]
    arch, sysroot = parts.arch, get_sysroot(parts.arch, parts.tools, cache)
    built = {}
    with tempfile.TemporaryDirectory(prefix="xshmd-bench-") as folder:
        for name, libraries in C_PROGRAMS.items():
            parts.tools.run(
                [
                    *(arch.gcc, "--sysroot=/rig/sysroot", "-std=gnu11", "-O2", "-Wall", "-Wextra"),
                    *("-Werror", "-o", f"/rig/out/{name}", f"/rig/src/{name}.c"),
                    *(("-static", "-s") if name in IN_GUESTS else ()),
                    *(f"-l{library}" for library in libraries),
                ],
                binds={Path(folder): "/rig/out", HERE: "/rig/src", sysroot.path: "/rig/sysroot"},
            )
            built[name] = (Path(folder) / name).read_bytes()
    return built, f"{qemu}, {accelerator(arch)}"


def measure(
    machine: Machine, phases: list[str], pairs: int, result: dict[str, Any]
) -> Iterator[None]:
    """Run the phases in dom0; yields after each, as they take minutes."""
    dom0 = machine.dom0
    for name in ("in_dom0.py", "counted_daemon.py", *ALONE.values(), *FILES):
        dom0.put(f"{IN_DOM0}/{name}", (HERE / name).read_bytes(), mode=0o755)
    fewer = min(pairs, max(10, pairs * 2 // 3))
    calls: dict[str, tuple[str, list[int]]] = {
        "creates": ("creates", [fewer, 0]),
        "restarts": ("restarts", [fewer]),
        "map": ("map", [pairs]),
        "counts": ("counts", []),
        "client": ("client", [pairs]),
        "linux": ("creates", [0, fewer]),
    }
    result["versions"] |= ask(machine, "versions", [])
    for phase in phases:
        with step(f"measuring {phase}"):
            if phase in ALONE:
                result[phase] = run(machine, ALONE[phase], pairs)
            else:
                result[phase] = ask(machine, *calls[phase])
        yield


def ask(machine: Machine, verb: str, numbers: list[int]) -> dict[str, Any]:
    """Run one verb of in_dom0.py."""
    return run(machine, "in_dom0.py", verb, *numbers)


def run(machine: Machine, program: str, *arguments: str | int) -> dict[str, Any]:
    """Run a program in dom0; what it found."""

    def keep(stream: int, data: bytes) -> None:
        if stream == 2:
            with (machine.artefacts / "progress.log").open("ab") as file:
                file.write(data)

    words = ["python3", "-I", f"{IN_DOM0}/{program}", *map(str, arguments)]
    done = machine.dom0.run(words, timeout_s=TIME_LIMIT_S, on_output=keep)
    found: dict[str, Any] = json.loads(done.text.splitlines()[-1])
    return found


# -- the report -------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> list[Row]:
    """The rows of the table: what, the figure, the aim."""
    rows: list[Row] = []
    if "map" in result:
        rows += report_map(result["map"])
    if "vhost" in result:
        series = result["vhost"]["series"]
        what = "SET_MEM_TABLE of 8 x 32 MiB / bare foreign map"
        rows.append((what, compare(series, "table", "bare"), "<= 1.1"))
    if "scatter" in result:
        rows += report_scatter(result["scatter"])
    if "grants" in result:
        series = result["grants"]["series"]
        rows.append(("grant 64 MiB / C", compare(series, "attach", "grant_c"), ""))
        helper = compare(series, "map_helper", "map_c")
        rows.append(("xshm-guest map, 64 MiB / bare gntdev program", helper, ""))
    if "bells" in result:
        series, rounds = result["bells"]["series"], result["bells"]["rounds"]
        rows.append((f"{rounds} rings relayed / C", compare(series, "ours", "bare"), "<= 4"))
    if "peers" in result:
        rows += report_peers(result["peers"])
    if "windows" in result:
        rows += report_windows(result["windows"])
    if "creates" in result:
        rows += report_creates(result["creates"]["baremetal"], "bare metal")
    if "linux" in result:
        rows += report_creates(result["linux"]["linux"], "Linux")
    if "restarts" in result:
        series = result["restarts"]["series"]
        running, start = compare(series, "on", "off"), compare(series, "ready", "import_trio")
        rows.append(("xl create, no region: xshmd running / not", running, "<= 1.05"))
        rows.append(("start to READY / import trio", start, "<= 1.25"))
    if "creates" in result:
        rows += report_memory(result["creates"])
    if "counts" in result:
        rows += report_counts(result["counts"])
    if "client" in result:
        series = result["client"]["series"]
        rows.append(("xshmctl list / python3 -I -S -c pass", compare(series, "list", "bare"), ""))
        rows.append(("xshmctl list / python3 -I -c pass", compare(series, "list", "site"), ""))
    return rows


def compare(series: dict[str, list[float]], ours: str, reference: str, scale: float = 1.0) -> str:
    """A ratio, with the medians it comes from, and the best of each: a busy host only adds."""
    one, other = [figure * scale for figure in series[ours]], series[reference]
    medians = [statistics.median(figures) * 1e3 for figures in (one, other)]
    best = min(one) / min(other)
    return f"{ratio(one, other)}  best {best:.3f}  ({medians[0]:.0f} / {medians[1]:.0f} ms)"


def report_map(found: dict[str, Any]) -> list[Row]:
    """Attach and detach of 256 MiB."""
    series, calls = found["series"], found["hypercalls"]
    frames, singles = found["frames"], found["singles"]
    pairs = zip(series["check"], series["attach"], strict=True)
    series = series | {"check+attach": [one + other for one, other in pairs]}
    per_page = statistics.median(series["map_c"]) / frames * 1e6
    singly = compare(series, "unmap_python", "single_c", singles / frames)
    return [
        ("null hypercall (XENVER_version)", f"{found['null_hypercall_s'] * 1e6:.1f} us", ""),
        (f"C map: {calls['map_c']} hypercalls", f"{per_page:.2f} us/page", ""),
        ("map 256 MiB / C", compare(series, "map_python", "map_c"), "<= 1.15"),
        ("attach() 256 MiB / C", compare(series, "attach", "map_c"), "<= 1.15"),
        ("check() + attach() 256 MiB / C", compare(series, "check+attach", "map_c"), "<= 1.15"),
        ("unmap 256 MiB / map", compare(series, "unmap_python", "map_python"), ""),
        ("unmap 256 MiB / C multicalls", compare(series, "unmap_python", "multi_c"), "<= 1.15"),
        (f"unmap / single removes in C, {singles} frames", singly, "<= 0.125"),
        ("pages not back after all of it", str(found["pages_not_back"]), "0"),
    ]


def report_scatter(found: dict[str, Any]) -> list[Row]:
    """Bandwidth, which is the seconds of memcpy by those of the copy."""
    rows, series = [], found["series"]
    for name, (_, number) in found["segments"].items():
        for kind, what, aim in (
            ("copy", "bandwidth of a list copied", f">= {SCATTER_AIMS[name]}"),
            ("whole", "  the same with its mapping", ""),
            ("granted", "  the same by grants", ""),
        ):
            plain, ours = series[f"{name} memcpy"], series[f"{name} {kind}"]
            medians = [statistics.median(figures) * 1e6 for figures in (plain, ours)]
            text = f"{ratio(plain, ours)}  best {min(plain) / min(ours):.3f}"
            text += f"  ({medians[0]:.0f} / {medians[1]:.0f} us)"
            rows.append((f"{what} / memcpy, {number} x {name}", text, aim))
    return rows


def report_peers(found: dict[str, Any]) -> list[Row]:
    """Round trips of rings, and how many messages there are in the time of one of vchan's."""
    series, rows = found["series"], []
    for name, what, aim in (("direct", "direct", "<= 1.5"), ("ours", "by xshmd", "<= 4")):
        rows.append((f"doorbell round trip, {what} / by C", quick(series, name, "bare"), aim))
    for size in found["sizes"]:
        what = f"ring of messages / libxenvchan, {size} bytes: messages a second"
        rows.append((what, quick(series, f"vchan {size}", f"ring {size}"), ""))
    return rows


def quick(series: dict[str, list[float]], ours: str, reference: str) -> str:
    """A ratio, as :func:`compare`, of what takes microseconds."""
    one, other = series[ours], series[reference]
    medians = [statistics.median(figures) * 1e6 for figures in (one, other)]
    best = min(one) / min(other)
    return f"{ratio(one, other)}  best {best:.3f}  ({medians[0]:.1f} / {medians[1]:.1f} us)"


def report_windows(found: dict[str, Any]) -> list[Row]:
    """For how long sealed groups stand still, of each MiB."""
    rows = []
    for name, series in found.items():
        size_mib, nr_guests = map(int, name.split())
        for kind, what in (("join", "joins"), ("leave", "leaves")):
            per_mib = statistics.median(series[kind]) / size_mib * 1e3
            text = f"{per_mib:.2f} ms/MiB, {ratio(series[kind], series['copy'])} of memcpy"
            rows.append((f"pause when one {what}: {size_mib} MiB, {nr_guests} guests", text, ""))
    return rows


def report_creates(series: dict[str, list[float]], kind: str) -> list[Row]:
    """``xl create`` with a region and without."""
    rows = [
        (f"xl create {kind}: new region / none", compare(series, "new", "none"), "<= 1.10"),
        (f"xl create {kind}: region in use / none", compare(series, "join", "none"), "<= 1.10"),
    ]
    for name, what in (("none", "no"), ("join", "a used"), ("new", "a new")):
        cpu = statistics.median(series[f"{name}_daemon_cpu"]) * 1e3
        rows.append((f"  CPU of xshmd meanwhile, {what} region", f"{cpu:.0f} ms", ""))
    return rows


def report_memory(found: dict[str, Any]) -> list[Row]:
    """What the daemon has of dom0's."""
    return [
        (what, f"{found[key]['Rss'] / 1024:.1f} / {found[key]['Pss'] / 1024:.1f} MiB", "<= 32 MB")
        for key, what in (
            ("memory_ready_kib", "RSS / PSS of xshmd when READY"),
            ("memory_after_20_kib", "RSS / PSS after 20 guests"),
            ("memory_end_kib", f"RSS / PSS after {found['cycles']} guests"),
        )
    ]


def report_counts(found: dict[str, Any]) -> list[Row]:
    """Messages to xenstored."""
    return [
        (
            f"xenstore messages of a guest: {name}",
            f"{one['messages']} in all, {one['attach_step']} of the attach step",
            "<= 5" if one["attach_step"] else "",
        )
        for name, one in found.items()
    ]


def show(result: dict[str, Any]) -> None:
    """Print the machine and the table."""
    facts, host = result["versions"], result["host"]
    print(
        f"{facts['arch']}: Xen {facts['xen']}, Linux {facts['kernel']}, Python {facts['python']}, "
        f"{facts['qemu']}, {facts['dom0_vcpus']} vCPU of dom0; host: {host['cpus']} CPUs, load "
        f"{host['load_before'][0]:.1f} before, {host['load_after'][0]:.1f} after"
    )
    rows = report(result)
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in (("what", "median ratio [95 % CI] pairs, best / best (medians)", "aim"), *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def main(arguments: list[str] | None = None) -> int:
    """Boot, measure, report."""
    parser = argparse.ArgumentParser(prog="python3 -m integration.bench", description=__doc__)
    parser.add_argument("--arch", choices=tuple(ARCHES), default="arm64")
    parser.add_argument("--pairs", type=int, default=15, help="of attach; others: 2/3, at least 10")
    parser.add_argument("--phase", action="append", choices=PHASES, help="only this one")
    parser.add_argument("--dom0-vcpus", type=int, default=1, help="guests have one CPU more")
    parser.add_argument("--artefacts", type=Path, default=PROJECT / "artefacts")
    parser.add_argument("--show", type=Path, metavar="JSON", help="print an earlier run's table")
    chosen = parser.parse_args(arguments)
    if chosen.show:
        show(json.loads(chosen.show.read_text()))
        return 0
    keep = chosen.artefacts / f"bench-{chosen.arch}"
    keep.mkdir(parents=True, exist_ok=True)
    (keep / "progress.log").unlink(missing_ok=True)
    file = chosen.artefacts / f"bench-{chosen.arch}.json"
    load, began = os.getloadavg(), time.monotonic()
    try:
        programs, qemu = build(chosen.arch)
        result: dict[str, Any] = {"versions": {"arch": chosen.arch, "qemu": qemu}}
        with Machine(
            chosen.arch, artefacts=keep, time_limit_s=TIME_LIMIT_S, xen_args=XEN_ARGS,
            smp=chosen.dom0_vcpus + 1, dom0_vcpus=chosen.dom0_vcpus,
        ) as machine:  # fmt: skip
            for name, data in programs.items():
                machine.dom0.put(f"{IN_DOM0}/{name}", data, mode=0o755)
            for _ in measure(machine, chosen.phase or list(PHASES), chosen.pairs, result):
                result["host"] = {
                    "cpus": os.cpu_count(),
                    "load_before": load,
                    "load_after": os.getloadavg(),
                    "seconds": time.monotonic() - began,
                }
                file.write_text(json.dumps(result, indent=1))
    except (BootError, BuildError, CommandFailed, Dom0Error, ToolError) as problem:
        print(f"integration.bench: {problem}", file=sys.stderr)
        return 1
    show(result)
    note(f"everything: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
