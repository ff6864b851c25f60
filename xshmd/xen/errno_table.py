# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an errno of a hypercall means to an admin: one table, so that all say it the same.

Meanings are those of Xen 4.18 to 4.22; where one errno means two things, the call decides.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from xshmd.errors import DomainGone, Fact, HypercallFailed, XenUnavailable
from xshmd.units import DomId

ANY_CALL: Final = ""
_POOL: Final = (
    "the guest's paging pool is too small: say a larger shadow_memory in its configuration"
)

_HINTS: Final[dict[tuple[str, int], str]] = {
    (ANY_CALL, errno.ESRCH): "the domain has ended meanwhile",
    (ANY_CALL, errno.EPERM): "run as root in the control domain",
    (ANY_CALL, errno.ENOMEM): "the host is out of free memory: `xl info` shows free_memory",
    (ANY_CALL, errno.ENOSYS): "this Xen was built without what is needed: see `xshmctl doctor`",
    # xen/common/memory.c, arch_acquire_resource_check(), xsm_map_gmfn_foreign()
    ("XENMEM_add_to_physmap_batch", errno.EPERM): (
        "the guest has altp2m or nested HVM on, its target is not the holder, or this is an x86 "
        "Xen older than 4.19"
    ),
    ("XENMEM_add_to_physmap_batch", errno.EACCES): 'PV guests cannot have regions: use type="pvh"',
    ("XENMEM_add_to_physmap_batch", errno.EINVAL): (
        "the holder has no page there any more, or the guest's address is too wide for this host"
    ),
    # p2m_add_foreign() -> guest_remove_page(), xen/arch/x86/mm/p2m.c
    ("XENMEM_add_to_physmap_batch", errno.ENXIO): "something is mapped at that frame already",
    # What an empty paging pool is called on x86, and on Arm (xen/arch/arm/mmu/p2m.c,
    # __p2m_set_entry()).
    ("XENMEM_add_to_physmap_batch", errno.ENOMEM): _POOL,
    ("XENMEM_add_to_physmap_batch", errno.ENOENT): _POOL,
    ("XENMEM_add_to_physmap_batch", errno.ENODATA): "Xen reported success and did nothing",
    (
        "xc_domain_set_target",
        errno.EINVAL,
    ): "the guest has a target already, which can never be changed",
    ("xc_domain_set_target", errno.EOPNOTSUPP): "the target is not an HVM domain",
    # xen/common/domctl.c: dom0 itself has no right to these frames.  Those are, on x86, the APICs,
    # unusable memory and HyperTransport's range (arch/x86/dom0_build.c dom0_setup_permissions());
    # on Arm, all that is no device of dom0's: /reserved-memory too (arch/arm/device.c).
    ("xc_domain_iomem_permission", errno.EPERM): (
        "Xen does not let dom0 hand out this host memory: name a PCI device's memory, or on x86 a "
        "reserved range of the machine"
    ),
    # On x86 it is EINVAL whatever went wrong: libxenctrl leaves the errno of its own undoing.
    ("xc_domain_memory_mapping", errno.EINVAL): _POOL,
    ("xc_domain_memory_mapping", errno.ENOENT): _POOL,
    # drivers/xen/gntalloc.c of Linux
    ("IOCTL_GNTALLOC_ALLOC_GREF", errno.ENOSPC): (
        "dom0's kernel lends no more: raise /sys/module/xen_gntalloc/parameters/limit"
    ),
    ("IOCTL_GNTALLOC_ALLOC_GREF", errno.ENOMEM): "dom0's own memory is too small",
    ("xc_domain_pause", errno.EOVERFLOW): "the domain has been paused 255 times and never unpaused",
}


def failure(
    call: str, domid: DomId | None, code: int, **facts: Fact
) -> HypercallFailed | XenUnavailable:
    """Return the exception for ``call`` having failed with the positive errno ``code``."""
    text = os.strerror(code) if code else "no errno was left"
    # A domctl or sysctl of another interface version is answered with EACCES and nothing else
    # (xen/common/domctl.c), whatever was asked for.
    if code == errno.EACCES and call.startswith("xc_"):
        return XenUnavailable(
            f"{call} was refused: xshmd was built for another version of Xen",
            hint="rebuild or reinstall xshmd against the libxen-dev of the running Xen",
        )
    hint = _HINTS.get((call, code)) or _HINTS.get((ANY_CALL, code), "")
    whom = "" if domid is None else f" on domain {domid}"
    message = f"{call}{whom} failed: {text}"
    kind = DomainGone if code == errno.ESRCH else HypercallFailed
    if domid is not None:
        facts["domid"] = domid
    return kind(message, call=call, errno=code, hint=hint, **facts)
