# SPDX-License-Identifier: LGPL-2.1-or-later
"""A test needs a machine with Xen on it, and must leave nothing behind: `Machine` is that.

The whole interface is `Machine` and the `Dom0` it gives.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from integration import qemu
from integration.arch import Arch, arch_named
from integration.cache import Cache
from integration.dom0 import ChannelDead, Dom0
from integration.images import PLAIN, Image, get_image
from integration.payload import get_payload
from integration.progress import step
from integration.toolroot import ToolRoot, require_root

_CONSOLE_TAIL_LINES = 30
_POWER_OFF_S = 20.0
# The emulated EPYC has fewer features than a real one, which is fine.
_QEMU_CHATTER = "warning: TCG doesn't support requested feature"


@dataclass(frozen=True)
class Parts:
    """All that is built before a machine can boot, from the cache.

    Attributes:
        arch: what it is for.
        tools: runs QEMU.
        image: dom0, its kernel, and Xen.
        payload: the disk with xshmd on it, as the clone has it now.
    """

    arch: Arch
    tools: ToolRoot
    image: Image
    payload: Path


def prepare(arch_name: str, cache: Cache | None = None, variant: str = PLAIN) -> Parts:
    """Build whatever a machine of this architecture needs and the cache does not have."""
    require_root()
    arch, cache = arch_named(arch_name), cache or Cache()
    tools = ToolRoot.get(cache)
    image = get_image(arch, tools, cache, variant)
    return Parts(arch, tools, image, get_payload(arch, tools, image, cache))


class BootError(Exception):
    """The machine did not come up; the message has the end of its console."""


class Machine:
    """A machine that boots Xen when entered and is gone, without a trace, when left.

    Attributes:
        artefacts: the folder that keeps the console log, and what a test wants kept.
        boot_seconds: from QEMU's start to the agent's first word.
    """

    def __init__(
        self,
        arch: str,
        *,
        artefacts: Path,
        time_limit_s: float = 600,
        image: str = PLAIN,
        init: str = "rig",
        xenstored: str = "xenstored",
        xen_args: tuple[str, ...] = (),
        linux_args: tuple[str, ...] = (),
        dom0_memory_mib: int = 1024,
        memory_mib: int = 3072,
        smp: int = 2,
        dom0_vcpus: int = 1,
        dom0: str = "pv",
        boot_limit_s: float = 300,
    ) -> None:
        """Say what to boot; nothing happens before the machine is entered.

        Args:
            arch: "x86_64" or "arm64".
            artefacts: see the class.
            time_limit_s: the machine is killed after this, whatever goes on.
            image: which of the architecture's images, see `images.VARIANTS`.
            init: "rig" or "systemd", see `qemu.Shape`.
            xenstored: "xenstored" or "oxenstored", see `qemu.Shape`.
            xen_args: added to Xen's command line.
            linux_args: added to dom0's kernel command line.
            dom0_memory_mib: dom0's share of the memory.
            memory_mib: the machine's memory.
            smp: its CPUs; the first are dom0's.
            dom0_vcpus: how many those are.
            dom0: "pv" or "pvh", see `qemu.Shape`.
            boot_limit_s: how long dom0's agent may take to answer.
        """
        self.arch = arch
        self.artefacts = artefacts
        self.boot_seconds = 0.0
        self._image = image
        self._time_limit_s = time_limit_s
        self._boot_limit_s = boot_limit_s
        self._shape = qemu.Shape(
            memory_mib=memory_mib,
            dom0_memory_mib=dom0_memory_mib,
            smp=smp,
            dom0_vcpus=dom0_vcpus,
            dom0=dom0,
            init=init,
            xenstored=xenstored,
            xen_args=xen_args,
            linux_args=linux_args,
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: threading.Timer | None = None
        self._late = False
        self._command: list[str] = []
        self._dom0: Dom0 | None = None

    @property
    def dom0(self) -> Dom0:
        """The command channel."""
        if self._dom0 is None:
            raise BootError("the machine is not running")
        return self._dom0

    @property
    def console_log(self) -> Path:
        """What Xen and dom0's kernel said, and guests by their debug port."""
        return self.artefacts / qemu.CONSOLE_LOG

    @property
    def _qemu_log(self) -> Path:
        return self.artefacts / "qemu.log"

    @property
    def command(self) -> str:
        """QEMU's command line, to be read by a person."""
        return shlex.join(self._command)

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        if self._process is None:
            raise BootError("the machine is not running")
        return self._process.pid

    def console(self) -> str:
        """The console's text so far."""
        try:
            return self.console_log.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def __enter__(self) -> Self:
        parts = prepare(self.arch, variant=self._image)
        try:
            with step(f"booting Xen on {self.arch} ({qemu.accelerator(parts.arch)})"):
                began = time.monotonic()
                self._start(parts)
                self._await_agent()
                self.boot_seconds = time.monotonic() - began
        except BaseException:
            self._end(politely=False)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end(politely=True)

    def _start(self, parts: Parts) -> None:
        self.artefacts.mkdir(parents=True, exist_ok=True)
        self.console_log.unlink(missing_ok=True)
        # A socket pair needs no name: nobody else can talk to dom0, and nothing is left to remove.
        ours, theirs = socket.socketpair()
        with theirs, self._qemu_log.open("wb") as said:
            self._command = qemu.command(
                parts.arch,
                self._shape,
                channel_fd=theirs.fileno(),
                kernel_bytes=parts.image.kernel.stat().st_size,
            )
            self._process = parts.tools.popen(
                self._command,
                binds={
                    parts.image.root.parent: qemu.IMAGE,
                    parts.payload: qemu.PAYLOAD,
                    self.artefacts.absolute(): qemu.ARTEFACTS,
                },
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is for the test, which then powers off
            )
        self._dom0 = Dom0(ours, self._describe)
        self._watchdog = threading.Timer(self._time_limit_s, self._bark)
        self._watchdog.daemon = True
        self._watchdog.start()

    def _await_agent(self) -> None:
        try:
            self.dom0.wait_ready(self._boot_limit_s)
        except ChannelDead as error:
            raise BootError(str(error)) from error

    def _bark(self) -> None:
        self._late = True
        if self._process is not None:
            self._process.kill()

    def _describe(self) -> str:
        """How the machine is and what it last said, for error messages."""
        if self._late:
            state = f"the machine was killed at its time limit of {self._time_limit_s:.0f} s"
        elif self._process is None:
            state = "QEMU was not started"
        else:
            try:  # a channel that breaks because QEMU ends is seen a moment before it has ended
                status: int | None = self._process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                status = None
            state = "QEMU is running" if status is None else f"QEMU ended with status {status}"
        log = self._qemu_log.read_text(errors="replace") if self._command else ""
        said = "\n".join(s for s in log.splitlines() if _QEMU_CHATTER not in s)
        lines = [s for s in self.console().splitlines() if s.strip()][-_CONSOLE_TAIL_LINES:]
        parts = [state, *(["QEMU said:", said] if said else [])]
        parts += [f"the end of the console ({self.console_log}):", *lines] if lines else []
        return "\n".join(parts)

    def _end(self, *, politely: bool) -> None:
        """Power off, or kill; then remove what is left. Works from any state."""
        process = self._process
        try:
            if process is not None and process.poll() is None and politely and self._dom0:
                try:
                    self._dom0.power_off()
                    process.wait(timeout=_POWER_OFF_S)
                except (ChannelDead, subprocess.TimeoutExpired):
                    pass
        finally:
            if process is not None:
                process.kill()
                process.wait(timeout=30)
            if self._watchdog is not None:
                self._watchdog.cancel()
            if self._dom0 is not None:
                self._dom0.close()
            self._process = self._dom0 = self._watchdog = None

    def shell(self) -> int:
        """Give the user a shell in dom0; its exit status."""
        from integration.shell import run_shell

        return run_shell(self.dom0)
