# SPDX-License-Identifier: LGPL-2.1-or-later
"""A model of Xen's control interface: owned pages, references, p2m, pools, pauses, zombies.

It implements :class:`xshmd.ports.Hypervisor` and is held to real Xen by ``tests/contract``, which
runs unchanged on both; where they differ this file is wrong.  Each rule names the file of Xen 4.20
it is taken from.  Not modelled: TLBs and cache attributes, IOMMU, PoD, preemption, concurrency.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import Final

from fakes.hypercalls import SimulatedCalls
from fakes.machine import CONTROL_DOMAIN, SimulatedMap
from fakes.objects import DOMAIN_OVERHEAD_PAGES, Domain, Entry, ModelViolation, Page
from fakes.scatter import SimulatedCopies
from xshmd.errors import OutOfMemory, PartialMap, XshmError
from xshmd.machine import Arch, DomainInfo, HostInfo, HostRange, MemoryRange
from xshmd.units import (
    DOMID_FIRST_RESERVED,
    PAGE_SIZE,
    SUPERPAGE_FRAMES,
    SUPERPAGE_ORDER,
    DomId,
    Gfn,
    Mfn,
    bytes_of,
)
from xshmd.xen.errno_table import failure

PAUSE_LIMIT: Final = 255
"""common/domain.c _domain_pause_by_systemcontroller()"""
X86_FIRST_POOL_PAGES: Final = 256
"""arch/x86/mm/hap/hap.c hap_enable()"""
X86_FIXED_POOL_PAGES: Final = 12
"""hap_enable(): the p2m's root, those of ten nested p2ms, and vCPU 0's monitor table."""
X86_ZOMBIE_POOL_PAGES: Final = 11
"""hap_teardown(): the roots stay until hap_final_teardown()."""
ARM_FIRST_POOL_PAGES: Final = {(4, 17): 16}
"""arch/arm/p2m.c; none since 4.18."""
CACHEFLUSH_LIMIT: Final = 1 << 18
"""arch/arm/domctl.c XEN_DOMCTL_cacheflush: at most 1 << MAX_ORDER frames a call."""
E820_MAX: Final = 128
LOCAL_APIC_MFN: Final = 0xFEE00
PV_DOM0_UNMAPPABLE: Final = errno.EINVAL
READ_ONLY: Final = frozenset(
    {
        "host_info", "domain_info", "domains", "paging_pool_bytes", "populated_frames", "map_pages",
        "host_ranges", "entry_register", "grants_in_use", "map_grants",
    }
)  # fmt: skip
"""Calls after which the world is as it was."""


class SimulatedXen(SimulatedCalls, SimulatedCopies):
    """The model: what each call of the port does to the machine."""

    # -- facts ----------------------------------------------------------------------------------

    def host_info(self) -> HostInfo:
        with self._call("host_info"):
            return HostInfo(
                arch=self.arch, xen_version=self.version, xen_extra=".4",
                xen_command_line=self.command_line,
                has_hvm=True, has_hap=True,
                free_pages=self.free_pages, total_pages=self.total_pages,
            )  # fmt: skip

    def _info(self, domain: Domain) -> DomainInfo:
        """common/domctl.c getdomaininfo()"""
        return DomainInfo(
            domid=domain.domid, uuid=domain.uuid, hvm=domain.hvm, hap=domain.hap,
            paused=domain.pauses > 0, shut_down=domain.shutdown_reason is not None,
            # SHUTDOWN_CODE_INVALID (~0) through an 8-bit field
            shutdown_reason=0xFF if domain.shutdown_reason is None else domain.shutdown_reason,
            dying=domain.dying, tot_pages=len(domain.pages), max_pages=domain.max_pages,
            max_vcpu_id=domain.max_vcpu_id, nr_online_vcpus=0 if domain.hvm and domain.domid else 1,
            cpu_time_ns=domain.cpu_time_ns, gpaddr_bits=self.gpaddr_bits,
        )  # fmt: skip

    def domain_info(self, domid: DomId) -> DomainInfo | None:
        with self._call("domain_info", domid):
            if not 0 <= domid < DOMID_FIRST_RESERVED:
                raise ValueError(f"{domid} is not the domid of a domain")
            domain = self.by_domid.get(domid)
            return self._info(domain) if domain else None

    def domains(self) -> tuple[DomainInfo, ...]:
        with self._call("domains"):
            return tuple(self._info(self.by_domid[domid]) for domid in sorted(self.by_domid))

    # -- domains --------------------------------------------------------------------------------

    def _free_domid(self) -> DomId:
        """common/domctl.c XEN_DOMCTL_createdomain: the rover."""
        for step in range(DOMID_FIRST_RESERVED):
            domid = DomId((self.next_domid + step) % DOMID_FIRST_RESERVED)
            if domid != CONTROL_DOMAIN and domid not in self.by_domid:
                self.next_domid = domid + 1
                return domid
        raise failure("xc_domain_create", None, errno.ENOMEM)

    def make_domain(self, uuid: str, *, hvm: bool = True, hap: bool = True) -> Domain:
        """XEN_DOMCTL_createdomain, as a toolstack does it: paused once, and without memory."""
        with self._lock:
            pool = (
                X86_FIRST_POOL_PAGES
                if self.arch is Arch.X86_64
                else ARM_FIRST_POOL_PAGES.get(self.version, 0)
            )
            if self.free_pages < pool + DOMAIN_OVERHEAD_PAGES:
                raise failure("xc_domain_create", None, errno.ENOMEM)
            domain = Domain(
                domid=self._free_domid(), uuid=uuid, hvm=hvm, hap=hap, pool_pages=pool,
                pool_fixed=X86_FIXED_POOL_PAGES if self.arch is Arch.X86_64 else 0,
            )  # fmt: skip
            self.free_pages -= pool + DOMAIN_OVERHEAD_PAGES
            self.by_domid[domain.domid] = domain
            self._check_conservation()
            return domain

    def create_holder_domain(self, uuid: str, *, nr_grant_frames: int = 1) -> DomId:
        with self._call("create_holder_domain", uuid, nr_grant_frames):
            if nr_grant_frames < 1:  # common/grant_table.c grant_table_init()
                raise failure("xc_domain_create", None, errno.EINVAL)
            domain = self.make_domain(uuid)
            domain.max_grant_frames = nr_grant_frames
            return domain.domid

    def destroy(self, domid: DomId) -> None:
        with self._call("destroy", domid):
            domain = self._domain(domid, "xc_domain_destroy")
            if domid == CONTROL_DOMAIN:
                raise failure("xc_domain_destroy", domid, errno.EINVAL)
            self._kill(domain)

    def _kill(self, domain: Domain) -> None:
        """common/domain.c domain_kill(); arch domain_relinquish_resources()"""
        if domain.dying:
            return
        domain.dying = True
        kept = X86_ZOMBIE_POOL_PAGES if self.arch is Arch.X86_64 and domain.hvm else 0
        self.free_pages += domain.pool_pages - kept
        domain.pool_pages = kept
        self._release_mappings(domain)
        entries, domain.p2m = domain.p2m, {}
        for entry in entries.values():
            if entry.foreign:
                self._put(entry.page)  # relinquish_p2m_mapping(): foreign references first
        for page in tuple(domain.pages):
            self._give_up(page)
        self._complete_if_unused(domain)
        self.on_domain_exception(domain.domid)

    def pause(self, domid: DomId) -> None:
        with self._call("pause", domid):
            domain = self._domain(domid, "xc_domain_pause")
            if domid == CONTROL_DOMAIN:
                raise failure("xc_domain_pause", domid, errno.EINVAL)
            if domain.pauses >= PAUSE_LIMIT:
                raise failure("xc_domain_pause", domid, errno.EOVERFLOW)
            domain.pauses += 1

    def unpause(self, domid: DomId) -> None:
        with self._call("unpause", domid):
            domain = self._domain(domid, "xc_domain_unpause")
            if domain.pauses == 0:
                raise failure("xc_domain_unpause", domid, errno.EINVAL)
            domain.pauses -= 1
            if domain.pauses == 0:
                domain.creation_finished = True
                if domain.running:
                    domain.cpu_time_ns += 1000
                    self.on_run(domid)

    def shut_down(self, domid: DomId, reason: int) -> None:
        with self._call("shut_down", domid, reason):
            domain = self._domain(domid, "xc_domain_shutdown")
            if domain.shutdown_reason is None:  # domain_shutdown(): the first one counts
                domain.shutdown_reason = reason
                self.on_domain_exception(domid)

    def set_target(self, domid: DomId, target: DomId) -> None:
        """common/domctl.c XEN_DOMCTL_set_target: once, and the reference stays to the end."""
        with self._call("set_target", domid, target):
            domain = self._domain(domid, "xc_domain_set_target")
            if self.by_domid.get(target) is None:
                raise failure("xc_domain_set_target", domid, errno.ESRCH)
            wanted = self.by_domid[target]
            if domain is wanted:
                raise failure("xc_domain_set_target", domid, errno.EINVAL)
            if not wanted.hvm:
                raise failure("xc_domain_set_target", domid, errno.EOPNOTSUPP)
            if domain.target is not None:
                raise failure("xc_domain_set_target", domid, errno.EINVAL)
            domain.target = wanted
            wanted.targeted_by += 1

    def set_max_pages(self, domid: DomId, nr_pages: int) -> None:
        with self._call("set_max_pages", domid, nr_pages):
            self._domain(domid, "xc_domain_setmaxmem").max_pages = nr_pages

    def paging_pool_bytes(self, domid: DomId) -> int:
        with self._call("paging_pool_bytes", domid):
            return bytes_of(self._translated(domid, "xc_get_paging_mempool_size").pool_pages)

    def _translated(self, domid: DomId, call: str) -> Domain:
        domain = self._domain(domid, call)
        if not domain.hvm:  # arch/x86/mm/paging.c arch_get_paging_mempool_size()
            raise failure(call, domid, errno.EOPNOTSUPP)
        return domain

    def set_paging_pool_bytes(self, domid: DomId, size_bytes: int) -> None:
        """hap_set_allocation(), p2m_set_allocation(): stops where it cannot go on."""
        call = "xc_set_paging_mempool_size"
        with self._call("set_paging_pool_bytes", domid, size_bytes):
            domain = self._translated(domid, call)
            if size_bytes % PAGE_SIZE:
                raise failure(call, domid, errno.EINVAL)
            wanted = size_bytes // PAGE_SIZE
            if domain.dying and wanted > domain.pool_pages:
                # arch_set_paging_mempool_size() does not ask; what is given to a pool after
                # hap_teardown() or p2m_teardown_allocation() is never given back.
                raise ModelViolation(f"a pool for domain {domid}, which is dying")
            # "Failed to free enough": all that can be is freed all the same.
            reached = min(max(wanted, domain.pool_in_use), domain.pool_pages + self.free_pages)
            self.free_pages -= reached - domain.pool_pages
            domain.pool_pages = reached
            if reached != wanted:
                raise failure(call, domid, errno.ENOMEM)

    # -- a domain's own pages -------------------------------------------------------------------

    def _populate_extent(self, domain: Domain, gfn: int, order: int) -> bool:
        """common/memory.c populate_physmap(), one extent."""
        count = 1 << order
        if domain.dying or len(domain.pages) + count > domain.max_pages:
            return False  # page_alloc.c assign_pages()
        if self.free_pages < count:
            return False
        pages = [Page(domain) for _ in range(count)]
        domain.pages.update(pages)
        self.free_pages -= count
        if not self._tables(domain, gfn, leaf=not order):
            return False  # guest_physmap_add_page() fails: they stay its own, and are nowhere
        for offset, page in enumerate(pages):
            old = domain.p2m.get(gfn + offset)
            if old is not None and old.foreign and self.arch is Arch.X86_64:
                self._crash(domain)  # p2m_add_page(): p2m_is_special
                return False
            if old is not None and old.foreign:
                self._put(old.page)
            domain.p2m[gfn + offset] = Entry(page, foreign=False)
        if order:
            domain.tables.discard((SUPERPAGE_ORDER, gfn >> SUPERPAGE_ORDER))
        return True

    def _crash(self, domain: Domain) -> None:
        self.crashed.append(domain.domid)
        domain.shutdown_reason = 3

    def populate(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> None:
        with self._call("populate", domid, first_gfn, nr_frames):
            # XENMEM_populate_physmap says 0 extents, not ESRCH, of a domain that is not.
            domain = self.by_domid.get(domid)
            gfn, end = int(first_gfn), first_gfn + nr_frames
            done: list[int] = []
            while gfn < end:
                whole = gfn % SUPERPAGE_FRAMES == 0 and end - gfn >= SUPERPAGE_FRAMES
                if (
                    whole
                    and domain is not None
                    and self._populate_extent(domain, gfn, SUPERPAGE_ORDER)
                ):
                    done.extend(range(gfn, gfn + SUPERPAGE_FRAMES))
                    gfn += SUPERPAGE_FRAMES
                elif domain is not None and self._populate_extent(domain, gfn, 0):
                    done.append(gfn)
                    gfn += 1
                else:
                    if domain is not None:
                        self._free_frames(domain, first_gfn, nr_frames)
                    raise self._short(domid, nr_frames, len(done))

    @staticmethod
    def _short(domid: DomId, nr_frames: int, done: int) -> XshmError:
        return OutOfMemory(
            f"Xen gave {done} of the {nr_frames} frames wanted for the holder, domain {domid}",
            domid=domid,
            nr_frames=nr_frames,
        )

    def depopulate(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> int:
        """common/memory.c decrease_reservation(), stepping over what is not there."""
        with self._call("depopulate", domid, first_gfn, nr_frames):
            domain = self.by_domid.get(domid)
            if domain is None:
                return 0
            return self._free_frames(domain, first_gfn, nr_frames)

    def _free_frames(self, domain: Domain, first_gfn: int, nr_frames: int) -> int:
        freed = 0
        for gfn in range(first_gfn, first_gfn + nr_frames):
            if self._page_for_dom0(domain, gfn) is None:
                continue
            if self._guest_remove_page(domain, gfn):
                call = "xc_domain_decrease_reservation"
                raise failure(call, domain.domid, errno.EBUSY, first_gfn=gfn)
            freed += 1
        return freed

    def zero(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> None:
        with self._call("zero", domid, first_gfn, nr_frames):
            for page in self._mappable(domid, first_gfn, nr_frames):
                page.wipe()

    def flush(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> None:
        with self._call("flush", domid, first_gfn, nr_frames):
            self._domain(domid, "xc_domain_cacheflush")

    def populated_frames(self, domid: DomId, gfns: Sequence[Gfn]) -> tuple[Gfn, ...]:
        with self._call("populated_frames", domid, len(gfns)):
            domain = self.by_domid.get(domid)
            if domain is None:
                return ()
            return tuple(gfn for gfn in gfns if self._page_for_dom0(domain, gfn))

    def map_pages(
        self, domid: DomId, first_gfn: Gfn, nr_frames: int, *, writable: bool
    ) -> SimulatedMap:
        with self._call("map_pages", domid, first_gfn, nr_frames, writable):
            pages = self._mappable(domid, first_gfn, nr_frames)
            mapping = SimulatedMap(self, pages, writable=writable)
            self.open_maps.add(mapping)
            return mapping

    # -- a guest's frames -----------------------------------------------------------------------

    def map_foreign(
        self, guest: DomId, first_gfn: Gfn, holder: DomId, holder_gfn: Gfn, nr_frames: int
    ) -> None:
        with self._call("map_foreign", guest, first_gfn, holder, holder_gfn, nr_frames):
            call = "XENMEM_add_to_physmap_batch"
            domain = self._domain(guest, call)
            done: list[int] = []
            for index in range(nr_frames):
                gfn = first_gfn + index
                if not domain.hvm:
                    code = errno.EACCES  # xatp_permission_check()
                else:
                    code = self._add_foreign(domain, gfn, holder, holder_gfn + index)
                if not code:
                    done.append(gfn)
                    continue
                for undone in done:
                    self._remove_entry(domain, undone)
                raise PartialMap(
                    f"Xen refused to map the holder's frame {holder_gfn + index:#x} at frame "
                    f"{gfn:#x} of domain {guest}",
                    call=call, errno=code, domid=guest, first_gfn=gfn,
                )  # fmt: skip

    def _add_foreign(self, domain: Domain, gfn: int, holder: DomId, holder_gfn: int) -> int:
        """arch/x86/mm/p2m.c p2m_add_foreign(), arch/arm/mm.c xenmem_add_to_physmap_one()."""
        x86 = self.arch is Arch.X86_64
        if x86 and (self.version < (4, 19) or domain.altp2m):
            return errno.EPERM  # arch_acquire_resource_check()
        if holder == CONTROL_DOMAIN:
            return errno.EPERM  # rcu_lock_remote_domain_by_id(): the caller itself
        owner = self.by_domid.get(holder)
        if owner is None:
            return errno.ESRCH
        if owner is domain:
            return errno.EINVAL
        if domain.target is not owner:
            return errno.EPERM  # xsm_map_gmfn_foreign(XSM_TARGET, guest, holder)
        source = owner.p2m.get(holder_gfn)
        if source is None or source.foreign:
            return errno.EINVAL
        page = source.page
        if gfn in domain.direct and x86:
            self._crash(domain)  # set_typed_p2m_entry(): p2m_is_special
            return errno.EPERM
        old = domain.p2m.get(gfn)
        if old is not None and x86:
            # guest_remove_page(): frees the guest's RAM, and refuses what is not its own.
            code = self._guest_remove_page(domain, gfn)
            if code:
                return code
        if not self._tables(domain, gfn, leaf=True):
            # arch/arm/mmu/p2m.c __p2m_set_entry(): any failure to get a table is ENOENT there.
            return errno.ENOMEM if x86 else errno.ENOENT
        page.references += 1
        domain.direct.pop(gfn, None)
        domain.p2m[gfn] = Entry(page, foreign=True)
        if old is not None and not x86 and old.foreign:
            # __p2m_set_entry(): the old entry is put only if its frame is another.
            if old.page is page:
                self.leaked_references += 1
            else:
                self._put(old.page)
        # Arm does not free RAM it replaces: the page stays the guest's, and is nowhere.
        return 0

    def unmap(self, guest: DomId, first_gfn: Gfn, nr_frames: int) -> int:
        """common/memory.c XENMEM_remove_from_physmap: RAM is unhooked too, and not freed."""
        with self._call("unmap", guest, first_gfn, nr_frames):
            call = "XENMEM_remove_from_physmap"
            domain = self._domain(guest, call)
            removed = 0
            for gfn in range(first_gfn, first_gfn + nr_frames):
                code = self._remove_entry(domain, gfn)
                if code not in (0, errno.ENOENT):
                    raise failure(call, guest, code)
                removed += code == 0
            return removed

    # -- the machine's own frames ---------------------------------------------------------------

    def host_ranges(self) -> tuple[HostRange, ...]:
        with self._call("host_ranges"):
            return self.host_memory

    def _dom0_may(self, mfns: range) -> bool:
        """dom0's iomem_caps: arch/x86/dom0_build.c dom0_setup_permissions(), arch/arm/device.c"""
        if self.arch is Arch.X86_64:
            return LOCAL_APIC_MFN not in mfns and mfns.stop <= 1 << (self.gpaddr_bits - 12)
        devices = self.host_memory
        return any(one.first_mfn <= mfns.start and mfns.stop <= one.end_mfn for one in devices)

    def _permit(self, domid: DomId, mfns: range, *, allow: bool) -> Domain:
        """common/domctl.c XEN_DOMCTL_iomem_permission"""
        domain = self._domain(domid, "xc_domain_iomem_permission")
        if not self._dom0_may(mfns):
            raise failure("xc_domain_iomem_permission", domid, errno.EPERM)
        domain.iomem = domain.iomem | set(mfns) if allow else domain.iomem - set(mfns)
        return domain

    def map_host_range(self, guest: DomId, first_gfn: Gfn, first_mfn: Mfn, nr_frames: int) -> None:
        """common/domctl.c XEN_DOMCTL_memory_mapping, and what libxenctrl undoes of it"""
        with self._call("map_host_range", guest, first_gfn, first_mfn, nr_frames):
            mfns = range(first_mfn, first_mfn + nr_frames)
            domain = self._permit(guest, mfns, allow=True)
            for index, mfn in enumerate(mfns):
                if not self._add_direct(domain, first_gfn + index, mfn, nr_frames - index):
                    for undone in range(index):
                        domain.direct.pop(first_gfn + undone, None)
                    self._permit(guest, mfns, allow=False)
                    # tools/libs/ctrl/xc_domain.c: what is left is the errno of the undoing, which
                    # on x86 comes to a frame that is not there.
                    left = errno.EINVAL if self.arch is Arch.X86_64 else errno.ENOENT
                    raise failure("xc_domain_memory_mapping", guest, left)

    def _add_direct(self, domain: Domain, gfn: int, mfn: int, nr_left: int) -> bool:
        """arch/x86/mm/p2m.c set_typed_p2m_entry(), arch/arm/mmu/p2m.c __p2m_set_entry()"""
        x86, old = self.arch is Arch.X86_64, domain.p2m.get(gfn)
        if x86 and ((old and old.foreign) or domain.direct.get(gfn, mfn) != mfn):
            self._crash(domain)
            return False
        block = gfn >> SUPERPAGE_ORDER
        # common/domctl.c: Arm is given 64 frames a call at the most, and so never a superpage.
        if x86 and (gfn | mfn) % SUPERPAGE_FRAMES == 0 and nr_left >= SUPERPAGE_FRAMES:
            if not self._tables(domain, gfn, leaf=False):
                return False
            domain.superpages.add(block)
        elif block not in domain.superpages and not self._tables(domain, gfn, leaf=True):
            return False
        if old is not None:
            del domain.p2m[gfn]
            if old.foreign:
                self._put(old.page)
        domain.direct[gfn] = mfn
        return True

    def unmap_host_range(
        self, guest: DomId, first_gfn: Gfn, first_mfn: Mfn, nr_frames: int
    ) -> None:
        with self._call("unmap_host_range", guest, first_gfn, first_mfn, nr_frames):
            self._domain(guest, "xc_domain_memory_mapping")
            mfns = range(first_mfn, first_mfn + nr_frames)
            domain = self.by_domid[guest]
            for index, mfn in enumerate(mfns):
                if mfn in domain.iomem:
                    domain.direct.pop(first_gfn + index, None)
            self._permit(guest, mfns, allow=False)

    # -- what an x86 guest is told of its memory ------------------------------------------------

    def entry_register(self, domid: DomId) -> int | None:
        """arch/x86/hvm/save.c hvm_save_one()"""
        with self._call("entry_register", domid):
            if self.arch is Arch.ARM64:
                return None
            domain = self._domain(domid, "xc_domain_hvm_getcontext_partial")
            return domain.entry_register

    def set_memory_map(self, domid: DomId, ranges: Sequence[MemoryRange]) -> None:
        """arch/x86/mm.c XENMEM_set_memory_map"""
        call = "xc_domain_set_memory_map"
        with self._call("set_memory_map", domid, len(ranges)):
            if self.arch is Arch.ARM64:
                raise failure(call, domid, errno.ENOSYS)
            if len(ranges) > E820_MAX:
                raise failure(call, domid, errno.EINVAL)
            self._domain(domid, call).memory_map = tuple(ranges)

    # -- what a guest itself does ---------------------------------------------------------------

    def _guest_pages(self, domid: DomId, gfn: int, offset: int, count: int) -> Iterator[Page]:
        entry = self.by_domid[domid].p2m.get(gfn)
        if entry is None or offset + count > PAGE_SIZE:
            raise ModelViolation(f"domain {domid} has nothing at frame {gfn:#x}")
        yield entry.page

    def guest_read(self, domid: DomId, gfn: int, offset: int, count: int) -> bytes:
        """Return what the guest reads there, through its own p2m."""
        with self._lock:
            (page,) = self._guest_pages(domid, gfn, offset, count)
            return page.read(offset, count)

    def guest_write(self, domid: DomId, gfn: int, offset: int, data: bytes) -> None:
        """Write what a guest writes there, through its own p2m."""
        with self._lock:
            (page,) = self._guest_pages(domid, gfn, offset, len(data))
            page.write(offset, data)

    def foreign_frames(self, domid: DomId) -> dict[int, DomId]:
        """Return the guest's frames that are another domain's pages, and whose."""
        with self._lock:
            return {
                gfn: entry.page.owner.domid
                for gfn, entry in self.by_domid[domid].p2m.items()
                if entry.foreign
            }
