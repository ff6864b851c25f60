# SPDX-License-Identifier: LGPL-2.1-or-later
"""For which architecture files are looked at, where no Xen is there to ask."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable

from xshmd.config.forms import Form, form_of
from xshmd.errors import UsageError
from xshmd.machine import Arch

_MACHINES = {"x86_64": Arch.X86_64, "aarch64": Arch.ARM64}
"""What Linux calls them."""


def add_arch(parser: argparse.ArgumentParser) -> None:
    """Add the option."""
    parser.add_argument(
        "--arch",
        choices=[arch.value for arch in Arch],
        help="where the guests run (default: arm64 if a file is a device tree, else this machine)",
    )


def arch_of(said: str | None, files: Iterable[str]) -> Arch:
    """Return what ``--arch`` says, or else what there is to guess by.

    Only Arm has domains that are built from a device tree.
    """
    if said:
        return Arch(said)
    if any(form_of(file, b"") is Form.DTS for file in files):
        return Arch.ARM64
    machine = os.uname().machine
    if machine not in _MACHINES:
        raise UsageError(f"xshmd is not for {machine}", hint="say --arch")
    return _MACHINES[machine]
