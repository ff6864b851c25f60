# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shows what xshmd is for, on real Xen, to somebody who has never seen it.

``make demo``: two guests that know nothing but an address, started with plain ``xl create``, talk
through the region their configuration files name.  Ends with 0 only if data really crossed in both
directions and every frame of the host's memory came back.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from integration.arch import ARCHES
from integration.cache import BuildError
from integration.dom0 import CommandFailed, Dom0, Dom0Error
from integration.machine import BootError, Machine
from integration.toolroot import ToolError

EXCHANGES: Final = 6
"""Numbers each guest must have seen from the other, in rising order."""
TALK_LIMIT_S: Final = 90.0
TIME_LIMIT_S: Final = 600.0
SHELL_LIMIT_S: Final = 24 * 3600.0

REGION_AT: Final = {"arm64": 0x3A000000, "x86_64": 0x10_0000_0000}
ARCH_LINES: Final = {
    "arm64": "",
    # Under pure emulation a guest must not have its TSC intercepted, nor share dom0's CPU.
    "x86_64": 'tsc_mode = "native"\ncpus = "1"\n',
}
FREE_PAGES: Final = (
    "from xshmd.xen.hypervisor import XenHypervisor as X; print(X().host_info().free_pages)"
)


def config(arch: str, name: str, peer: str, slot: int, role: str) -> str:
    """Return the xl configuration of one of the two guests."""
    begin = REGION_AT[arch]
    return (
        f'name = "{name}"\n'
        'type = "pvh"\n'
        'kernel = "/rig/guests/vmlinuz"\n'
        'ramdisk = "/rig/guests/linux.cpio.gz"\n'
        f'extra = "console=hvc0 quiet iomem=relaxed name={name} role=talk slot={slot} '
        f'peer={peer} shm={begin:#x},0x100000"\n'
        "memory = 160\n"
        "vcpus = 1\n"
        f"{ARCH_LINES[arch]}"
        f'static_shm = [ "id=mailbox, begin={begin:#x}, size=0x100000, role={role}" ]\n'
    )


class Talk:
    """What the two guests say, shown as it comes and checked."""

    def __init__(self, names: tuple[str, str]) -> None:
        self._names = names
        self._seen: dict[str, list[int]] = {name: [] for name in names}
        self._wrote: dict[str, int] = dict.fromkeys(names, 0)
        self._rest: dict[str, str] = dict.fromkeys(names, "")
        self._lock = threading.Lock()
        self.done = threading.Event()

    def taker(self, name: str) -> Callable[[int, bytes], None]:
        """Return what takes the pieces of this guest's console."""

        def take(_stream: int, data: bytes) -> None:
            with self._lock:
                *lines, self._rest[name] = (self._rest[name] + data.decode(errors="replace")).split(
                    "\n"
                )
                for line in lines:
                    self._line(name, line.strip("\r"))

        return take

    def _line(self, name: str, line: str) -> None:
        other = self._names[1 - self._names.index(name)]
        said = re.fullmatch(rf"{name}: wrote (\d+), sees {other}'s (\d+)", line)
        if said is None:
            return
        wrote, sees = int(said[1]), int(said[2])
        arrow = "->" if name == self._names[0] else "<-"
        print(f"    {name:>5} {arrow} wrote {wrote:3}, and sees {other}'s {sees:3}", flush=True)
        self._wrote[name] = wrote
        # A number the other one has not written (give or take the line that is on its way) would
        # be no proof of anything.
        if 0 < sees <= self._wrote[other] + 2 and sees > max(self._seen[name], default=0):
            self._seen[name].append(sees)
        if all(len(numbers) >= EXCHANGES for numbers in self._seen.values()):
            self.done.set()

    def verdict(self) -> str:
        """Return what crossed."""
        return ", ".join(
            f"{name} saw {len(numbers)} rising numbers" for name, numbers in self._seen.items()
        )


def title(text: str) -> None:
    """Say what comes next."""
    print(f"\n== {text}", flush=True)


def show(dom0: Dom0, command: str, timeout_s: float = 60) -> str:
    """Run a command in dom0 as the user would, showing both it and what it prints."""
    print(f"  dom0# {command}", flush=True)
    done = dom0.run(command, timeout_s=timeout_s, check=True)
    text = (done.stdout + done.stderr).decode("utf-8", "replace").rstrip()
    for line in text.splitlines():
        print(f"    {line}")
    print(f"    ({done.seconds:.1f} s)", flush=True)
    return text


def free_pages(dom0: Dom0) -> int:
    """Return how many 4 KiB pages of the host nobody has."""
    return int(dom0.run(["python3", "-c", FREE_PAGES], timeout_s=60).text)


def start_daemon(dom0: Dom0) -> None:
    """Start xshmd as its unit would and wait until it answers."""
    dom0.run("xshmd >/var/log/xshmd.log 2>&1 </dev/null & echo started", timeout_s=30)
    deadline = time.monotonic() + 60
    while dom0.run("grep -q ready /var/log/xshmd.log", check=False).status:
        if time.monotonic() > deadline:
            raise Dom0Error("xshmd did not start:\n" + dom0.run("cat /var/log/xshmd.log").text)
        time.sleep(0.2)


def warm_up(dom0: Dom0, arch: str) -> None:
    """Have two guests come and go: what Xen keeps for itself after its first is not ours to count.

    Seen: 18 to 21 pages after the first pair of such guests, with and without regions (tables for
    the frames at which dom0 maps a guest's memory), and not one more after any number of further
    pairs.
    """
    for slot, (name, role) in enumerate((("first", "owner"), ("second", "borrower"))):
        text = config(arch, name, "nobody", slot, role).replace("mailbox", "warmup")
        dom0.put(f"/etc/xen/{name}.cfg", text)
    dom0.run(
        "for g in first second; do xl create -q /etc/xen/$g.cfg || exit; done; "
        "for g in first second; do xl destroy $g && rm /etc/xen/$g.cfg; done",
        timeout_s=120,
    )
    deadline = time.monotonic() + 30
    while len(dom0.run("xl list").text.splitlines()) > 2 and time.monotonic() < deadline:
        time.sleep(0.1)


def play(machine: Machine, arch: str) -> bool:
    """Go through the demo; return whether everything that was claimed was seen."""
    dom0 = machine.dom0
    title(f"dom0 is up ({machine.boot_seconds:.1f} s after power-on): real Xen, on {arch}")
    show(dom0, "xl info | grep -E '^(xen_version|virt_caps|free_memory)'")

    title("starting xshmd")
    start_daemon(dom0)
    show(dom0, "cat /var/log/xshmd.log")
    print("  (two guests come and go first, so that Xen has what it keeps for itself)", flush=True)
    warm_up(dom0, arch)
    before = free_pages(dom0)

    title("two guests, whose configuration files name a region and where they want it")
    names = ("alice", "bob")
    for slot, (name, role) in enumerate(zip(names, ("owner", "borrower"), strict=True)):
        dom0.put(f"/etc/xen/{name}.cfg", config(arch, name, names[1 - slot], slot, role))
    show(dom0, "grep -h -E '^(name|static_shm)' /etc/xen/alice.cfg /etc/xen/bob.cfg")

    title("started with plain xl create; the region is there before their first instruction")
    talk = Talk(names)
    consoles = []
    for name in names:
        show(dom0, f"xl create /etc/xen/{name}.cfg")
        log = f"/var/log/xen/console/guest-{name}.log"
        consoles.append(dom0.spawn(["tail", "-n", "+1", "-F", log], on_output=talk.taker(name)))

    title(
        "each writes a counter into the region and reads the other's (they have no driver for it)"
    )
    crossed = talk.done.wait(TALK_LIMIT_S)
    for console in consoles:
        console.kill()
    print(f"    {talk.verdict()}")

    title("what xshmd knows")
    show(dom0, "xshmctl list")
    show(dom0, "xshmctl show mailbox")

    title("both guests end, and everything they shared with them")
    show(dom0, "xl destroy alice && xl destroy bob")
    deadline = time.monotonic() + 30
    after = free_pages(dom0)
    while after != before and time.monotonic() < deadline:
        time.sleep(0.5)
        after = free_pages(dom0)
    show(dom0, "xshmctl list; xl list")
    print(f"    free pages of the host: {before} before, {after} after")

    title("the log of xshmd")
    show(dom0, "grep -v warmup /var/log/xshmd.log")
    if not crossed:
        print("\nFAILED: data did not cross in both directions", flush=True)
    elif after != before:
        print(f"\nFAILED: {before - after} frames did not come back", flush=True)
    else:
        print(
            "\nDONE: data crossed in both directions, and every frame of the host came back.",
            flush=True,
        )
    return crossed and after == before


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0 if all was seen."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--arch", choices=tuple(ARCHES), default="arm64")
    parser.add_argument(
        "--shell", action="store_true", help="end in a shell in dom0, xshmd running"
    )
    chosen = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="xshmd-demo-") as folder:
        try:
            with Machine(
                chosen.arch,
                artefacts=Path(os.environ.get("XSHMD_ARTEFACTS", folder)),
                time_limit_s=SHELL_LIMIT_S if chosen.shell else TIME_LIMIT_S,
            ) as machine:
                good = play(machine, chosen.arch)
                print(f"({time.monotonic() - began:.0f} s in all)", flush=True)
                if chosen.shell:
                    title(
                        "a shell in dom0; try: xl create /etc/xen/alice.cfg, xshmctl list, "
                        "xl console alice (leave with Ctrl-]); exit ends the machine"
                    )
                    machine.shell()
        except (BootError, BuildError, CommandFailed, Dom0Error, ToolError, OSError) as problem:
            print(f"\nFAILED: {problem}", file=sys.stderr)
            return 1
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
