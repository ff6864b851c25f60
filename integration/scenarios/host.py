# SPDX-License-Identifier: LGPL-2.1-or-later
"""A scenario speaks of guests, regions and the daemon: `Host` is the machine in those words."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import queue
import re
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from integration import Completed, Dom0Error, Machine
from integration.dom0 import Running
from integration.scenarios.guest import Entry, Guest

T = TypeVar("T")

WAIT_S = 180.0
"""How long anything may take that ought to take a moment: a machine may be emulated on a host
that has ten times as much to do as it can, and only a failure ever waits for so long."""
SETTLE_S = 60.0
GRACE_S = 30
"""How long the daemon under test waits for a guest that rebooted."""
SOCKET = "/run/xshmd/io.xshmd.Regions"
KEEPER_SOCKET = "/run/xshmd-keeper/socket"
ETC = "/etc/xen"
CONFIGS = "/srv/guests"
POLICY = "/etc/xshmd/xshmd.toml"
XEN_BIN = "/usr/lib/xen-4.20/bin"
XENSTORED = f"{XEN_BIN}/xenstored"
XENSTORED_PID = "$(cat /run/xenstored.pid)"
UPDATED = "-U"
"""What a xenstored is started with that takes over from another (tools/xenstored/lu.c)."""


@dataclasses.dataclass(frozen=True)
class State:
    """What must be the same before a scenario and after it."""

    free_pages: int
    domains: tuple[str, ...]
    store: tuple[str, ...]
    files: tuple[str, ...]
    toolstacks: int

    def difference(self, other: State, kept_pages: int = 0) -> str:
        """What differs in `other`, for a person; empty if nothing does.

        `kept_pages` is how many pages Xen itself may have kept.
        """
        parts = []
        if not 0 <= self.free_pages - other.free_pages <= kept_pages:
            parts.append(f"free pages: {self.free_pages} before, {other.free_pages} after")
        if other.toolstacks != self.toolstacks:
            parts.append(f"xl processes: {self.toolstacks} before, {other.toolstacks} after")
        for name in ("domains", "store", "files"):
            before, after = set(getattr(self, name)), set(getattr(other, name))
            parts += [f"{name}: + {line}" for line in sorted(after - before)]
            parts += [f"{name}: - {line}" for line in sorted(before - after)]
        return "\n".join(parts)


class Host:
    """A booted machine with xshmd on it.

    Attributes:
        arch: "arm64" or "x86_64".
        dom0: the command channel.
    """

    program: tuple[str, ...] = ("xshmd",)
    """The daemon's command."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.arch = machine.arch
        self.dom0 = machine.dom0
        self.artefacts = machine.artefacts
        self._numbers = itertools.count(1)
        self._log = bytearray()
        self._log_file = (self.artefacts / "xshmd.log").open("wb")
        self._daemon: Running | None = None
        self._keeper: Running | None = None
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._asking = threading.Lock()
        self._partial = bytearray()
        self.created: list[Guest] = []
        self._wrote = False
        self._probe = self.dom0.spawn(
            ["python3", "-I", "/rig/xen-probe.py", "serve"], stdin=True, on_output=self._heard
        )
        self._answer()

    # -- addresses ------------------------------------------------------------------------------

    @property
    def at(self) -> int:
        """Where regions of this architecture go by default."""
        return 0x3A000000 if self.arch == "arm64" else 0x10_0000_0000

    @property
    def at_elsewhere(self) -> int:
        """Another place that is allowed: between Arm's devices, or between x86's RAM and 4 GiB."""
        return 0x0480_0000 if self.arch == "arm64" else 0x4000_0000

    @property
    def at_large(self) -> int:
        """Where a region of more than 96 MiB can be."""
        return 0x1_0000_0000 if self.arch == "arm64" else 0x20_0000_0000

    def plain_memory(self) -> str:
        """Switch on the PCI device whose BAR 2 is plain memory; its folder in sysfs."""
        found = self.dom0.run("grep -l 0x1110 /sys/bus/pci/devices/*/device").text.splitlines()
        device = found[0].rpartition("/")[0]
        self.dom0.run(f"[ $(cat {device}/enable) != 0 ] || echo 1 > {device}/enable")
        return device

    def plain_memory_at(self) -> int:
        """The machine address of that memory."""
        lines = self.dom0.run(f"cat {self.plain_memory()}/resource").text.splitlines()
        return int(lines[2].split()[0], 16)

    # -- names and configurations ---------------------------------------------------------------

    def unique(self, base: str) -> str:
        """A name that nothing else in this session has: of a guest, or of a region."""
        return f"{base}{next(self._numbers)}"

    def guest(self, base: str, *entries: Entry | str, etc: bool = False, **more: Any) -> Guest:
        """A guest whose configuration is written to a file; `etc` puts it where xshmd looks."""
        guest = Guest(name=self.unique(base), arch=self.arch, entries=entries, **more)
        self.write(guest, etc=etc)
        return guest

    def beater_and_watcher(self, do: str = "fill,beat") -> tuple[str, Guest, Guest]:
        """A region, a guest whose heart beats in it, and one that watches; not made yet."""
        region = self.unique("demo")
        beater = self.guest("beater", Entry(region, self.at), do=do)
        lent = Entry(region, self.at, role="borrower")
        return region, beater, self.guest("watcher", lent, do="watch", slot=1)

    def write(self, guest: Guest, *, etc: bool = False) -> None:
        """Write a guest's configuration, until the scenario has ended."""
        self.dom0.put(self.config_path(guest, etc=etc), guest.config())
        self._wrote = True

    def config_path(self, guest: Guest, *, etc: bool = False) -> str:
        return f"{ETC if etc else CONFIGS}/{guest.name}.cfg"

    # -- xl -------------------------------------------------------------------------------------

    def xl(self, *words: str, check: bool = True, timeout_s: float = 2 * WAIT_S) -> Completed:
        return self.dom0.run(["xl", *words], check=check, timeout_s=timeout_s)

    def create(self, guest: Guest, *words: str, etc: bool = False, check: bool = True) -> Completed:
        """Plain `xl create`."""
        self.created.append(guest)
        return self.xl("create", *words, self.config_path(guest, etc=etc), check=check)

    def create_all(self, *guests: Guest) -> None:
        """Create them one after the other."""
        for guest in guests:
            self.create(guest)

    def start_creating(self, guest: Guest, etc: bool = False) -> Running:
        """`xl create`, not waited for."""
        self.created.append(guest)
        words = ["xl", "create", self.config_path(guest, etc=etc)]
        return self.dom0.spawn(words, timeout_s=2 * WAIT_S)

    def destroy(self, *guests: Guest) -> None:
        for guest in guests:
            self.xl("destroy", guest.name)

    def domid(self, guest: Guest) -> int | None:
        """The domain that has this guest's name now."""
        done = self.xl("domid", guest.name, check=False)
        return int(done.text) if done.status == 0 else None

    def domain(self, domid: int) -> dict[str, Any] | None:
        """What Xen says of a domain."""
        return next((d for d in self.ask("domains") if d["domid"] == domid), None)

    def wait_gone(self, guest: Guest) -> None:
        self.wait(lambda: self.domid(guest) is None, f"{guest.name} is gone")

    def wait_node_gone(self, node: str) -> None:
        asking = ["xenstore-exists", node]
        self.wait(lambda: self.dom0.run(asking, check=False).status, f"{node} is gone")

    # -- what guests say ------------------------------------------------------------------------

    def said(self, guest: Guest) -> list[str]:
        """Every line of this guest so far, without its name; of all its lives."""
        if guest.linux:
            path = f"/var/log/xen/console/guest-{guest.name}.log"
        elif self.arch == "arm64":
            path = f"/var/log/xen/console/guest-{guest.name}-vuart0.log"
        else:
            # Port 0xE9: Xen puts the domain before it, dom0's own lines may be around it.
            pattern = re.compile(rf"\(d\d+\) {re.escape(guest.name)}: (.*)")
            text = self.machine.console()
            return [m[1].strip() for line in text.splitlines() if (m := pattern.search(line))]
        try:
            text = self.dom0.get(path).decode(errors="replace")
        except Dom0Error:
            return []
        lines = text.replace("\r", "").split("\n")[:-1]  # what has no end yet is not said yet
        start = f"{guest.name}: "
        return [line.partition(start)[2] for line in lines if start in line]

    def wait_said(
        self, guest: Guest, pattern: str, *, times: int = 1, timeout_s: float = WAIT_S
    ) -> str:
        """Wait until the guest has said a line that matches as a whole; return that line."""
        expected = re.compile(pattern)

        def heard() -> str | None:
            found = [line for line in self.said(guest) if expected.fullmatch(line)]
            return found[times - 1] if len(found) >= times else None

        try:
            return self.wait(heard, "", timeout_s)
        except AssertionError:
            said = "\n".join(self.said(guest)[-20:]) or "nothing"
            raise AssertionError(
                f"{guest.name} did not say /{pattern}/ {times} times in {timeout_s:.0f} s; "
                f"it said:\n{said}\nxshmd said:\n{self.log()[-3000:]}"
            ) from None

    def wait_beats(self, watcher: Guest, slot: int, *, more: int = 2) -> None:
        """Wait until the watcher has seen `more` new beats of another guest, from now on."""
        pattern = rf"peer slot={slot} beat=\d+"
        before = sum(bool(re.fullmatch(pattern, line)) for line in self.said(watcher))
        self.wait_said(watcher, pattern, times=before + more)

    # -- waiting --------------------------------------------------------------------------------

    def wait(self, condition: Callable[[], T | None], what: str, timeout_s: float = WAIT_S) -> T:
        """Wait until the condition returns something true, and return that."""
        deadline = time.monotonic() + timeout_s
        while True:
            began = time.monotonic()
            found = condition()
            if found:
                return found
            now = time.monotonic()
            if now > deadline:
                raise AssertionError(f"not within {timeout_s:.0f} s: {what}\n{self.log()[-3000:]}")
            # dom0 has one processor: at least half of it is for what is waited for.
            time.sleep(max(0.1, now - began))

    # -- the probe ------------------------------------------------------------------------------

    def ask(self, question: str, *arguments: Any) -> Any:
        """Ask /rig/xen-probe.py."""
        with self._asking:
            line = json.dumps({"ask": question, "with": arguments})
            self._probe.write(line.encode() + b"\n")
            return self._answer()

    def _heard(self, stream: int, data: bytes) -> None:
        if stream != 1:
            return
        self._partial += data
        while b"\n" in self._partial:
            line, _, rest = self._partial.partition(b"\n")
            self._partial = bytearray(rest)
            self._answers.put(bytes(line))

    def _answer(self) -> Any:
        try:
            answer = json.loads(self._answers.get(timeout=150))
        except queue.Empty:
            raise AssertionError(f"the probe is silent: {self._probe.stderr.decode()}") from None
        if "error" in answer:
            raise AssertionError(f"the probe failed: {answer['error']}")
        return answer["answer"]

    # -- regions --------------------------------------------------------------------------------

    def regions(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("call", "ListRegions", {})["regions"]
        return found

    def guests(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("call", "ListGuests", {})["guests"]
        return found

    def region(self, region_id: str) -> dict[str, Any]:
        return next(r for r in self.regions() if r["id"] == region_id)

    def apply(self, *changes: dict[str, Any], dry_run: bool = False) -> list[dict[str, Any]]:
        """Make these changes, all or none; the steps."""
        parameters = {"changes": changes, "dryRun": dry_run}
        steps: list[dict[str, Any]] = self.ask("call", "Apply", parameters)["steps"]
        return steps

    def refused(self, *changes: dict[str, Any]) -> str:
        """Ask for changes that cannot be made; the refusal."""
        try:
            steps = self.apply(*changes)
        except AssertionError as refusal:
            return str(refusal)
        raise AssertionError(f"it was done: {steps}")

    def poke(self, region_id: str, page: int, offset: int, word: int) -> None:
        """Write a 64-bit word into a region, through its holder."""
        region = self.region(region_id)
        gfn = region["holderFirstFrame"] + page
        data = struct.pack("<Q", word).hex()
        self.ask("write", region["holderDomainId"], gfn, offset, data)

    def peek(self, region_id: str, page: int, offset: int) -> int:
        """Read a 64-bit word of a region, through its holder."""
        region = self.region(region_id)
        gfn = region["holderFirstFrame"] + page
        data = bytes.fromhex(self.ask("read", region["holderDomainId"], gfn, offset, 8))
        word: int = struct.unpack("<Q", data)[0]
        return word

    # -- the daemon -----------------------------------------------------------------------------

    def log(self, since: int = 0) -> str:
        """What the daemons of this session have said."""
        return bytes(self._log[since:]).decode(errors="replace")

    @property
    def mark(self) -> int:
        """Where the log is now, for `log(since)`."""
        return len(self._log)

    def refusals(self, since: int) -> list[tuple[str, str]]:
        """(guest, reason) of every refusal in the log."""
        line = r"^<3>guest refused guest=('.*?') domid=\d+ (?:holder='\S+' )?rule=\[.*?\] why=(.*)$"
        pattern = re.compile(line, re.M)
        return [
            (ast.literal_eval(name), ast.literal_eval(reason))
            for name, reason in pattern.findall(self.log(since))
        ]

    def wait_log(self, pattern: str, since: int) -> re.Match[str]:
        found = re.compile(pattern, re.M)
        return self.wait(lambda: found.search(self.log(since)), f"xshmd says /{pattern}/")

    def _logged(self, _stream: int, data: bytes) -> None:
        self._log += data
        self._log_file.write(data)
        self._log_file.flush()

    @property
    def daemon_pid(self) -> int:
        assert self._daemon is not None, "no daemon runs"
        return self._daemon.pid

    @property
    def daemon_runs(self) -> bool:
        if self._daemon is None:
            return False
        try:
            self._daemon.wait(0)
        except TimeoutError:
            return True
        return False

    def start_daemon(self, *options: str, wait: bool = True) -> None:
        """Start xshmd, as an admin would without systemd."""
        assert not self.daemon_runs
        since = self.mark
        words = [*self.program, "--log-level", "debug", "--reboot-grace", str(GRACE_S), *options]
        self._daemon = self.dom0.spawn(words, on_output=self._logged)
        if wait:
            self.wait_log(r"^<6>ready ", since)

    def start_keeper(self) -> None:
        """Start xshmd-keeper, which then runs as long as the machine does."""
        self._keeper = self.dom0.spawn(["xshmd-keeper"], on_output=self._logged)
        self.wait(
            lambda: not self.dom0.run(["test", "-S", KEEPER_SOCKET], check=False).status,
            "the keeper listens",
        )

    def stop_daemon(self, number: int = signal.SIGTERM) -> Completed:
        """Signal the daemon and wait for its end."""
        assert self._daemon is not None, "no daemon runs"
        self._daemon.kill(number)
        done = self._daemon.wait(WAIT_S)
        self._daemon = None
        return done

    def reload(self) -> None:
        """Tell the daemon to read its files again."""
        self.dom0.run(["kill", "-HUP", str(self.daemon_pid)])

    def await_killed(self) -> None:
        """Wait for the end of a daemon that somebody else kills."""
        assert self._daemon is not None, "no daemon runs"
        assert self._daemon.wait(WAIT_S).status == -signal.SIGKILL
        self._daemon = None

    def update_xenstored(self) -> None:
        """Have xenstored, the one in C, go on as a new program: with its nodes and connections."""
        self.dom0.run(["xenstore-control", "live-update", XENSTORED])
        words = self.dom0.run(f"cat /proc/{XENSTORED_PID}/cmdline").text.split("\0")
        assert UPDATED in words, words

    @contextmanager
    def daemon_with(self, *options: str) -> Iterator[None]:
        """Run the body with a daemon of other options."""
        self.stop_daemon()
        self.start_daemon(*options)
        try:
            yield
        finally:
            if self.daemon_runs:
                self.stop_daemon()
            self.start_daemon()

    @contextmanager
    def policy(self, text: str) -> Iterator[None]:
        """Run the body with what an administrator says in xshmd.toml; no daemon is told."""
        self.dom0.put(POLICY, text)
        try:
            yield
        finally:
            self.dom0.run(["rm", POLICY])

    def xshmctl(
        self, *words: str, check: bool = True, env: dict[str, str] | None = None
    ) -> Completed:
        return self.dom0.run(["xshmctl", *words], check=check, timeout_s=2 * WAIT_S, env=env)

    # -- back to the start ----------------------------------------------------------------------

    def state(self) -> State:
        """The machine as it is now."""
        files = f"ls -d /var/lib/xen/* {CONFIGS}/* /tmp/*"
        look = f"xenstore-ls -fp; echo ---; {files}; echo ---; pgrep -c '^xl$'"
        store, files, toolstacks = self.dom0.run(look, check=False).text.split("---\n")
        return State(
            free_pages=self.ask("free_pages"),
            domains=tuple(f"{d['domid']} {d['uuid']}" for d in self.ask("domains")),
            store=tuple(store.splitlines()),
            files=tuple(files.splitlines()),
            toolstacks=int(toolstacks or 0),
        )

    def wait_state(self, wanted: State, timeout_s: float = SETTLE_S, *, kept_pages: int = 0) -> str:
        """Wait until the machine is as it was; the difference if that never happens."""
        deadline = time.monotonic() + timeout_s
        while True:
            # The host's pages are what is back last, and by far the cheapest to ask for.
            lacking = wanted.free_pages - self.ask("free_pages")
            late = time.monotonic() > deadline
            if late or 0 <= lacking <= kept_pages:
                difference = wanted.difference(self.state(), kept_pages)
                if not difference or late:
                    return difference
            time.sleep(0.2)

    def wait_state_still(self) -> None:
        """Wait until the host's free memory is what it was three seconds ago."""
        counted: list[int] = []

        def still() -> bool:
            counted.append(self.ask("free_pages"))
            time.sleep(0.5)
            return len(counted) >= 6 and len(set(counted[-6:])) == 1

        self.wait(still, "the host's free memory settles")

    def clean_up(self) -> list[str]:
        """End every guest that a scenario left; their names."""
        left = []
        wanted = {guest.name for guest in self.created}
        listed = self.xl("list").text.splitlines()[1:]
        for name in (line.split()[0] for line in listed):
            if name in wanted:
                left.append(name)
                self.xl("destroy", name, check=False)
        if self._wrote:
            self.dom0.run(f"rm -rf {CONFIGS}/* {ETC}/*.cfg /etc/xshmd/guests.d/*", check=False)
        self.created.clear()
        self._wrote = False
        return left

    def close(self) -> None:
        """Stop what runs, and keep dom0's logs."""
        if self.daemon_runs:
            self.stop_daemon()
        self._probe.close_stdin()
        self._log_file.close()
        logs = self.artefacts / "guests"
        logs.mkdir(exist_ok=True)
        done = self.dom0.run("cd /var/log/xen/console && tail -n +1 -v *.log", check=False)
        (logs / "consoles.log").write_bytes(done.stdout)
        (logs / "xl-dmesg.log").write_bytes(self.dom0.run("xl dmesg", check=False).stdout)


def add(region: str, size: int) -> dict[str, Any]:
    """A change: make a region that belongs to the system."""
    return {"add": {"id": region, "sizeBytes": size}}


def remove(region: str, *, force: bool = False) -> dict[str, Any]:
    """A change: free a region."""
    return {"remove": {"region": region, "force": force}}


def attach(guest: Guest | int, region: str, at: int, size: int) -> dict[str, Any]:
    """A change: give a running guest a region."""
    entry = {"region": region, "firstFrame": at >> 12, "frameCount": size >> 12}
    return {"attach": {"guest": _called(guest), "entry": entry}}


def detach(guest: Guest | int, region: str) -> dict[str, Any]:
    """A change: take a region from a running guest."""
    return {"detach": {"guest": _called(guest), "region": region}}


def _called(guest: Guest | int) -> str:
    return str(guest) if isinstance(guest, int) else guest.name


def names(items: Sequence[dict[str, Any]], key: str = "id") -> list[str]:
    """One field of each item."""
    return [item[key] for item in items]


def artefacts(arch: str, name: str = "") -> Path:
    """Where what an architecture's session leaves is kept."""
    root = Path(__file__).resolve().parent.parent.parent
    return root / "artefacts" / arch / name
