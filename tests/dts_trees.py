# SPDX-License-Identifier: LGPL-2.1-or-later
"""Small device trees for the tests, from the few words that differ between them."""

from __future__ import annotations

import subprocess
from pathlib import Path

DATA = Path(__file__).parent / "data" / "dts"


def shm(values: str, *, id: str = '"r0"', more: str = "", name: str = "shm") -> str:
    """Return a shared-memory node whose ``xen,shared-mem`` and ``xen,shm-id`` are these."""
    return (
        f'{name} {{ compatible = "xen,domain-shared-memory-v1"; xen,shm-id = {id};'
        f" xen,shared-mem = {values}; {more} }};"
    )


def domain(*nodes: str, name: str = "u1", more: str = "") -> str:
    return f'{name} {{ compatible = "xen,domain"; {more} {" ".join(nodes)} }};'


def tree(*nodes: str, cells: tuple[int, int] = (1, 1)) -> str:
    """Return the source of a tree with these nodes in /chosen."""
    return (
        "/dts-v1/;\n/ { chosen {"
        f" #address-cells = <{cells[0]}>; #size-cells = <{cells[1]}>;\n"
        + "\n".join(nodes)
        + "\n}; };\n"
    )


def compiled(source: str) -> bytes:
    command = ["dtc", "-qq", "-@", "-I", "dts", "-O", "dtb", "-"]
    done = subprocess.run(
        command, input=source.encode(), capture_output=True, timeout=20, check=True
    )
    return done.stdout


def decompiled(source: str) -> str:
    """Return what dtc makes of a source, as source again: proof that it is one."""
    command = ["dtc", "-I", "dtb", "-O", "dts", "-"]
    done = subprocess.run(
        command, input=compiled(source), capture_output=True, timeout=20, check=True
    )
    return done.stdout.decode()
