# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the cases in dom0, on the Xen that is there: ``python3 -m tests.contract.on_xen [NAME...]``.

Needs nothing but xshmd and the standard library.  Leaves no domain behind.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from xshmd.errors import XshmError
from xshmd.units import DOMID_0
from xshmd.xen.hypervisor import XenHypervisor

from .cases import CASES
from .host import HOLDER_GFN, ContractHost, FreeMemory, Wrong

QUIET_S = 2.5
XENS_OWN_PAGES = 8
"""What Xen itself may keep for later of a run; a domain that leaks costs some thirty at least."""


def main(names: Sequence[str]) -> int:
    """Run the cases, all or those named; return the exit status."""
    chosen = [(name, case) for name, case in CASES if not names or name in names]
    unknown = set(names) - {name for name, _ in CASES}
    if unknown:
        print(f"no such case: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    passed = failed = 0
    with XenHypervisor() as xen:
        domains_before = {info.domid for info in xen.domains()}
        # dom0 may need pages of its own to map others', and keeps them: let it have them first.
        with ContractHost(xen) as make:
            xen.zero(make.holder(4096), HOLDER_GFN, 4096)
            granter = make.holder(1)
            xen.write_grants(granter, 8, 1, HOLDER_GFN, DOMID_0, readonly=True)
            xen.map_grants(granter, 8, 1, writable=False).close()
            xen.lend_pages(DOMID_0, xen.lendable_frames(), readonly=False).close()
        memory = FreeMemory(xen, QUIET_S)
        free_before = memory.settled()
        for name, case in chosen:
            began = time.monotonic()
            try:
                with ContractHost(xen, memory) as make:
                    case(xen, make)
            except (Wrong, XshmError, ValueError, AssertionError) as reason:
                failed += 1
                where = traceback.extract_tb(reason.__traceback__)
                lines = [
                    f"{Path(f.filename).name}:{f.lineno}" for f in where if "/cases/" in f.filename
                ]
                print(f"FAIL {name}: {type(reason).__name__}: {reason} ({lines[-1:]})")
            else:
                passed += 1
                took = time.monotonic() - began
                print(f"time {name}: {took:.2f} s")
            sys.stdout.flush()
        free_after = memory.settled()
        left = {info.domid for info in xen.domains()} - domains_before
        if left:
            failed += 1
            print(f"FAIL domains left behind: {sorted(left)}")
        if abs(free_after - free_before) > XENS_OWN_PAGES:
            failed += 1
            print(f"FAIL {free_before} pages were free before, {free_after} are now")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
