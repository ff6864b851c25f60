# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can be said of a machine without a daemon and without Xen, by looking at files only.

The compiled binding is looked at as a file: importing it would need cffi, and where it does not fit
it could not even be imported.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

OK: Final = "ok"
WARNING: Final = "warning"
FAILED: Final = "failed"

_DEVICES: Final = {
    "privcmd": (FAILED, "modprobe xen-privcmd"),
    "hypercall": (WARNING, "hypercalls then use locked memory: use Linux 4.18 or later"),
    "xenbus": (WARNING, "needed only without xenstored's socket: modprobe xenfs"),
    "gntdev": (WARNING, "regions with the grant transport need it: modprobe xen-gntdev"),
    "gntalloc": (WARNING, "regions of dom0's own memory need it: modprobe xen-gntalloc"),
    "evtchn": (WARNING, "doorbells need it: modprobe xen-evtchn"),
}
"""What each device's absence amounts to, and what to do about it."""
_STORE_SOCKETS: Final = ("run/xenstored/socket", "var/run/xenstored/socket")
_LIBRARY_DIRS: Final = ("usr/lib", "usr/lib/*", "usr/lib64", "usr/local/lib", "lib", "lib/*")
_XENCTRL: Final = re.compile(rb"libxenctrl\.so\.(\d+\.\d+)")
_SYSTEMCTL_TIMEOUT_S: Final = 5.0
_UNIT: Final = "xshmd.service"
_KEEPER_SOCKET: Final = "run/xshmd-keeper/socket"


class Check(NamedTuple):
    """How one thing came out."""

    topic: str
    verdict: str
    text: str
    hint: str = ""
    about: str = ""
    """``xen`` if it failed because there is no Xen, ``daemon`` if no daemon runs."""


class Machine(NamedTuple):
    """Where the machine's files are; anything else than the defaults is for tests."""

    root: Path = Path("/")
    package: Path = Path(__file__).resolve().parent.parent
    search_path: str | None = None
    """Where programs are looked for; None is PATH."""
    euid: int | None = None


def checks(machine: Machine) -> Iterator[Check]:
    """Yield what is found, in the order in which one thing depends on the one before."""
    control = _control_domain(machine.root)
    yield control
    if control.verdict == OK:
        yield from _devices(machine)
        yield _store(machine.root)
        yield _xen_version(machine.root)
    yield from _binding(machine)
    yield _xl(machine)
    yield from _unit(machine)
    if control.verdict == OK:
        yield _keeper(machine.root)


def _control_domain(root: Path) -> Check:
    topic = "control domain"
    if "control_d" in _text(root / "proc/xen/capabilities").split():
        return Check(topic, OK, "this is a Xen control domain")
    if _text(root / "sys/hypervisor/type") != "xen":
        return Check(topic, FAILED, "this machine does not run on Xen", "boot Xen", "xen")
    if not (root / "proc/xen/capabilities").exists():
        return Check(
            topic,
            FAILED,
            "this runs on Xen, but xenfs is not mounted",
            "in the control domain, systemctl start xen (or mount -t xenfs xenfs /proc/xen)",
            "xen",
        )
    return Check(
        topic, FAILED, "this is a Xen guest, not the control domain", "run it in dom0", "xen"
    )


def _devices(machine: Machine) -> Iterator[Check]:
    topic = "devices"
    euid = os.geteuid() if machine.euid is None else machine.euid
    good = []
    for name, (verdict, hint) in _DEVICES.items():
        device = machine.root / "dev/xen" / name
        if not device.exists():
            yield Check(topic, verdict, f"/dev/xen/{name} is not there", hint)
        elif not os.access(device, os.R_OK | os.W_OK):
            way_out = "" if euid == 0 else "run it as root"
            yield Check(topic, WARNING, f"/dev/xen/{name} may not be used by this user", way_out)
        else:
            good.append(name)
    if good:
        yield Check(topic, OK, f"usable in /dev/xen: {', '.join(good)}")


def _store(root: Path) -> Check:
    for path in _STORE_SOCKETS:
        try:
            if stat.S_ISSOCK((root / path).stat().st_mode):
                return Check("xenstore", OK, f"xenstored's socket is /{path}")
        except OSError:
            continue
    if (root / "dev/xen/xenbus").exists():
        return Check("xenstore", OK, "no xenstored socket here; /dev/xen/xenbus leads to it")
    return Check(
        "xenstore", FAILED, "there is no way to xenstored", "systemctl start xen, or xenstored"
    )


def _xen_version(root: Path) -> Check:
    running = _running_xen(root)
    if not running:
        return Check(
            "Xen version",
            WARNING,
            "/sys/hypervisor/version does not say which Xen this is",
            "use a kernel with CONFIG_XEN_SYS_HYPERVISOR",
        )
    extra = _text(root / "sys/hypervisor/version/extra")
    return Check("Xen version", OK, f"Xen {running}{extra} is running")


def _binding(machine: Machine) -> Iterator[Check]:
    topic = "compiled binding"
    build = "install libxen-dev, gcc and python3-cffi and build xshmd again"
    for module in ("_stable", "_evtchn", "_xenctrl"):
        found = _newest(machine.package / "xen", f"{module}*.so")
        if found is None:
            yield Check(topic, FAILED, f"xshmd/xen/{module} is not built", build)
            continue
        wanted = _XENCTRL.search(found.read_bytes())
        if wanted is None:
            yield Check(topic, OK, f"{found.name} is there")
            continue
        yield _fit(machine.root, found.name, wanted[1].decode(), build)


def _fit(root: Path, name: str, wanted: str, build: str) -> Check:
    topic = "compiled binding"
    running = _running_xen(root)
    if running and wanted != running:
        return Check(
            topic, FAILED, f"{name} is built for Xen {wanted}, running is {running}", build
        )
    library = f"libxenctrl.so.{wanted}"
    if not any(_newest(root, f"{directory}/{library}") for directory in _LIBRARY_DIRS):
        return Check(
            topic,
            FAILED,
            f"{name} needs {library}, which is not there",
            f"install libxenmisc{wanted}",
        )
    return Check(topic, OK, f"{name} is there and fits Xen {wanted}")


def _xl(machine: Machine) -> Check:
    found = shutil.which("xl", path=machine.search_path)
    if found is None:
        return Check(
            "xl", WARNING, "there is no xl on PATH: xshmctl create needs it", "install xen-utils"
        )
    return Check("xl", OK, f"xl is {found}")


def _keeper(root: Path) -> Check:
    topic = "sealed regions"
    if (root / _KEEPER_SOCKET).exists():
        return Check(topic, OK, "xshmd-keeper runs: regions can be sealed")
    return Check(
        topic,
        WARNING,
        "xshmd-keeper does not run, without which no region can be sealed",
        "systemctl enable --now xshmd-keeper",
    )


def _unit(machine: Machine) -> Iterator[Check]:
    systemctl = shutil.which("systemctl", path=machine.search_path)
    if systemctl is None or not (machine.root / "run/systemd/system").is_dir():
        return
    state = _unit_state([systemctl, "show", _UNIT, "--property=LoadState,ActiveState,SubState"])
    active = state.get("ActiveState", "")
    if state.get("LoadState") == "not-found":
        yield Check(
            "systemd unit",
            WARNING,
            f"{_UNIT} is not installed",
            "install it from systemd/",
            "daemon",
        )
    elif active in ("active", "reloading"):
        yield Check("systemd unit", OK, f"{_UNIT} is {active} ({state.get('SubState', '')})")
    else:
        yield Check(
            "systemd unit",
            FAILED,
            f"{_UNIT} is {active or 'in a state systemctl does not say'}",
            f"systemctl start {_UNIT}, and see systemctl status {_UNIT}",
            "daemon",
        )


def _unit_state(command: Sequence[str]) -> dict[str, str]:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_SYSTEMCTL_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = (line.partition("=") for line in done.stdout.splitlines())
    return {name: value for name, _, value in pairs}


def _running_xen(root: Path) -> str:
    """Return the running Xen's ``major.minor``, or nothing where sysfs does not say."""
    version = root / "sys/hypervisor/version"
    major, minor = _text(version / "major"), _text(version / "minor")
    return f"{major}.{minor}" if major and minor else ""


def _newest(directory: Path, pattern: str) -> Path | None:
    return max(directory.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)


def _text(path: Path) -> str:
    """Return a small file's text without its last newline; nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
