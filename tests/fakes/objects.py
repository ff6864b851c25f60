# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the simulated machine consists of: pages, entries of a p2m, domains."""

from __future__ import annotations

import dataclasses
from typing import Final

from xshmd.machine import MemoryRange
from xshmd.units import PAGE_SIZE, DomId

DOMAIN_OVERHEAD_PAGES: Final = 24
"""struct domain, vcpu, shared_info, grant table: given back by complete_domain_destroy()."""
GARBAGE: Final = 0xA5
"""What a fresh page is full of: page_alloc.c scrubs only what dying domains leave behind."""
X86_FIRST_POOL_PAGES: Final = 256
"""arch/x86/mm/hap/hap.c hap_enable()"""
X86_FIXED_POOL_PAGES: Final = 12
"""hap_enable(): the p2m's root, those of ten nested p2ms, and vCPU 0's monitor table."""


class ModelViolation(AssertionError):
    """The model, or who uses it, broke a rule that Xen itself can never break."""


class Page:
    """One machine page: common/page_alloc.c, asm/mm.h struct page_info."""

    __slots__ = ("allocated", "data", "owner", "references", "touched")

    def __init__(self, owner: Domain) -> None:
        self.owner = owner
        self.allocated = True
        """PGC_allocated: the reference the owner itself has."""
        self.references = 0
        """Those of others: foreign p2m entries, and mappings of the control domain."""
        self.data: bytearray | int = GARBAGE
        """Contents, or the byte it is full of."""
        self.touched = False
        """Something meant to be there was written and never wiped."""

    def read(self, offset: int, count: int) -> bytes:
        if isinstance(self.data, int):
            return bytes([self.data]) * count
        return bytes(self.data[offset : offset + count])

    def write(self, offset: int, data: bytes) -> None:
        if isinstance(self.data, int):
            self.data = bytearray([self.data]) * PAGE_SIZE
        self.data[offset : offset + len(data)] = data
        self.touched = self.touched or any(data)

    def wipe(self) -> None:
        self.data, self.touched = 0, False


@dataclasses.dataclass(slots=True)
class Entry:
    """A leaf of a p2m."""

    page: Page
    foreign: bool
    """p2m_map_foreign rather than p2m_ram_rw."""


@dataclasses.dataclass(slots=True, eq=False)
class GrantEntry:
    """An entry of a grant table, with what Xen knows of it (struct active_grant_entry)."""

    valid: bool = False
    """GTF_permit_access"""
    readonly: bool = False
    domid: int = 0
    gfn: int = 0
    readers: int = 0
    writers: int = 0
    pinned: Page | None = None
    """The page that is mapped by it, while one is."""

    @property
    def in_use(self) -> bool:
        return self.readers + self.writers > 0


@dataclasses.dataclass(slots=True, eq=False)
class Domain:
    """common/domain.c struct domain, as far as it matters here."""

    domid: DomId
    uuid: str
    hvm: bool = True
    hap: bool = True
    max_pages: int = 0
    max_vcpu_id: int = 0
    pages: set[Page] = dataclasses.field(default_factory=set)
    """tot_pages is their number: a page counts until its last reference is gone."""
    p2m: dict[int, Entry] = dataclasses.field(default_factory=dict)
    superpages: set[int] = dataclasses.field(default_factory=set)
    """Those of 2 MiB of the machine's own frames, which have no leaf table."""
    tables: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    pool_pages: int = 0
    """The paging pool's size, tables in use included."""
    pool_fixed: int = 0
    """Pages of the pool that are in use from the start."""
    pauses: int = 1
    creation_finished: bool = False
    shutdown_reason: int | None = None
    dying: bool = False
    """DOMDYING_dead: relinquished, and on the list for as long as anything refers to it."""
    target: Domain | None = None
    targeted_by: int = 0
    cpu_time_ns: int = 0
    altp2m: bool = False
    direct: dict[int, int] = dataclasses.field(default_factory=dict)
    """Frames of its p2m that are machine frames without an owner: p2m_mmio_direct(_dev)."""
    iomem: set[int] = dataclasses.field(default_factory=set)
    """Machine frames it has a right to: iomem_caps."""
    memory_map: tuple[MemoryRange, ...] = ()
    entry_register: int | None = None
    """vCPU 0's rbx; None while the vCPU is down."""
    overhead_pages: int = DOMAIN_OVERHEAD_PAGES
    max_grant_frames: int = 1
    grants: dict[int, GrantEntry] = dataclasses.field(default_factory=dict)

    @property
    def pool_in_use(self) -> int:
        return self.pool_fixed + len(self.tables)

    @property
    def running(self) -> bool:
        return self.pauses == 0 and self.shutdown_reason is None and not self.dying
