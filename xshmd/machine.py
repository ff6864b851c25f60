# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is known of the machine, of the Xen on it and of Xen's domains: as each is told, unjudged.

What a domain is to us (a guest, a holder) is in :mod:`xshmd.model`.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Final

from xshmd.units import PAGE_SIZE, DomId, Mfn


class Arch(enum.StrEnum):
    """The architecture of the machine Xen runs on."""

    X86_64 = "x86_64"
    ARM64 = "arm64"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DomainInfo:
    """A domain as XEN_DOMCTL_getdomaininfo reports it."""

    domid: DomId
    uuid: str
    hvm: bool
    hap: bool
    paused: bool
    shut_down: bool
    shutdown_reason: int
    """SHUTDOWN_*: 0 poweroff, 1 reboot, 2 suspend, 3 crash, 4 watchdog, 5 soft reset."""
    dying: bool
    """True only at the end of teardown: a domain being torn down still looks alive."""
    tot_pages: int
    max_pages: int
    max_vcpu_id: int
    nr_online_vcpus: int
    cpu_time_ns: int
    gpaddr_bits: int
    """Width of guest-physical addresses Xen can map for it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostInfo:
    """The machine and the Xen on it, as far as promises depend on them."""

    arch: Arch
    xen_version: tuple[int, int]
    xen_extra: str
    """What follows major.minor in ``xl info``'s xen_version, e.g. ``.4-pre``."""
    xen_command_line: str
    has_hvm: bool
    has_hap: bool
    free_pages: int
    total_pages: int

    @property
    def xen_text(self) -> str:
        return f"{self.xen_version[0]}.{self.xen_version[1]}{self.xen_extra}"

    @property
    def free_bytes(self) -> int:
        return self.free_pages * PAGE_SIZE


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostRange:
    """A range of the machine's own frames of which dom0 knows what it is."""

    first_mfn: Mfn
    nr_frames: int
    name: str
    """What it is, for people, e.g. ``memory 2 of PCI device 0000:00:04.0``."""
    refusal: str = ""
    """Why no guest may have it; empty: it is memory kept apart that a region may lie in."""
    hint: str = ""
    """What an admin can do about the refusal."""

    @property
    def end_mfn(self) -> int:
        """The first frame after it."""
        return self.first_mfn + self.nr_frames


class MemoryKind(enum.IntEnum):
    """What an entry of an x86 memory map is: types of ACPI's E820, and those of Xen's PVH ABI."""

    RAM = 1
    RESERVED = 2
    ACPI = 3
    NVS = 4
    UNUSABLE = 5
    DISABLED = 6
    PERSISTENT = 7


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryRange:
    """One entry of an x86 memory map, in bytes."""

    address: int
    size_bytes: int
    kind: int
    """A :class:`MemoryKind`, or whatever else stood there."""

    @property
    def end(self) -> int:
        """The first address after it."""
        return self.address + self.size_bytes


SHUTDOWN_POWEROFF: Final = 0
SHUTDOWN_REBOOT: Final = 1
SHUTDOWN_SUSPEND: Final = 2
SHUTDOWN_CRASH: Final = 3
SHUTDOWN_WATCHDOG: Final = 4
SHUTDOWN_SOFT_RESET: Final = 5
