#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Build the test guests: the rig must not depend on anybody's binary.

    build.py ARCH OUTDIR        ARCH is x86_64 or arm64

makes OUTDIR/baremetal and, if the environment's BUSYBOX names a static busybox
of that architecture, OUTDIR/linux.cpio.gz (needs a kernel of your own). MODULES
names a folder with that kernel's modules xen-gntdev.ko and xen-privcmd.ko.
"""

from __future__ import annotations

import gzip
import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEER = HERE.parent.parent / "xshmd/resources/guest"
"""The code that xshmd offers to guests; here it is used and tried."""
HELPERS = {
    "xshm-guest": (PEER / "xshm-guest.c",),
    "xshm-member": (HERE / "member.c",),
    "xshm-disk": (HERE / "linux_disk.c", HERE / "disk.c"),
}
"""Programs for the Linux guest, and what they are made of."""
HELPER_CFLAGS = "-std=gnu11 -O2 -g0 -Wall -Wextra -Werror -static -s -Wl,--build-id=none"

CFLAGS = """
    -std=gnu11 -Os -g0 -Wall -Wextra -Werror
    -ffreestanding -nostdlib -static -s -no-pie -fno-pic -fno-stack-protector
    -fno-asynchronous-unwind-tables -fno-tree-loop-distribute-patterns -mgeneral-regs-only
    -Wl,--build-id=none -Wl,-z,max-page-size=4096 -Wl,-z,noexecstack
"""

# One line an architecture: what `uname -m` says there, gcc's prefix elsewhere, its own flags.
ARCHES = {
    "x86_64": ("x86_64", "x86_64-linux-gnu-", "-m64 -mno-red-zone -fcf-protection=none"),
    "arm64": ("aarch64", "aarch64-linux-gnu-", "-mno-outline-atomics"),
}

# Major and minor of the devices an init needs before devtmpfs is there.
CONSOLE = (5, 1)


def tool(arch: str, name: str) -> str:
    """Return the machine's own gcc or objcopy, or the cross one, as the architecture needs."""
    machine, prefix, _ = ARCHES[arch]
    program = name if platform.machine() == machine else prefix + name
    if shutil.which(program) is None:
        package = "gcc" if program == name else f"gcc-{prefix.rstrip('-').replace('_', '-')}"
        sys.exit(f"build.py: no {program} here\nhint: apt-get install {package}")
    return program


def run(*command: str | Path) -> None:
    """Run a tool; if it fails it has said why."""
    if subprocess.run(command, check=False).returncode:
        sys.exit(1)


def build_baremetal(arch: str, out: Path) -> None:
    """Compile and link the bare-metal guest: an ELF image on x86, a flat Image on Arm."""
    board = HERE / arch
    run(
        tool(arch, "gcc"),
        *CFLAGS.split(),
        *ARCHES[arch][2].split(),
        f"-I{PEER}",
        f"-Wl,-T,{board / 'link.ld'}",
        "-o", out,
        board / "start.S", board / "board.c", HERE / "main.c", HERE / "disk.c",
        HERE / "map.c", HERE / "say.c",
        HERE / "bells.c", PEER / "xshm_peer.c",
    )  # fmt: skip
    if arch == "arm64":
        run(tool(arch, "objcopy"), "-O", "binary", out)


def cpio_entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """Return one member of a cpio archive in the `newc` form, the one kernels read."""
    path = name.encode() + b"\0"
    # fmt: off
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
    # fmt: on
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + path
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def build_helper(arch: str, sources: tuple[Path, ...], out: Path) -> None:
    """Compile a program for the Linux guest."""
    run(tool(arch, "gcc"), *HELPER_CFLAGS.split(), "-o", out, *sources)


def build_linux(busybox: Path, helpers: list[Path], modules: list[Path], out: Path) -> None:
    """Pack the Linux guest: busybox and our init; the same input gives the same bytes."""
    members = [cpio_entry(folder, stat.S_IFDIR | 0o755) for folder in ("bin", "dev", "proc", "sys")]
    members += [
        cpio_entry("dev/console", stat.S_IFCHR | 0o600, device=CONSOLE),
        cpio_entry("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()),
        *(
            cpio_entry(f"bin/{helper.name}", stat.S_IFREG | 0o755, helper.read_bytes())
            for helper in helpers
        ),
        *(cpio_entry(module.name, stat.S_IFREG | 0o644, module.read_bytes()) for module in modules),
        cpio_entry("init", stat.S_IFREG | 0o755, (HERE / "linux-init.sh").read_bytes()),
        cpio_entry("TRAILER!!!", 0),
    ]
    out.write_bytes(gzip.compress(b"".join(members), mtime=0))


def main() -> None:
    """Run from the command line."""
    if len(sys.argv) != 3 or sys.argv[1] not in ARCHES:
        sys.exit(f"usage: build.py {'|'.join(ARCHES)} OUTDIR")
    arch, outdir = sys.argv[1], Path(sys.argv[2])
    outdir.mkdir(parents=True, exist_ok=True)
    made = [outdir / "baremetal"]
    build_baremetal(arch, made[0])
    if busybox := os.environ.get("BUSYBOX"):
        helpers = [outdir / name for name in HELPERS]
        for helper in helpers:
            build_helper(arch, HELPERS[helper.name], helper)
        folder = os.environ.get("MODULES")
        modules = sorted(Path(folder).glob("*.ko")) if folder else []
        made += [*helpers, outdir / "linux.cpio.gz"]
        build_linux(Path(busybox), helpers, modules, made[-1])
    for path in made:
        print(f"{path} {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
