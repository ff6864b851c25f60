# SPDX-License-Identifier: LGPL-2.1-or-later
"""Plays on the model what was played on real Xen: ``python3 -m contract.compare ARCH < ANSWERS``.

Run in the directory ``tests``, on what ``python3 -m tests.contract.traces`` printed in a dom0.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

from fakes.hypervisor import SimulatedXen

from contract.traces import first_difference, played
from xshmd.machine import Arch


def differences(arch: Arch, lines: Iterable[str]) -> tuple[int, list[str]]:
    """Return how many traces there were, and a sentence for each that differs."""
    found, count = [], 0
    for line in lines:
        seed, answers = json.loads(line)
        count += 1
        model = SimulatedXen(arch, total_pages=1 << 18, dom0_pages=1 << 16)
        difference = first_difference(played(model, seed), answers)
        if difference:
            found.append(f"seed {seed}, {difference} (here: the model; there: Xen)")
    return count, found


def main(arch: str) -> int:
    """Compare; return 1 if anything differs or nothing was compared."""
    count, found = differences(Arch(arch), sys.stdin)
    for sentence in found:
        print(sentence)
    print(f"{count} traces compared, {len(found)} differ")
    return 0 if count and not found else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
