# SPDX-License-Identifier: LGPL-2.1-or-later
"""Under the simulated hypercalls: whose pages are, who refers to them, what can never be broken."""

from __future__ import annotations

import dataclasses
import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from fakes.objects import Domain, ModelViolation, Page
from xshmd.machine import Arch, HostRange
from xshmd.units import (
    DOMID_FIRST_RESERVED,
    PAGE_SIZE,
    SUPERPAGE_ORDER,
    DomId,
    Gfn,
    Mfn,
    bytes_of,
    is_within,
)
from xshmd.xen.errno_table import failure

ZERO_UUID: Final = "00000000-0000-0000-0000-000000000000"
TABLE_SHIFTS: Final = (27, 18, 9)
"""One p2m table a level below the root, by how many frames it maps (as a power of two)."""
PLAIN_BAR: Final = HostRange(
    first_mfn=Mfn(0xC000000), nr_frames=1024, name="memory 2 of PCI device 0000:00:04.0"
)
"""Memory of the machine that is nobody's RAM."""
REGISTERS: Final = HostRange(
    first_mfn=Mfn(0xFEBFE), nr_frames=1, name="memory 0 of PCI device 0000:00:04.0",
    refusal="it is registers and not memory: it is not prefetchable",
)  # fmt: skip
CONTROL_DOMAIN: Final = DomId(0)


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One call of the port, before or after it was done."""

    kind: str
    ordinal: int
    """1 for the first call of this kind."""
    arguments: tuple[object, ...]


@dataclasses.dataclass(slots=True)
class Fault:
    """The n-th call of a kind from now on fails, without being done."""

    kind: str
    nth: int
    error: int | Exception
    sticky: bool = False


class SimulatedMap:
    """A mapping in the control domain: a reference on each page until it is closed."""

    def __init__(self, machine: Machine, pages: Sequence[Page], *, writable: bool) -> None:
        self._machine, self._pages, self._writable = machine, tuple(pages), writable
        for page in self._pages:
            page.references += 1

    def _pieces(self, offset_bytes: int, nr_bytes: int) -> Iterator[tuple[Page, int, int]]:
        if not self._pages:
            raise ValueError("the mapping is closed")
        if not is_within(offset_bytes, nr_bytes, bytes_of(len(self._pages))):
            raise ValueError(f"{nr_bytes} bytes at {offset_bytes} are outside the mapping")
        while nr_bytes:
            index, inside = divmod(offset_bytes, PAGE_SIZE)
            count = min(nr_bytes, PAGE_SIZE - inside)
            yield self._pages[index], inside, count
            offset_bytes, nr_bytes = offset_bytes + count, nr_bytes - count

    def read(self, offset_bytes: int, nr_bytes: int) -> bytes:
        return b"".join(
            page.read(inside, count) for page, inside, count in self._pieces(offset_bytes, nr_bytes)
        )

    def write(self, offset_bytes: int, data: bytes) -> None:
        pieces = list(self._pieces(offset_bytes, len(data)))
        if not self._writable:
            raise ModelViolation("SIGSEGV: a write through a read-only mapping")
        at = 0
        for page, inside, count in pieces:
            page.write(inside, data[at : at + count])
            at += count

    def decrement(self, offset_bytes: int) -> int | None:
        if offset_bytes % 4:
            raise ValueError(f"the word at {offset_bytes} is not aligned")
        left = int.from_bytes(self.read(offset_bytes, 4), "little")
        if left == 0:
            return None
        self.write(offset_bytes, (left - 1).to_bytes(4, "little"))
        return left - 1

    def wipe(self) -> None:
        """Fill it with zeros."""
        for page in self._pages:
            page.wipe()

    def close(self) -> None:
        pages, self._pages = self._pages, ()
        if pages:
            self._machine.drop_map(self, pages)


class Machine:
    """The machine and the rules every call keeps.  Calls are serialised, as Xen's own are by the
    domctl lock.

    Args:
        arch: Whose rules hold; x86 has a PV dom0.
        version: Which Xen's.
        total_pages: The machine's memory.
        dom0_pages: How much of it is dom0's.
    """

    def __init__(
        self,
        arch: Arch = Arch.X86_64,
        *,
        version: tuple[int, int] = (4, 20),
        total_pages: int = 1 << 20,
        dom0_pages: int = 1 << 18,
        gpaddr_bits: int | None = None,
    ) -> None:
        self.arch = arch
        self.version = version
        self.total_pages = total_pages
        self.free_pages = total_pages - dom0_pages
        self.gpaddr_bits = gpaddr_bits or (48 if arch is Arch.X86_64 else 40)
        self.next_domid = 1
        """Where the search for a free domid begins: set it to have one used again."""
        self.faults: list[Fault] = []
        self.before: Callable[[Call], None] = lambda call: None
        self.after: Callable[[Call], None] = lambda call: None
        self.on_domain_exception: Callable[[DomId], None] = lambda domid: None
        """VIRQ_DOM_EXC, which xenstored listens to: a domain has shut down or is destroyed."""
        self.on_run: Callable[[DomId], None] = lambda domid: None
        """A domain's vCPUs begin to run."""
        self.counts: dict[str, int] = {}
        self.log: list[Call] = []
        self.unwiped_frees = 0
        """Pages given back to the heap by a living domain with something in them."""
        self.leaked_references = 0
        """Arm: foreign pages added twice at one frame, which nothing ever gives back."""
        self.crashed: list[DomId] = []
        self.host_memory: tuple[HostRange, ...] = (REGISTERS, PLAIN_BAR)
        self.command_line = ""
        """Xen's."""
        self.granted_maps: set[SimulatedMap] = set()
        """What guests have mapped by grant references."""
        self.open_maps: set[SimulatedMap] = set()
        """The control domain's mappings."""
        self._lock = threading.RLock()
        self.by_domid: dict[DomId, Domain] = {}
        dom0 = Domain(
            domid=CONTROL_DOMAIN, uuid=ZERO_UUID, hvm=arch is Arch.ARM64, hap=arch is Arch.ARM64,
            max_pages=dom0_pages, pauses=0, creation_finished=True, cpu_time_ns=10**9,
            overhead_pages=dom0_pages,
        )  # fmt: skip
        self.by_domid[CONTROL_DOMAIN] = dom0
        self.check()

    # -- plumbing -------------------------------------------------------------------------------

    @contextmanager
    def _call(self, kind: str, *arguments: object) -> Iterator[None]:
        with self._lock:
            self.counts[kind] = self.counts.get(kind, 0) + 1
            call = Call(kind, self.counts[kind], arguments)
            self.before(call)
            self.log.append(call)
            self._inject(kind, arguments)
            try:
                yield
            finally:
                self._check_conservation()
            self.after(call)

    def _inject(self, kind: str, arguments: tuple[object, ...]) -> None:
        for fault in tuple(self.faults):
            if fault.kind != kind:
                continue
            fault.nth -= 1
            if fault.nth > 0:
                continue
            if not fault.sticky:
                self.faults.remove(fault)
            if isinstance(fault.error, Exception):
                raise fault.error
            domid = arguments[0] if arguments and isinstance(arguments[0], int) else None
            raise failure(kind, DomId(domid) if domid is not None else None, fault.error)

    def fail(
        self, kind: str, error: int | Exception, *, nth: int = 1, sticky: bool = False
    ) -> None:
        """Let the n-th call of this kind from now on fail with an errno or exception."""
        self.faults.append(Fault(kind, nth, error, sticky))

    def _domain(self, domid: DomId, call: str) -> Domain:
        if not 0 <= domid < DOMID_FIRST_RESERVED:
            raise ValueError(f"{domid} is not the domid of a domain")
        domain = self.by_domid.get(domid)
        if domain is None:
            raise failure(call, domid, errno.ESRCH)
        return domain

    def _check_conservation(self) -> None:
        owned = sum(
            len(domain.pages) + domain.pool_pages + domain.overhead_pages
            for domain in self.by_domid.values()
        )
        if owned + self.free_pages != self.total_pages or self.free_pages < 0:
            raise ModelViolation(
                f"{owned} pages owned and {self.free_pages} free are not {self.total_pages}"
            )

    def check(self) -> None:
        """Check everything about references: slow, for the end of a test."""
        with self._lock:
            self._check_conservation()
            seen: dict[Page, int] = {}
            for domain in self.by_domid.values():
                for entry in domain.p2m.values():
                    if entry.foreign:
                        seen[entry.page] = seen.get(entry.page, 0) + 1
                    elif entry.page.owner is not domain:
                        raise ModelViolation("RAM of a domain that another owns")
            for mapping in (*self.open_maps, *self.granted_maps):
                for page in mapping._pages:
                    seen[page] = seen.get(page, 0) + 1
            lost = 0
            for domain in self.by_domid.values():
                for page in domain.pages:
                    lost += page.references - seen.pop(page, 0)
                    if not page.allocated and not page.references:
                        raise ModelViolation("a page that nobody refers to is not free")
            if seen or lost != self.leaked_references:
                raise ModelViolation(f"{lost} references lost, {len(seen)} to pages not owned")

    # -- pages ----------------------------------------------------------------------------------

    def _put(self, page: Page) -> None:
        """asm/mm.c put_page(): the last one frees."""
        if page.references <= 0:
            raise ModelViolation("a reference put that was never taken")
        page.references -= 1
        self._free_if_unused(page)

    def _free_if_unused(self, page: Page) -> None:
        if page.references or page.allocated:
            return
        owner = page.owner
        owner.pages.remove(page)
        self.free_pages += 1
        if not owner.dying and page.touched:
            # page_alloc.c free_domheap_pages(): scrubbed only if its owner is dying.
            self.unwiped_frees += 1
        self._complete_if_unused(owner)

    def _give_up(self, page: Page) -> None:
        """put_page_alloc_ref()"""
        page.allocated = False
        self._free_if_unused(page)

    def drop_map(self, mapping: SimulatedMap, pages: Sequence[Page]) -> None:
        """Undo a mapping of the control domain, or one that a guest has by grants."""
        with self._lock:
            self.open_maps.discard(mapping)
            self.granted_maps.discard(mapping)
            for page in pages:
                self._put(page)
            self._check_conservation()

    def close_maps(self) -> None:
        """What the kernel does to a process that dies."""
        for mapping in tuple(self.open_maps):
            mapping.close()

    # -- p2m ------------------------------------------------------------------------------------

    def _table(self, domain: Domain, shift: int, gfn: int) -> bool:
        """Have a table for this frame; False if the pool is exhausted (hap_alloc_p2m_page)."""
        key = (shift, gfn >> shift)
        if key in domain.tables:
            return True
        if domain.pool_in_use >= domain.pool_pages:
            return False
        domain.tables.add(key)
        return True

    def _tables(self, domain: Domain, gfn: int, *, leaf: bool) -> bool:
        wanted = TABLE_SHIFTS if leaf else TABLE_SHIFTS[:-1]
        if not all(self._table(domain, shift, gfn) for shift in wanted):
            return False
        if leaf:
            domain.superpages.discard(gfn >> SUPERPAGE_ORDER)
        return True

    def _remove_entry(self, domain: Domain, gfn: int) -> int:
        """Unhook one frame; returns 0 or an errno.  A superpage is split, which takes a table."""
        if gfn not in domain.p2m:
            return errno.ENOENT
        if not self._tables(domain, gfn, leaf=True):
            return errno.ENOMEM
        entry = domain.p2m.pop(gfn)
        if entry.foreign:
            self._put(entry.page)  # arch/x86/mm/p2m.c p2m_entry_modify(), arm p2m_put_l3_page()
        return 0

    def _guest_remove_page(self, domain: Domain, gfn: int) -> int:
        """common/memory.c guest_remove_page(), of a frame that is there: 0 or an errno."""
        entry = domain.p2m[gfn]
        if entry.page.owner is not domain:
            return errno.ENXIO  # get_page(page, d) fails: "Bad page free"
        code = self._remove_entry(domain, gfn)
        if not code:
            self._give_up(entry.page)
        return code

    def _mappable(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> list[Page]:
        call = "xenforeignmemory_map"
        domain = self._domain(domid, call)
        found = []
        for gfn in range(first_gfn, first_gfn + nr_frames):
            page = self._page_for_dom0(domain, gfn)
            if page is None:
                raise failure(call, domid, errno.EINVAL, first_gfn=first_gfn)
            found.append(page)
        return found

    def _page_for_dom0(self, domain: Domain, gfn: int) -> Page | None:
        entry = domain.p2m.get(gfn)
        if entry is None:
            return None
        # arch/arm/mm.c xenmem_add_to_physmap_one(): p2m_is_ram() only.  A PV dom0 on x86 may,
        # since get_page_from_l1e() asks xsm_priv_mapping(guest, holder): the target again.
        if entry.foreign and (self.arch is Arch.ARM64 or domain.target is not entry.page.owner):
            return None
        return entry.page

    def _complete_if_unused(self, domain: Domain) -> None:
        """common/domain.c domain_destroy(), complete_domain_destroy(): the last reference."""
        if not domain.dying or domain.pages or domain.targeted_by:
            return
        if self.by_domid.pop(domain.domid, None) is None:
            return
        self.free_pages += domain.overhead_pages + domain.pool_pages
        if domain.target is not None:
            domain.target.targeted_by -= 1
            self._complete_if_unused(domain.target)
