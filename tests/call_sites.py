# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make call-sites``: every place in the engine that asks something of the outside, and whether an
error was ever injected there.  Run in ``tests``: ``python3 -m call_sites [--step N]``.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import faults
from test_engine_faults import a_reboot, a_start, changes, creations

import xshmd.engine
from xshmd.machine import Arch
from xshmd.ports import Hypervisor, Store, StoreTransaction

ENGINE = Path(xshmd.engine.__file__).parent
NAMES = {
    name
    for port in (Hypervisor, Store, StoreTransaction)
    for name in vars(port)
    if not name.startswith("_") and name not in ("watch", "messages_sent")
}
HOLDS_A_PORT = ("xen", "store")


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class CallSite:
    """Where in the engine's source something is asked of Xen or xenstore."""

    file: str
    first_line: int
    last_line: int
    kind: str

    def __str__(self) -> str:
        return f"xshmd/engine/{self.file}:{self.first_line} {self.kind}"


def call_sites() -> Iterator[CallSite]:
    """Find every call of a port's method in the engine, made there or handed to the worker."""
    for path in sorted(ENGINE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            for asked in (node.func, *node.args):
                if isinstance(asked, ast.Attribute) and asked.attr in NAMES and _is_port(asked):
                    last = node.end_lineno or node.lineno
                    yield CallSite(path.name, node.lineno, last, asked.attr)


def _is_port(asked: ast.Attribute) -> bool:
    return ast.unparse(asked.value).rpartition(".")[2].lstrip("_").endswith(HOLDS_A_PORT)


def struck(step: int) -> set[tuple[str, int, str]]:
    """Sweep faults over every scenario; return the places in the engine they struck at."""
    found: set[tuple[str, int, str]] = set()
    for body in (creations, a_reboot, changes, a_start):
        for arch in Arch:
            faults.sweep(body, arch=arch, step=step, at_start=body is a_start, struck_at=found)
    return found


def main() -> int:
    """Sweep and print; return 1 if a place was not struck."""
    parser = argparse.ArgumentParser(prog="call_sites", description=__doc__)
    parser.add_argument("--step", type=int, default=1, help="every how manieth fault")
    options = parser.parse_args()
    sites = sorted(set(call_sites()))
    hits = struck(options.step)
    uncovered = [
        site
        for site in sites
        if not any(
            (file, kind) == (site.file, site.kind) and site.first_line <= line <= site.last_line
            for file, line, kind in hits
        )
    ]
    for site in sites:
        print(f"{'not struck' if site in uncovered else 'struck':<12}{site}")
    print(f"{len(sites)} call sites, {len(uncovered)} not struck")
    return 1 if uncovered else 0


if __name__ == "__main__":
    sys.exit(main())
