# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's tools differ from machine to machine: the rig brings its own, a Debian 13 chroot.

All that the host must have is Python, root, and debootstrap (installed if it is missing). QEMU,
the compilers and the image builders run inside the tool root, each in a mount namespace of its
own: when the program ends, its mounts are gone.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from integration.cache import Cache, Entry, Recipe
from integration.progress import step

SUITE = "trixie"
PACKAGES = (
    # the machines
    "qemu-system-x86",
    "qemu-system-arm",
    "device-tree-compiler",
    # the images
    "mmdebstrap",
    "cpio",
    "e2fsprogs",
    "kmod",
    "xz-utils",
    # the extension modules and the guests
    "binutils",
    "gcc",
    "gcc-aarch64-linux-gnu",
    "libc6-dev",
    "libc6-dev-arm64-cross",
    "libpython3-dev",
    "libxen-dev",
    "make",
    "python3-setuptools",
    # the checks that need no Xen
    "mypy",
    "python3",
    "python3-cffi",
    "python3-hypothesis",
    "python3-libfdt",
    "python3-pytest",
    "python3-pytest-trio",
    "python3-pyxs",
    "python3-structlog",
    "python3-trio",
    "python3-varlink",
    "shellcheck",
    "systemd",
)

# Debian's package tools are asked to speak plainly and never to ask back.
_ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "HOME": "/tmp",
    "DEBIAN_FRONTEND": "noninteractive",
}
_PASSED_ON = re.compile(r"(?i)(https?|ftp|no)_proxy$|SOURCE_DATE_EPOCH$")

# Acquire:: settings that decide how packages are reached (proxy, certificates, date checks). The
# others (which indexes to fetch, in which languages) are the host's taste.
_REACH = re.compile(
    r"^\s*Acquire::(http|https|ftp|Check-|Retries|Force|AllowInsecure|proxy)", re.I | re.M
)
_FILE_OPTION = re.compile(r'::Ca(?:Info|Path)\s+"(/[^"]+)"', re.I)
_CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")

# $1 = the root, $2 = rw or ro, $3 = the parent's process id, $4 = working directory; then pairs
# HOST INSIDE up to "--"; then the program. Everything is exec: the process id stays the same.
_ENTER = r"""
set -e
root=$1 access=$2 parent=$3 cwd=$4; shift 4
[ "$parent" = 0 ] || [ "$PPID" = "$parent" ] || exit 125   # the parent died before we armed
mount --bind "$root" "$root"
if [ "$access" = ro ]; then
    mount -o remount,bind,ro "$root"
    for d in tmp run var/tmp rig; do mount -t tmpfs -o mode=1777 tmpfs "$root/$d"; done
fi
mount --rbind /proc "$root/proc"; mount --rbind /sys "$root/sys"; mount --rbind /dev "$root/dev"
while [ "$1" != -- ]; do
    if [ -d "$1" ]; then mkdir -p "$root$2"; else mkdir -p "$root${2%/*}"; : >> "$root$2"; fi
    mount --rbind "$1" "$root$2"; shift 2
done
shift
exec chroot "$root" /usr/bin/env -C "$cwd" "$@"
"""


class ToolRoot:
    """Runs programs of the tool root. Inside, only /rig, /tmp, /run and /var/tmp can be written.

    Attributes:
        path: the folder that is the programs' root directory.
        key: changes when the tools change.
    """

    def __init__(self, path: Path, key: str = "", *, writable: bool = False) -> None:
        self.path = path
        self.key = key
        self._writable = writable
        self._entry: Entry | None = None

    @classmethod
    def get(cls, cache: Cache | None = None) -> ToolRoot:
        """The tool root from the cache, built first if need be."""
        recipe = Recipe(
            "toolroot", "the tool root", 2, (SUITE, *PACKAGES, inspect.getsource(_build))
        )
        entry = (cache or Cache()).get(recipe, _build)
        root = cls(entry.path, recipe.key)
        root._entry = entry
        return root

    def command(
        self,
        argv: Sequence[str | Path],
        *,
        binds: Mapping[Path, str] | None = None,
        cwd: str = "/",
        parent: int = 0,
    ) -> list[str]:
        """The host command line that runs `argv` inside.

        Args:
            argv: the program, named as it is inside.
            binds: host folders and files, and where each is to be seen inside (below /rig or /tmp).
            cwd: the working directory inside.
            parent: the process that must be the program's parent when it starts, 0 for any.
        """
        access = "rw" if self._writable else "ro"
        pairs = [str(p) for host, inside in (binds or {}).items() for p in (host, inside)]
        head = ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", _ENTER]
        options = ["enter", str(self.path), access, str(parent), cwd]
        return [*head, *options, *pairs, "--", *map(str, argv)]

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        binds: Mapping[Path, str] | None = None,
        cwd: str = "/",
        timeout_s: float = 600,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        capture: bool = False,
    ) -> str:
        """Run a program inside to its end; its standard output if `capture` is set.

        Args:
            argv: the program, named as it is inside.
            binds: see `command`.
            cwd: the working directory inside.
            timeout_s: after this the program is killed.
            env: added to the environment.
            log: gets the command and what it writes; without, that is shown only on failure.
            capture: return standard output instead of logging it.

        Raises:
            ToolError: it failed, or took too long.
        """
        process = self.popen(
            argv,
            binds=binds,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if capture else subprocess.STDOUT,
            start_new_session=True,
        )
        late = False
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(process.pid, 9)
            out, err = process.communicate(timeout=30)
        except BaseException:
            os.killpg(process.pid, 9)
            process.wait(timeout=30)
            raise
        said = (err if capture else out) or b""
        line = " ".join(map(str, argv))
        if log is not None:
            with log.open("ab") as file:
                file.write(f"$ {line}\n".encode() + said)
        if late or process.returncode != 0:
            what = f"took over {timeout_s} s" if late else f"ended with {process.returncode}"
            tail = "" if log is not None else f":\n{said.decode(errors='replace')[-3000:]}"
            raise ToolError(f"{line}\n{what}{tail}")
        return bytes(out).decode() if capture else ""

    def popen(
        self,
        argv: Sequence[str | Path],
        *,
        binds: Mapping[Path, str] | None = None,
        cwd: str = "/",
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[bytes]:
        """Start a program inside; it is killed when this Python process ends, however it ends."""
        passed = {k: v for k, v in os.environ.items() if _PASSED_ON.search(k)}
        command = self.command(argv, binds=binds, cwd=cwd, parent=os.getpid())
        return _spawn(
            ["setpriv", "--pdeathsig", "KILL", *command],
            env={**passed, **_ENVIRONMENT, **(env or {})},
            **options,
        )


class ToolError(Exception):
    """A program of the tool root failed; the message has what it said."""


def _build(content: Path, log: Path) -> None:
    """Fill `content` with a Debian root that has all PACKAGES."""
    require_root()
    bootstrap = _bootstrap_program(log)
    _host([bootstrap, "--variant=minbase", SUITE, str(content)], log, timeout_s=1200)
    reach_settings(content)
    root = ToolRoot(content, writable=True)
    # A build that is cut short is thrown away: nothing need reach the disk at once.
    (content / "etc/dpkg/dpkg.cfg.d/unsafe-io").write_text("force-unsafe-io\n")
    root.run(["apt-get", "update"], log=log, timeout_s=600)
    install = ["apt-get", "install", "-y", "--no-install-recommends"]
    root.run([*install, *PACKAGES], log=log, timeout_s=1800)
    root.run(["apt-get", "clean"], log=log)
    for name in ("doc", "man", "locale"):
        shutil.rmtree(content / "usr/share" / name, ignore_errors=True)
    (content / "rig").mkdir()


def require_root() -> None:
    """Say early what would fail late."""
    if os.geteuid() != 0:
        raise PermissionError("the rig builds file systems and mounts: run it as root")


def reach_settings(root: Path) -> None:
    """Let apt inside `root` reach packages the way the host does: resolver, proxy, certificates."""
    if Path("/etc/resolv.conf").exists():
        target = root / "etc/resolv.conf"
        target.unlink(missing_ok=True)
        target.write_bytes(Path("/etc/resolv.conf").read_bytes())
    wanted = [_CA_BUNDLE] if _CA_BUNDLE.exists() else []
    for file in sorted(Path("/etc/apt").glob("apt.conf.d/*")):
        text = file.read_text(errors="replace") if file.is_file() else ""
        if _REACH.search(text):
            shutil.copy(file, root / "etc/apt/apt.conf.d" / file.name)
            wanted += [Path(p) for p in _FILE_OPTION.findall(text)]
    for path in wanted:
        inside = root / path.relative_to("/")
        if path.is_file() and not inside.exists():
            inside.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, inside)


def _bootstrap_program(log: Path) -> str:
    """The debootstrap of the host, installed if need be."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    found = shutil.which("debootstrap", path=path)
    if found is None:
        if shutil.which("apt-get") is None:
            raise ToolError("debootstrap is needed to build the tool root: please install it")
        with step("installing debootstrap"):
            _host(["apt-get", "update"], log, timeout_s=600)
            install = ["apt-get", "install", "-y", "--no-install-recommends"]
            _host([*install, "debootstrap", "gpgv", "debian-archive-keyring"], log)
        found = shutil.which("debootstrap", path=path)
    if found is None:
        raise ToolError("debootstrap is still missing after apt-get install")
    return found


def _host(argv: list[str], log: Path, timeout_s: float = 600) -> None:
    """Run a program of the host in a mount namespace of its own: debootstrap mounts things."""
    with log.open("ab") as file:
        file.write(f"$ {' '.join(argv)}\n".encode())
        file.flush()
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
        environment["PATH"] += ":/usr/sbin:/sbin"
        subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "--", *argv],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=True,
            env=environment,
        )


# The kernel sends the parent-death signal when the *thread* that forked ends. So all programs are
# started by one thread that lives as long as this process does, whoever asks.
_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="xshmd-rig-starter")


def _spawn(argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(argv, **options)

    return _starter.submit(start).result(timeout=60)
