# SPDX-License-Identifier: LGPL-2.1-or-later
"""Dom0 and the headers both come from Debian's packages: how they are fetched is said once, here.

Which mirror they come from is not: that is the tool root's own configuration.
"""

from __future__ import annotations

from pathlib import Path

from integration.arch import Arch
from integration.toolroot import SUITE, ToolRoot

__all__ = ["SUITE", "unpack_debian"]


def unpack_debian(
    arch: Arch, tools: ToolRoot, into: Path, variant: str, packages: tuple[str, ...], log: Path
) -> None:
    """Make a Debian root out of `packages` and what they depend on."""
    # The kernel package wants to build an initramfs; ours is smaller and boots quicker. In an
    # unpacked root the question does not arise.
    no_initramfs = (
        'mkdir -p "$1/etc/initramfs-tools" && '
        'printf "update_initramfs=no\\n" > "$1/etc/initramfs-tools/update-initramfs.conf"'
    )
    tools.run(
        [
            "mmdebstrap",
            "--mode=root",
            "--format=directory",
            f"--variant={variant}",
            f"--arch={arch.debian}",
            '--aptopt=Acquire::Languages "none"',
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            "--dpkgopt=force-confold",
            # a build that is cut short is thrown away: nothing need reach the disk at once
            "--dpkgopt=force-unsafe-io",
            f"--essential-hook={no_initramfs}",
            *(f"--include={package}" for package in packages),
            SUITE,
            "/rig/out",
            "/etc/apt/sources.list",
        ],
        binds={into: "/rig/out"},
        log=log,
        timeout_s=1800,
    )
