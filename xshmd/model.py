# SPDX-License-Identifier: LGPL-2.1-or-later
"""The words of the project as records: what a configuration says, and what exists on the host.

Everything here is an immutable snapshot without behaviour that reaches outside: no I/O, no trio.
A *request* is what a guest's configuration says; a *region*, *holder* or *guest* is what exists.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Final

from xshmd.units import DomId, Gfn, bytes_of

MAX_REGION_ID_LENGTH: Final = 128
"""The longest id, as in the 2018 xl series (a dom0less device tree holds only 15 characters)."""


MAX_DOORBELLS: Final = 15
"""How many peers of a region can have doorbells: its control page has room for no more."""


DOMAIN_0: Final = "Domain-0"
"""What xl and xenstore call the control domain, which may be a member as a guest is."""


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


class GuestType(enum.StrEnum):
    """What kind of domain a configuration asks xl for."""

    PV = "pv"
    PVH = "pvh"
    HVM = "hvm"


class Lifetime(enum.StrEnum):
    """What ends a region."""

    OWNER = "owner"
    """It ends with its owner: it is withdrawn from the borrowers, each paused meanwhile, and freed.
    A reboot is not an end.  The default of a region with an owner (second source mail, section on
    owners that stop)."""
    MEMBERS = "members"
    """It is freed when its last member has ended; a reboot is not an end."""
    SYSTEM = "system"
    """It stays until an administrator removes it.  The default of a region without an owner."""


class Backing(enum.StrEnum):
    """Whose memory a region is."""

    HOLDER = "holder"
    """Fresh pages of a holder of ours."""
    HOST = "host"
    """A host-physical range kept out of Xen's allocator: a reserved carve-out or a device BAR."""
    DOM0 = "dom0"
    """The control domain's own memory, lent to one guest at a time; needs the grant transport."""


class Transport(enum.StrEnum):
    """Who maps a region into a guest."""

    PHYSMAP = "physmap"
    """xshmd does, before the guest's first instruction; the guest needs nothing."""
    GRANT = "grant"
    """The guest does, from grant references; Xen then enforces read-only."""


class Isolation(enum.StrEnum):
    """From whom a region is protected."""

    GROUP = "group"
    """The members of a share group trust each other with all of its regions."""
    SEALED = "sealed"
    """Nobody maps anything by himself: the holder's p2m is empty while a member runs."""
    REGION = "region"
    """Only its own members reach it; needs the grant transport."""


class DoorbellRoute(enum.StrEnum):
    """How rings go from guest to guest."""

    AUTO = "auto"
    """By event channels of their own where guests bind those and Xen lets them, else by dom0."""
    RELAYED = "relayed"
    """By dom0 alone, which counts them and can stop a guest that rings without end."""


class ProtEnforcement(enum.StrEnum):
    """What becomes of a protection that Xen cannot enforce."""

    REQUIRED = "required"
    """It is refused."""
    ADVISORY = "advisory"
    """The configuration's author knows that it binds nobody."""


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


UNPLACED: Final = Gfn(-1)
"""In a request: no frame was said, :mod:`xshmd.policy.placement` is to choose one."""
WHOLE_REGION: Final = 0
"""In a borrower's request: no size was said, it wants the region from its offset to its end."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RegionTerms:
    """What a region's definition says beyond its size; None where it leaves the choice to us."""

    prot: Prot = Prot.RW
    """The most that any member may have."""
    cache_policy: CachePolicy | None = None
    """None is the architecture's own."""
    lifetime: Lifetime | None = None
    """None: OWNER where there is one, else SYSTEM."""
    backing: Backing = Backing.HOLDER
    host_first_mfn: int | None = None
    """First machine frame, for the host backing alone."""
    transport: Transport = Transport.PHYSMAP
    isolation: Isolation | None = None
    """None: GROUP where that loses nothing."""
    prot_enforcement: ProtEnforcement = ProtEnforcement.REQUIRED
    doorbells: int = 0
    """How many peers can ring each other, and dom0; its last page is then the control page."""
    doorbell_route: DoorbellRoute = DoorbellRoute.AUTO

    @property
    def is_sealed(self) -> bool:
        """Whether its pages are a holder's and in no holder's p2m while a member runs."""
        ours = self.backing is Backing.HOLDER and self.transport is Transport.PHYSMAP
        return ours and self.isolation is Isolation.SEALED

    @property
    def is_lent(self) -> bool:
        """Whether its pages are the control domain's own."""
        return self.backing is Backing.DOM0


USUAL_TERMS: Final = RegionTerms()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RegionRequest:
    """One entry of a guest's ``static_shm``: this guest wants that region at this frame."""

    region_id: str
    first_gfn: Gfn
    """First frame of the guest at which the region appears; UNPLACED until it is chosen."""
    nr_frames: int
    """How many frames of the region this guest wants; WHOLE_REGION until that is known."""
    role: Role
    prot: Prot = Prot.RW
    offset_frames: int = 0
    """First frame *of the region* that this guest sees; only borrowers may say other than 0."""
    cache_policy: CachePolicy | None = None
    """Only an owner says it; None is the architecture's own."""
    terms: RegionTerms = USUAL_TERMS
    """Only an owner's count; its prot and cache_policy are those of the entry itself."""
    is_whole: bool = dataclasses.field(default=False, compare=False)
    """Whether it must be as large as the region, as the form it was written in knew no parts."""
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
    reserve: bool = True
    """Whether its own memory map is to say where its regions are; only x86 guests have one."""
    extended_regions: bool = True
    """Whether its kernel may map grants and others' pages in the free part of Arm's RAM banks."""
    requests: tuple[RegionRequest, ...] = ()
    place: Place = NOWHERE


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RegionConfig:
    """A region that a configuration defines apart from any guest: it belongs to the system."""

    region_id: str
    nr_frames: int
    terms: RegionTerms = USUAL_TERMS
    place: Place = NOWHERE


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A domain of ours that never runs and owns nothing but the pages of one share group."""

    uuid: str
    """Its handle in Xen: the only identity.  Carries our mark, see :mod:`xshmd.policy.identity`."""
    domid: DomId
    next_gfn: Gfn
    """First frame of the holder never used yet; frames are not used twice in a holder's life."""
    nr_grant_frames: int = 1
    """The most frames its grant table may have; with more than one it serves grants."""

    @property
    def serves_grants(self) -> bool:
        """Whether its regions are for guests that map grants; no guest may have it as target."""
        return self.nr_grant_frames > 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Consecutive frames of a region that are consecutive frames of one holder, too."""

    holder_uuid: str
    holder_first_gfn: Gfn
    offset_frames: int
    """The first of them in the region."""
    nr_frames: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Consecutive grant references that a guest has to frames of a region."""

    region_id: str
    holder_uuid: str
    """Whose references they are; empty: the control domain's own."""
    first_ref: int
    nr_frames: int
    """How many frames, and as many references."""
    offset_frames: int
    """The first of the frames in the region."""
    is_ended: bool = False
    """Nobody may map them any more, but the guest still has some of them mapped."""


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
    owner_came: bool = False
    """Whether the owner has had it yet: one that is still to come is not gone."""
    terms: RegionTerms = USUAL_TERMS
    from_file: bool = False
    """Whether a configuration file defines it apart from any guest: then it goes when no file does
    any more."""
    ready: bool = False
    """False while the frames are being populated and zeroed; an unready one is undone at start."""
    pieces: tuple[Piece, ...] = ()
    """Where its frames are if its members map grants: one grant table may be too small for all.
    The first of them is what ``holder_uuid`` and ``holder_first_gfn`` say."""
    kept: str = ""
    """The name by which the keeper has a sealed or lent region's pages; empty before they are
    made."""
    pause_us: int = 0
    """For how long a sealed region's group last stood still for it, in microseconds."""

    @property
    def size_bytes(self) -> int:
        return bytes_of(self.nr_frames)

    @property
    def parts(self) -> tuple[Piece, ...]:
        """Where all of its frames are; those that are in no holder are nowhere."""
        if self.terms.is_lent:
            return ()
        whole = Piece(
            holder_uuid=self.holder_uuid, holder_first_gfn=self.holder_first_gfn, offset_frames=0,
            nr_frames=self.nr_frames,
        )  # fmt: skip
        return self.pieces or (whole,)

    @property
    def holder_uuids(self) -> frozenset[str]:
        """The holders that have frames of it."""
        return frozenset(part.holder_uuid for part in self.parts)


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


class PeerState(enum.StrEnum):
    """What a peer is to those it shares a region with."""

    ABSENT = "absent"
    """Its domain is not there: it is being made, or awaited."""
    JOINED = "joined"
    """It has the region's memory."""
    READY = "ready"
    """It has said in the control page that it uses it."""
    LEFT = "left"
    """It had the region, and has it no more."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A guest's place among those that have a region."""

    region_id: str
    peer_id: int
    """The lowest that was free when it joined; its own for as long as it is a member."""
    ports: tuple[int, ...] = ()
    """Its event channel ports, by the id of the peer each rings; at its own id, dom0's."""
    is_ready: bool = False
    """Whether it says in the control page that it uses the region; not written down."""


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
    reserve: bool = True
    """Whether its own memory map is to say where its regions are."""
    reserved: tuple[tuple[Gfn, int], ...] = ()
    """First frame and number of frames of the ranges reserved for regions in its memory map."""
    grants: tuple[Grant, ...] = ()
    """The grant references that are, or are about to be, its own."""
    peers: tuple[Peer, ...] = ()
    """Its place in each region.  Those of regions it has no more keep ports, which only a guest
    itself can close, for the next."""
    ended_at: float = 0.0
    """The machine's uptime in seconds when a REBOOTING guest's domain ended; 0 otherwise."""
    failure: str = ""
    """Why a DOOMED guest is destroyed."""

    def peer(self, region_id: str) -> Peer | None:
        """Return its place in a region that it has; None before it has one."""
        if all(request.region_id != region_id for request in self.requests):
            return None
        return next((peer for peer in self.peers if peer.region_id == region_id), None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process of the control domain."""

    pid: int
    uid: int
    started: int = 0
    """When it began, in the kernel's ticks since the boot, as a pid comes again; 0: not known."""
    name: str = ""
    """What the kernel calls it, for people; a process may call itself anything."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A process that may have a region mapped in the control domain: no frame of it goes before."""

    lease_id: str
    """A random word."""
    region_id: str
    prot: Prot
    process: Process


class MapChange(enum.StrEnum):
    """Whether a guest's own memory map says where its regions are."""

    RESERVED = "reserved"
    """They are reserved ranges of it: an operating system leaves them alone."""
    UNCHANGED = "unchanged"
    """It says nothing of them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that exists, at one moment."""

    holders: tuple[Holder, ...] = ()
    regions: tuple[Region, ...] = ()
    guests: tuple[Guest, ...] = ()
    leases: tuple[Lease, ...] = ()
