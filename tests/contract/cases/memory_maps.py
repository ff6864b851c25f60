# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest is told of its memory, where there is such a thing."""

from __future__ import annotations

import errno

from xshmd.errors import DomainGone, HypercallFailed
from xshmd.machine import Arch, MemoryKind, MemoryRange
from xshmd.ports import Hypervisor

from ..host import ContractHost, equal, raises
from ..registry import case


@case
def a_vcpu_that_is_not_to_run_has_no_entry_register(xen: Hypervisor, make: ContractHost) -> None:
    equal(xen.entry_register(make.bare()), None, "rbx of a vCPU that is down")


@case
def only_x86_has_memory_maps(xen: Hypervisor, make: ContractHost) -> None:
    guest, ranges = make.bare(), [MemoryRange(0, 1 << 20, MemoryKind.RAM)]
    if make.arch is Arch.ARM64:
        with raises(HypercallFailed, errno.ENOSYS):
            xen.set_memory_map(guest, ranges)
        return
    xen.set_memory_map(guest, ranges)
    xen.set_memory_map(guest, ranges * 128)
    with raises(HypercallFailed, errno.EINVAL):
        xen.set_memory_map(guest, ranges * 129)
    with raises(DomainGone, errno.ESRCH):
        xen.set_memory_map(make.unused_domid(), ranges)
