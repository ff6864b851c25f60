# SPDX-License-Identifier: LGPL-2.1-or-later
"""What xshmd claims about Xen is tried on real Xen: this package boots it, on any machine.

The rig boots Debian 13's own Xen, with Linux as dom0, inside QEMU. `Machine` is the entry:

    with Machine("arm64", artefacts=Path("out")) as machine:
        print(machine.dom0.run("xl list").text)
"""

from integration.dom0 import Completed, Dom0, Dom0Error
from integration.machine import Machine

__all__ = ["Completed", "Dom0", "Dom0Error", "Machine"]
