# SPDX-License-Identifier: LGPL-2.1-or-later
"""The words of the project as records: what a configuration says, and what exists on the host.

Everything here is an immutable snapshot without behaviour that reaches outside: no I/O, no trio.
A *request* is what a guest's configuration says; a *region*, *holder* or *guest* is what exists.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Final

from xshmd.units import PAGE_SIZE, DomId, Gfn, bytes_of

MAX_REGION_ID_LENGTH: Final = 128
"""The longest id, as in the 2018 xl series (a dom0less device tree holds only 15 characters)."""


class Role(enum.StrEnum):
    """What a guest is to a region.  A role, not page ownership: the pages are the holder's."""

    OWNER = "owner"
    BORROWER = "borrower"


class Prot(enum.StrEnum):
    """What a guest may do with a region's memory."""

    RW = "rw"
    RO = "ro"


class CachePolicy(enum.StrEnum):
    """How a region's memory is mapped; both names mean write-back cacheable, one per arch."""

    ARM_NORMAL = "ARM_normal"
    X86_NORMAL = "x86_normal"


class Arch(enum.StrEnum):
    """The architecture of the machine Xen runs on."""

    X86_64 = "x86_64"
    ARM64 = "arm64"


class GuestType(enum.StrEnum):
    """What kind of domain a configuration asks xl for."""

    PV = "pv"
    PVH = "pvh"
    HVM = "hvm"


class Lifetime(enum.StrEnum):
    """What ends a region."""

    MEMBERS = "members"
    """It is freed when its last member has ended; a reboot is not an end."""
    SYSTEM = "system"
    """It stays until an administrator removes it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in the user's own files something was said, for messages."""

    file: str
    """Path as the user wrote it, or a word such as ``xl command line``."""
    key: str = ""
    """The key or list entry within the file, e.g. ``static_shm[1]``."""
    line: int = 0
    """Line number from 1; 0 where unknown."""

    def __str__(self) -> str:
        at = f"{self.file}:{self.line}" if self.line else self.file
        return f"{at}: {self.key}" if self.key else at


NOWHERE: Final = Place(file="")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RegionRequest:
    """One entry of a guest's ``static_shm``: this guest wants that region at this frame."""

    region_id: str
    first_gfn: Gfn
    """First frame of the guest at which the region appears."""
    nr_frames: int
    """How many frames of the region this guest wants."""
    role: Role
    prot: Prot = Prot.RW
    offset_frames: int = 0
    """First frame *of the region* that this guest sees; only borrowers may say other than 0."""
    cache_policy: CachePolicy | None = None
    """Only an owner says it; None is the architecture's own."""
    place: Place = NOWHERE

    @property
    def size_bytes(self) -> int:
        return bytes_of(self.nr_frames)

    @property
    def end_gfn(self) -> Gfn:
        """The first frame after the request's last."""
        return Gfn(self.first_gfn + self.nr_frames)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GuestConfig:
    """What a guest's configuration says, as far as it matters to shared memory."""

    name: str
    uuid: str = ""
    """Lower case with dashes; empty where xl is left to choose one."""
    guest_type: GuestType = GuestType.PVH
    memory_mib: int = 0
    maxmem_mib: int = 0
    hap: bool = True
    altp2m: bool = False
    nestedhvm: bool = False
    requests: tuple[RegionRequest, ...] = ()
    place: Place = NOWHERE


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A domain of ours that never runs and owns nothing but the pages of one share group."""

    uuid: str
    """Its handle in Xen: the only identity.  Carries our mark, see :mod:`xshmd.policy.identity`."""
    domid: DomId
    next_gfn: Gfn
    """First frame of the holder never used yet; frames are not used twice in a holder's life."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Memory that exists: frames of one holder, under the name its members know it by."""

    region_id: str
    nr_frames: int
    holder_uuid: str
    holder_first_gfn: Gfn
    """Where in the holder the region's frames are."""
    lifetime: Lifetime = Lifetime.MEMBERS
    owner: str = ""
    """Name of the guest whose configuration says ``role=owner``; empty: it is the system's."""
    ready: bool = False
    """False while the frames are being populated and zeroed; an unready one is undone at start."""

    @property
    def size_bytes(self) -> int:
        return bytes_of(self.nr_frames)


class GuestState(enum.StrEnum):
    """How far the gate has come with a guest; written before the step it names is begun."""

    HELD = "held"
    """Seen, one pause taken by us; nothing else of it is ours yet."""
    ATTACHING = "attaching"
    """Its holder is chosen and its regions are being made; nothing of the guest is touched."""
    MAPPING = "mapping"
    """Its frames were seen to be empty; ``set_target`` and the maps may or may not be done."""
    ATTACHED = "attached"
    """All of its regions are there, and it is (or may be) running."""
    REBOOTING = "rebooting"
    """The domain ended itself and xl is expected to make it anew; its regions wait for it."""
    DOOMED = "doomed"
    """Its regions could not be given: it is being destroyed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A domain that has, is getting or awaits its regions, as recorded in xenstore."""

    domid: DomId
    uuid: str
    """Xen's handle of the domain when we first saw it."""
    name: str
    generation: str
    """A random word also written into the domain's own xenstore directory, which dies with it."""
    state: GuestState
    holder_uuid: str = ""
    """The holder that is, or is about to be, its target.  Once set never another."""
    requests: tuple[RegionRequest, ...] = ()
    ended_at: float = 0.0
    """Seconds since the epoch at which a REBOOTING guest's domain ended; 0 otherwise."""
    failure: str = ""
    """Why a DOOMED guest is destroyed."""


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
class Snapshot:
    """All that exists, at one moment."""

    holders: tuple[Holder, ...] = ()
    regions: tuple[Region, ...] = ()
    guests: tuple[Guest, ...] = ()


SHUTDOWN_POWEROFF: Final = 0
SHUTDOWN_REBOOT: Final = 1
SHUTDOWN_SUSPEND: Final = 2
SHUTDOWN_CRASH: Final = 3
SHUTDOWN_WATCHDOG: Final = 4
SHUTDOWN_SOFT_RESET: Final = 5
