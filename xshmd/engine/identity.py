# SPDX-License-Identifier: LGPL-2.1-or-later
"""Proves that a domid is still the domain it was, right before something is done to that domain.

Xen gives a domid away again, and whatever is awaited in between takes time.  So this is asked last,
in the same breath as the call it is asked for: nothing may be awaited between the two.
"""

from __future__ import annotations

from xshmd.errors import DomainGone, HypercallFailed
from xshmd.machine import DomainInfo
from xshmd.model import Guest
from xshmd.ports import Hypervisor
from xshmd.units import DomId


def is_still(xen: Hypervisor, domid: DomId, uuid: str) -> bool:
    """Return whether the domain of this number is the one of this UUID, and not about to go."""
    info = xen.domain_info(domid)
    return info is not None and info.uuid == uuid and not info.dying


def verify(xen: Hypervisor, guest: Guest) -> DomainInfo:
    """Return the guest's domain; DomainGone unless its domid is still its own."""
    info = xen.domain_info(guest.domid)
    if info is None or info.uuid != guest.uuid or info.dying:
        raise DomainGone(
            f"guest {guest.name} ended: domain {guest.domid} is gone, or another by now",
            hint="nothing is left to be done for it",
            domid=guest.domid,
        )
    return info


def pause(xen: Hypervisor, guest: Guest) -> DomainInfo:
    """Pause a guest, and return its domain as it is from then on.

    Raises:
        DomainGone: it ended meanwhile, and with it any pause of ours.
        HypercallFailed: Xen did not do it, or would not tell; there is no pause of ours.
    """
    verify(xen, guest)
    xen.pause(guest.domid)
    try:
        return verify(xen, guest)
    except DomainGone:
        raise  # nothing is taken back from whoever has its number by now
    except HypercallFailed:
        xen.unpause(guest.domid)
        raise


def unpause(xen: Hypervisor, guest: Guest) -> None:
    """Give a pause of ours back; DomainGone if the guest is not there any more."""
    verify(xen, guest)
    xen.unpause(guest.domid)


def destroy(xen: Hypervisor, guest: Guest) -> None:
    """Destroy a guest's domain; DomainGone if it is not there any more."""
    verify(xen, guest)
    xen.destroy(guest.domid)
