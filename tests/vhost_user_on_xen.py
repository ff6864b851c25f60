# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a restricted /dev/xen/privcmd lets its holder map, said in dom0 of a real Xen.

python3 -m tests.vhost_user_on_xen DOMID GFN OTHER-DOMID OTHER-GFN GUEST-DOMID
"""

from __future__ import annotations

import os
import sys

from xshmd.units import PAGE_SIZE, DomId, Gfn
from xshmd.xen import device_maps
from xshmd.xen.windows import Window


def main() -> None:
    domid, gfn, other, other_gfn, guest = map(int, sys.argv[1:])
    fd = device_maps.open_restricted(DomId(domid))
    with Window(2 * PAGE_SIZE) as window:
        device_maps.map_frames(window, fd, DomId(domid), Gfn(gfn))
        word = int.from_bytes(window.view(PAGE_SIZE, 8), "little")
        print(f"mapped {word:#x}")
        window.withdraw()
        for denied, first_gfn in ((other, other_gfn), (guest, 0)):
            try:
                device_maps.map_frames(window, fd, DomId(denied), Gfn(first_gfn))
            except OSError as error:
                print(f"refused {error.errno}")
        try:
            device_maps.map_frames(window, fd, DomId(domid), Gfn(gfn + 0x100000))
        except OSError as error:
            print(f"absent {error.errno}")
        assert bytes(window.view()) == bytes(2 * PAGE_SIZE), "nothing of it is left"
    os.close(fd)


if __name__ == "__main__":
    main()
