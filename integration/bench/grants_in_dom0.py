#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What grants cost, measured in dom0 next to C programs that do the same and nothing else.

grants_in_dom0.py PAIRS
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xshmd.engine.holders import enlarge_paging_pool
from xshmd.model import Holder, Piece
from xshmd.policy import grants
from xshmd.policy.identity import new_holder_uuid
from xshmd.units import DOMID_0, DomId, Gfn
from xshmd.xen.hypervisor import XenHypervisor

if TYPE_CHECKING:
    from integration.bench.in_dom0 import HERE, HOLDER_GFN, Loop, Series, note, timed, turned
else:  # beside this file, in dom0
    sys.path.insert(0, str(Path(__file__).parent))
    from in_dom0 import HERE, HOLDER_GFN, Loop, Series, note, timed, turned

FRAMES: Final = 16384
"""64 MiB."""
NODE: Final = "/local/domain/0/xshm/bench"
HELPER: Final = "/rig/guests/xshm-guest"


def granting(xen: XenHypervisor) -> Holder:
    """A new domain that owns 64 MiB, and can grant them once."""
    uuid = new_holder_uuid()
    nr_grant_frames = grants.USUAL_TABLE_FRAMES
    domid = xen.create_holder_domain(uuid, nr_grant_frames=nr_grant_frames)
    enlarge_paging_pool(xen, domid, [FRAMES])
    xen.set_max_pages(domid, FRAMES)
    xen.populate(domid, HOLDER_GFN, FRAMES)
    xen.set_max_pages(domid, 0)
    return Holder(
        uuid=uuid, domid=domid, next_gfn=Gfn(HOLDER_GFN + FRAMES), nr_grant_frames=nr_grant_frames
    )


def attach(xen: XenHypervisor, holder: Holder, guest: DomId) -> None:
    """What xshmd does for a guest, but for its records."""
    piece = Piece(
        holder_uuid=holder.uuid, holder_first_gfn=HOLDER_GFN, offset_frames=0, nr_frames=FRAMES
    )
    for one in grants.allot("bench", piece, holder, ()):
        first_gfn = Gfn(HOLDER_GFN + one.offset_frames)
        xen.write_grants(
            holder.domid, one.first_ref, one.nr_frames, first_gfn, guest, readonly=False
        )


def measure(pairs: int) -> dict[str, Any]:
    """Write the entries of 64 MiB, and map them: by ours and by the C program."""
    loop, series = Loop(), Series()
    first_ref = grants.RESERVED_ENTRIES
    with XenHypervisor() as xen:
        for turn in range(pairs + 1):  # the first is to warm up
            holder = granting(xen)
            figures: dict[str, float] = {}
            # The table grows when it is first written to: that is Xen's own, and in no figure.
            xen.end_grants(holder.domid, first_ref, FRAMES)
            for name in turned(("attach", "grant_c"), turn):
                if name == "attach":
                    figures[name] = timed(partial(attach, xen, holder, DOMID_0))
                else:
                    figures[name], _ = loop.ask(
                        "grant", holder.domid, first_ref, HOLDER_GFN, FRAMES, DOMID_0
                    )
                xen.end_grants(holder.domid, first_ref, FRAMES)
            attach(xen, holder, DOMID_0)
            node = f"size={FRAMES << 12:#x} grants={holder.domid}:{first_ref}+{FRAMES}"
            subprocess.run(["xenstore-write", NODE, node], check=True)
            words = ["gntdev", str(holder.domid), str(first_ref), str(FRAMES)]
            commands = {
                "map_helper": [HELPER, "map", "-r", "bench"],
                "map_c": [str(HERE / "attach_loop"), *words],
            }
            for name in turned(("map_helper", "map_c"), turn):
                figures[name] = timed(partial(ran, commands[name]))
            assert xen.end_grants(holder.domid, first_ref, FRAMES) == 0
            xen.destroy(holder.domid)
            if turn:
                series.add(figures)
            note(f"grants {turn}/{pairs}: " + " ".join(f"{k}={v:.4f}" for k, v in figures.items()))
    subprocess.run(["xenstore-rm", "/local/domain/0/xshm"], check=True)
    return {"series": series.columns, "frames": FRAMES}


def ran(command: list[str]) -> None:
    """Run a program that maps all of it, and ends."""
    done = subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    assert done.stdout.startswith((b"mapped", b"ok")), done


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
