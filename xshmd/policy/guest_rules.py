# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which guests on which hosts can have regions at all.

"facts" in the sources below is reference/xen-and-libxl-facts.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from xshmd.machine import Arch, HostInfo
from xshmd.model import GuestConfig, GuestType, Place
from xshmd.policy.findings import Findings, refused

XEN_FLOOR: Final = {Arch.X86_64: (4, 19), Arch.ARM64: (4, 18)}
"""The first Xen with which this works at all (facts, section 0.1; DESIGN section 2, rule 4)."""


def xen_too_old(config: GuestConfig, host: HostInfo) -> Findings:
    """Xen must let dom0 map foreign pages into a guest.

    x86 before 4.19: arch_acquire_resource_check() answers EPERM for every domU (facts 0.1).  Arm
    before 4.18: a guest's paging pool is not what we expect (facts, section 1, step 3).
    """
    floor = XEN_FLOOR[host.arch]
    if host.xen_version < floor:
        yield refused(
            "xen-too-old",
            _place(config),
            f"Xen {host.xen_text} cannot share memory with a guest on {host.arch}",
            f"run Xen {floor[0]}.{floor[1]} or later",
            xen=host.xen_text,
        )


def no_hap_here(config: GuestConfig, host: HostInfo) -> Findings:
    """Without hardware-assisted paging every guest has shadow paging: see :func:`shadow_paging`."""
    if not (host.has_hvm and host.has_hap):
        yield refused(
            "no-hap-here",
            _place(config),
            "this machine has no hardware-assisted paging, without which no memory can be shared",
            "enable VT-x with EPT, or AMD-V with NPT, in the machine's firmware",
        )


def pv_guest(config: GuestConfig, arch: Arch) -> Findings:
    """A PV guest has no second-stage table to map anything into.

    xatp_permission_check answers EACCES for domains that are not translated (facts, section 4).
    The published series refused all of x86 (seeds A17): there it is this one type only.
    """
    if config.guest_type is GuestType.PV:
        yield refused(
            "pv-guest",
            _place(config),
            f"guest '{config.name}' is a PV guest, whose memory xshmd cannot map anything into",
            'say type="pvh" or type="hvm"; on x86 xl makes a guest without a type a PV guest',
        )


def shadow_paging(config: GuestConfig, arch: Arch) -> Findings:
    """Shadow paging takes foreign frames for bad ones (mm/shadow/multi.c; facts 0.7)."""
    if not config.hap:
        yield refused(
            "shadow-paging",
            _place(config),
            f"guest '{config.name}' has hap=0: shadow paging cannot use shared memory",
            "remove hap=0" if arch is Arch.X86_64 else "remove hap=0: Arm has nothing else",
        )


def altp2m(config: GuestConfig, arch: Arch) -> Findings:
    """p2m_add_foreign answers EPERM while altp2m is active (mm/p2m-basic.c; facts, section 4)."""
    if config.altp2m:
        yield refused(
            "altp2m",
            _place(config),
            f"guest '{config.name}' has altp2m, with which Xen maps no shared memory",
            "remove altp2m (and altp2mhvm)",
        )


def nested_hvm(config: GuestConfig, arch: Arch) -> Findings:
    """p2m_add_foreign answers EPERM for guests with nested HVM (mm/p2m-basic.c; facts, 4)."""
    if config.nestedhvm:
        yield refused(
            "nested-hvm",
            _place(config),
            f"guest '{config.name}' has nestedhvm=1, with which Xen maps no shared memory",
            "remove nestedhvm",
        )


HOST_RULES: tuple[Callable[[GuestConfig, HostInfo], Findings], ...] = (xen_too_old, no_hap_here)
"""Those that need a running Xen."""
GUEST_RULES: tuple[Callable[[GuestConfig, Arch], Findings], ...] = (
    pv_guest,
    shadow_paging,
    altp2m,
    nested_hvm,
)


def _place(config: GuestConfig) -> Place:
    # What concerns a whole guest matters for its first entry's sake: without any, all is well.
    return config.requests[0].place
