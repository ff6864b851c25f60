# SPDX-License-Identifier: LGPL-2.1-or-later
"""The real :class:`~xshmd.ports.Hypervisor`: hypercalls in, records out, no cffi object past here.

Hypercalls that come by the thousand go through libxencall in batches of our own (the module
``_stable``); the rest are libxenctrl's domctls.  Why the batches are not libxenctrl's: its wrapper
takes an ``unsigned int`` count into the hypercall's ``uint16_t`` unchecked, so 65536 frames map
nothing and report success, and its bounce buffers hide entries Xen never wrote
(tools/libs/ctrl/xc_domain.c, xen/include/public/memory.h).
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import uuid as uuid_module
from collections.abc import Iterator, Sequence
from typing import Any, Final

from xshmd.errors import DomainGone, HypercallFailed, OutOfMemory, PartialMap, XenUnavailable
from xshmd.machine import Arch, DomainInfo, HostInfo, HostRange, MemoryRange
from xshmd.ranges import ByteRange
from xshmd.units import (
    DOMID_FIRST_RESERVED,
    PAGE_SIZE,
    SUPERPAGE_FRAMES,
    SUPERPAGE_ORDER,
    DomId,
    Gfn,
    Mfn,
)
from xshmd.xen import _ffi
from xshmd.xen.buffers import Buffers, Lent, pages_for
from xshmd.xen.call_memory import CallMemory
from xshmd.xen.errno_table import failure
from xshmd.xen.grants import GrantCalls
from xshmd.xen.host_ranges import find_host_ranges
from xshmd.xen.lending import LendingCalls
from xshmd.xen.pages import MappedPages
from xshmd.xen.scatter_copy import Binding, copy_ranges

BATCH_FRAMES: Final = 16384
"""Frames per mapping hypercall: cost per frame is flat from 256 on, the count ends at 65535."""
POPULATE_EXTENTS: Final = 1024
"""Extents per populate or decrease hypercall: keeps libxenctrl's bounce buffers small."""
WINDOW_FRAMES: Final = 4096
"""Frames dom0 maps at a time to zero them; an Arm or PVH dom0 pays each with one of its own."""
SHOWN_VCPU_NONE: Final = 0xFFFFFFFF
E820_MAX: Final = 128
"""Entries of a memory map, at the most (xen/include/public/hvm/e820.h)."""
ADD_MAPPING: Final = 1
REMOVE_MAPPING: Final = 0


class XenHypervisor(GrantCalls, LendingCalls):
    """Xen, through its own libraries.  Opening it needs root in a control domain.

    Attributes:
        buffers: This process's hypercall buffers, those of the batches among them.

    Synchronization: any thread may call anything; the batches, which share one buffer, take turns.
    Handles do not survive a fork (xencall.h): never fork without exec while one is open.
    """

    def __init__(self) -> None:
        self._ffi, self._lib = _ffi.stable()
        self._xffi, self._xlib = _ffi.xenctrl()
        self._lock = threading.RLock()
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            self._call = self._opened(self._lib.xshm_call_open, self._ffi, "/dev/xen/hypercall")
            undo.callback(self._lib.xencall_close, self._call)
            self._foreign = self._opened(self._lib.xshm_foreign_open, self._ffi, "/dev/xen/privcmd")
            undo.callback(self._lib.xenforeignmemory_close, self._foreign)
            self._xc = self._opened(self._xlib.xshm_xc_open, self._xffi, "/dev/xen/privcmd")
            undo.callback(self._xlib.xc_interface_close, self._xc)
            self.buffers = Buffers(CallMemory(self._lib, self._ffi, self._call))
            undo.callback(self.buffers.close)
            self._own = self.buffers.owner("xshmd")
            size_bytes = self._lib.xshm_batch_bytes(BATCH_FRAMES)
            self._batch = self._own.alloc_mem(
                self._own.alloc_buf(pages_for(size_bytes)), size_bytes
            )
            self._closing.push(undo.pop_all())

    @staticmethod
    def _opened(opener: Any, ffi: Any, device: str) -> Any:
        handle = opener()
        if handle == ffi.NULL:
            code = ffi.errno
            raise XenUnavailable(
                f"cannot open {device}: {os.strerror(code)}",
                hint="be root in a Xen control domain; `xshmctl doctor` says what is missing",
            )
        return handle

    def close(self) -> None:
        """Free everything; may be called again without harm."""
        with self._lock:
            self._close_gnttab()
            self._closing.close()

    def __enter__(self) -> XenHypervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _batch_buffer(self) -> Iterator[Any]:
        """Have the batches' memory for one hypercall and what undoes it."""
        with self._lock, self._own.use(self._batch) as lent:
            yield self._ffi.cast("void *", lent.address)

    # -- the plumbing of a domctl ---------------------------------------------------------------

    def _check(self, rc: int, call: str, domid: DomId, **facts: int) -> int:
        """Turn a libxenctrl return value into itself, or into an exception."""
        if rc < 0:
            raise failure(call, domid, self._xffi.errno, **facts)
        return rc

    @staticmethod
    def _guest_domid(domid: DomId) -> DomId:
        # Pseudo-domains (DOMID_IO, DOMID_XEN...) own memory that is nobody's to share, and Xen has
        # had host crashes on foreign maps of them: they never reach a hypercall.
        if not 0 <= domid < DOMID_FIRST_RESERVED:
            raise ValueError(f"{domid} is not the domid of a domain")
        return domid

    # -- facts ----------------------------------------------------------------------------------

    def host_info(self) -> HostInfo:
        out = self._xffi.new("xshm_host *")
        if self._xlib.xshm_host_info(self._xc, out) < 0:
            raise failure("xc_physinfo", None, self._xffi.errno)
        return HostInfo(
            arch=Arch.ARM64 if out.is_arm else Arch.X86_64,
            xen_version=(out.major, out.minor),
            xen_extra=self._xffi.string(out.extra).decode("ascii", "replace"),
            xen_command_line=self._xffi.string(out.command_line).decode("utf-8", "replace"),
            has_hvm=bool(out.has_hvm),
            has_hap=bool(out.has_hap),
            free_pages=out.free_pages,
            total_pages=out.total_pages,
        )

    def _info(self, raw: Any) -> DomainInfo:
        lib, flags = self._xlib, raw.flags
        return DomainInfo(
            domid=DomId(raw.domid),
            uuid=str(uuid_module.UUID(bytes=bytes(self._xffi.buffer(raw.handle)))),
            hvm=bool(flags & lib.XEN_DOMINF_hvm_guest),
            hap=bool(flags & lib.XEN_DOMINF_hap),
            paused=bool(flags & lib.XEN_DOMINF_paused),
            shut_down=bool(flags & lib.XEN_DOMINF_shutdown),
            shutdown_reason=(flags >> lib.XEN_DOMINF_shutdownshift) & lib.XEN_DOMINF_shutdownmask,
            dying=bool(flags & lib.XEN_DOMINF_dying),
            tot_pages=raw.tot_pages,
            max_pages=raw.max_pages,
            max_vcpu_id=-1 if raw.max_vcpu_id == SHOWN_VCPU_NONE else raw.max_vcpu_id,
            nr_online_vcpus=raw.nr_online_vcpus,
            cpu_time_ns=raw.cpu_time,
            gpaddr_bits=raw.gpaddr_bits,
        )

    def domain_info(self, domid: DomId) -> DomainInfo | None:
        out = self._xffi.new("xshm_info[1]")
        # getdomaininfolist answers with the next domain if there is none of this number.
        found = self._xlib.xshm_domain_list(self._xc, self._guest_domid(domid), 1, out)
        if found < 0:
            raise failure("xc_domain_getinfolist", domid, self._xffi.errno)
        return self._info(out[0]) if found and out[0].domid == domid else None

    def domains(self) -> tuple[DomainInfo, ...]:
        found: list[DomainInfo] = []
        out = self._xffi.new("xshm_info[64]")
        first = 0
        while True:
            count = self._xlib.xshm_domain_list(self._xc, first, 64, out)
            if count < 0:
                raise failure("xc_domain_getinfolist", None, self._xffi.errno)
            found.extend(self._info(out[i]) for i in range(count))
            if count < 64:
                return tuple(found)
            first = found[-1].domid + 1

    def xen_version(self, subcall: int, memory: Lent | None) -> int:
        """Make the hypercall ``xen_version`` and return what it does (xen/common/kernel.c).

        Whoever calls has checked that the memory is as large as what Xen writes there.
        """
        start = self._ffi.cast("void *", memory.address) if memory else self._ffi.NULL
        rc = self._lib.xshm_xen_version(self._call, subcall, start)
        if rc < 0:
            raise failure("xen_version", None, -rc, subcall=subcall)
        return int(rc)

    # -- domains --------------------------------------------------------------------------------

    def create_holder_domain(self, uuid: str, *, nr_grant_frames: int = 1) -> DomId:
        out = self._xffi.new("uint32_t *")
        handle = uuid_module.UUID(uuid).bytes
        if self._xlib.xshm_create_holder(self._xc, handle, nr_grant_frames, out) < 0:
            raise failure("xc_domain_create", None, self._xffi.errno)
        domid = DomId(out[0])
        try:
            # A holder without its vCPU must not exist for longer than this call.
            self._check(
                self._xlib.xc_domain_max_vcpus(self._xc, domid, 1), "xc_domain_max_vcpus", domid
            )
            self._check(
                self._xlib.xc_domain_setmaxmem(self._xc, domid, 0), "xc_domain_setmaxmem", domid
            )
        except HypercallFailed:
            self._xlib.xc_domain_destroy(self._xc, domid)
            raise
        return domid

    def _simple(self, name: str, domid: DomId, *arguments: int) -> None:
        call = getattr(self._xlib, name)
        self._check(call(self._xc, self._guest_domid(domid), *arguments), name, domid)

    def destroy(self, domid: DomId) -> None:
        self._simple("xc_domain_destroy", domid)

    def pause(self, domid: DomId) -> None:
        self._simple("xc_domain_pause", domid)

    def unpause(self, domid: DomId) -> None:
        self._simple("xc_domain_unpause", domid)

    def shut_down(self, domid: DomId, reason: int) -> None:
        self._simple("xc_domain_shutdown", domid, reason)

    def set_target(self, domid: DomId, target: DomId) -> None:
        self._simple("xc_domain_set_target", domid, self._guest_domid(target))

    def set_max_pages(self, domid: DomId, nr_pages: int) -> None:
        self._simple("xc_domain_setmaxmem", domid, nr_pages * (PAGE_SIZE // 1024))

    def paging_pool_bytes(self, domid: DomId) -> int:
        out = self._xffi.new("uint64_t *")
        rc = self._xlib.xc_get_paging_mempool_size(self._xc, self._guest_domid(domid), out)
        self._check(rc, "xc_get_paging_mempool_size", domid)
        return int(out[0])

    def set_paging_pool_bytes(self, domid: DomId, size_bytes: int) -> None:
        self._simple("xc_set_paging_mempool_size", domid, size_bytes)

    # -- a holder's own pages -------------------------------------------------------------------

    def _extents(self, first_gfn: Gfn, nr_frames: int) -> Iterator[tuple[int, list[int]]]:
        """Cut frames into (order, extents) runs: superpages where alignment allows, else frames."""
        gfn, end = int(first_gfn), first_gfn + nr_frames
        while gfn < end:
            whole = (end - gfn) // SUPERPAGE_FRAMES if gfn % SUPERPAGE_FRAMES == 0 else 0
            if whole:
                count = min(whole, POPULATE_EXTENTS)
                yield SUPERPAGE_ORDER, [gfn + i * SUPERPAGE_FRAMES for i in range(count)]
                gfn += count * SUPERPAGE_FRAMES
            else:
                border = (gfn // SUPERPAGE_FRAMES + 1) * SUPERPAGE_FRAMES
                count = min(end, border) - gfn
                yield 0, list(range(gfn, gfn + count))
                gfn += count

    def populate(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> None:
        done = 0
        try:
            for order, gfns in self._extents(first_gfn, nr_frames):
                got = self._populate_extents(domid, order, gfns)
                done += got << order
                if got < len(gfns) and order:
                    # Memory is there but not in 2 MiB pieces: take the rest of this run by frames.
                    loose = range(gfns[got], gfns[-1] + SUPERPAGE_FRAMES)
                    for start in range(loose.start, loose.stop, POPULATE_EXTENTS):
                        part = list(range(start, min(start + POPULATE_EXTENTS, loose.stop)))
                        got = self._populate_extents(domid, 0, part)
                        done += got
                        if got < len(part):
                            raise self._short_of_memory(domid, nr_frames, done)
                elif got < len(gfns):
                    raise self._short_of_memory(domid, nr_frames, done)
        except HypercallFailed:
            self.depopulate(domid, first_gfn, nr_frames)
            raise
        except OutOfMemory:
            self.depopulate(domid, first_gfn, nr_frames)
            raise

    @staticmethod
    def _short_of_memory(domid: DomId, nr_frames: int, done: int) -> OutOfMemory:
        return OutOfMemory(
            f"Xen gave {done} of the {nr_frames} frames wanted for the holder, domain {domid}",
            hint="free memory (`xl info` says how much there is), or give dom0 less of it",
            domid=domid,
            nr_frames=nr_frames,
        )

    def _populate_extents(self, domid: DomId, order: int, gfns: list[int]) -> int:
        array = self._xffi.new("xen_pfn_t[]", gfns)
        rc = self._xlib.xc_domain_populate_physmap(
            self._xc, self._guest_domid(domid), len(gfns), order, 0, array
        )
        return self._check(rc, "xc_domain_populate_physmap", domid)

    def depopulate(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> int:
        freed = 0
        for start in range(first_gfn, first_gfn + nr_frames, POPULATE_EXTENTS):
            count = min(POPULATE_EXTENTS, first_gfn + nr_frames - start)
            frames = [Gfn(start + i) for i in range(count)]
            done = self._decrease(domid, frames)
            freed += done
            # It stops at a frame that is not there (xen/common/memory.c, decrease_reservation()),
            # so of the rest it is given only those that are.
            if done < count and (there := self.populated_frames(domid, frames[done:])):
                rest = self._decrease(domid, there)
                freed += rest
                if rest < len(there):
                    raise failure(
                        "xc_domain_decrease_reservation", domid, errno.EBUSY, first_gfn=there[rest]
                    )
        return freed

    def _decrease(self, domid: DomId, frames: Sequence[Gfn]) -> int:
        """Free the domain's pages at these frames up to one that cannot be; return how many."""
        call, array = "xc_domain_decrease_reservation", self._xffi.new("xen_pfn_t[]", list(frames))
        rc = self._xlib.xc_domain_decrease_reservation(
            self._xc, self._guest_domid(domid), len(frames), 0, array
        )
        return self._check(rc, call, domid)

    def zero(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> None:
        for start in range(first_gfn, first_gfn + nr_frames, WINDOW_FRAMES):
            count = min(WINDOW_FRAMES, first_gfn + nr_frames - start)
            with self.map_pages(domid, Gfn(start), count, writable=True) as window:
                window.fill(0)
            self.flush(domid, Gfn(start), count)

    def flush(self, domid: DomId, first_gfn: Gfn, nr_frames: int) -> None:
        for start in range(first_gfn, first_gfn + nr_frames, WINDOW_FRAMES):
            count = min(WINDOW_FRAMES, first_gfn + nr_frames - start)
            # dom0 writes through its cache; a guest that has its own off would read what was there
            # before.  XEN_DOMCTL_cacheflush takes 1 GiB at the most on Arm (xen/arch/arm/domctl.c),
            # and does nothing on x86, where caches are coherent with everything a guest can do.
            rc = self._xlib.xc_domain_cacheflush(self._xc, self._guest_domid(domid), start, count)
            self._check(rc, "xc_domain_cacheflush", domid)

    def map_pages(
        self, domid: DomId, first_gfn: Gfn, nr_frames: int, *, writable: bool
    ) -> MappedPages:
        nr_bad = self._ffi.new("size_t *")
        error = self._ffi.new("int *")
        address = self._lib.xshm_foreign_map(
            self._foreign, self._guest_domid(domid), writable, first_gfn, nr_frames, nr_bad, error
        )
        if address == self._ffi.NULL:
            raise failure("xenforeignmemory_map", domid, error[0], first_gfn=first_gfn)
        unmap = self._lib.xenforeignmemory_unmap
        pages = MappedPages(self._lib, self._ffi, unmap, self._foreign, address, nr_frames)
        if nr_bad[0]:
            pages.close()
            raise failure("xenforeignmemory_map", domid, error[0], first_gfn=first_gfn)
        return pages

    def copy_ranges(
        self,
        domid: DomId,
        source: Sequence[ByteRange],
        target: Sequence[ByteRange],
        *,
        count_at: int | None = None,
    ) -> int:
        binding = Binding(self._lib, self._ffi, self._foreign)
        return copy_ranges(binding, self._guest_domid(domid), source, target, count_at)

    def populated_frames(self, domid: DomId, gfns: Sequence[Gfn]) -> tuple[Gfn, ...]:
        present = self._ffi.new("uint8_t[]", len(gfns))
        rc = self._lib.xshm_foreign_probe(
            self._foreign, self._guest_domid(domid), list(gfns), len(gfns), present
        )
        if rc < 0:
            raise failure("xenforeignmemory_map", domid, -rc)
        return tuple(gfn for gfn, there in zip(gfns, present, strict=True) if there)

    # -- a guest's frames -----------------------------------------------------------------------

    def map_foreign(
        self, guest: DomId, first_gfn: Gfn, holder: DomId, holder_gfn: Gfn, nr_frames: int
    ) -> None:
        self._guest_domid(guest), self._guest_domid(holder)
        done, bad = self._ffi.new("uint32_t *"), self._ffi.new("uint32_t *")
        error = self._ffi.new("int *")
        for start in range(0, nr_frames, BATCH_FRAMES):
            count = min(BATCH_FRAMES, nr_frames - start)
            with self._batch_buffer() as buffer:
                whole = rc = self._lib.xshm_batch_map(
                    self._call, buffer, BATCH_FRAMES, guest, holder,
                    first_gfn + start, holder_gfn + start, count, done, bad, error,
                )  # fmt: skip
                if rc == 0 and done[0] == count:
                    continue
                if rc == 0:
                    rc = self._lib.xshm_batch_undo(
                        self._call, buffer, BATCH_FRAMES, guest,
                        first_gfn + start, count, self._ffi.new("uint32_t *"),
                    )  # fmt: skip
                    code = error[0]
                    if rc:
                        raise failure("XENMEM_remove_from_physmap", guest, -rc)
                else:
                    code = -rc
            if start:
                self.unmap(guest, first_gfn, start)
            cause = failure("XENMEM_add_to_physmap_batch", guest, code, holder=holder)
            if whole and isinstance(cause, DomainGone):
                raise cause  # of an entry, ESRCH speaks of the holder
            at = first_gfn + start + (bad[0] if rc == 0 else 0)
            raise PartialMap(
                f"Xen refused to map the holder's frame {holder_gfn + at - first_gfn:#x} at frame "
                f"{at:#x} of domain {guest}: {os.strerror(code)}",
                call="XENMEM_add_to_physmap_batch", errno=code, hint=cause.hint,
                domid=guest, first_gfn=at,
            )  # fmt: skip

    def unmap(self, guest: DomId, first_gfn: Gfn, nr_frames: int) -> int:
        removed, absent = self._ffi.new("uint32_t *"), self._ffi.new("uint32_t *")
        error = self._ffi.new("int *")
        total = 0
        for start in range(0, nr_frames, BATCH_FRAMES):
            count = min(BATCH_FRAMES, nr_frames - start)
            with self._batch_buffer() as buffer:
                rc = self._lib.xshm_batch_remove(
                    self._call, buffer, self._guest_domid(guest),
                    first_gfn + start, count, removed, absent, error,
                )  # fmt: skip
            total += removed[0]
            if rc or error[0]:
                raise failure("XENMEM_remove_from_physmap", guest, -rc or error[0])
        return total

    # -- the machine's own frames ---------------------------------------------------------------

    def host_ranges(self) -> tuple[HostRange, ...]:
        out = self._xffi.new("xshm_range[]", E820_MAX)
        count = self._xlib.xshm_machine_memory_map(self._xc, out, E820_MAX)
        if count < 0 and self._xffi.errno != errno.ENOSYS:
            raise failure("xc_get_machine_memory_map", None, self._xffi.errno)
        machine_map = [
            MemoryRange(out[i].address, out[i].size, out[i].kind) for i in range(max(count, 0))
        ]
        return find_host_ranges(machine_map)

    def map_host_range(self, guest: DomId, first_gfn: Gfn, first_mfn: Mfn, nr_frames: int) -> None:
        self._simple("xc_domain_iomem_permission", guest, first_mfn, nr_frames, True)
        try:
            # It comes in as many hypercalls as Xen wants, and what was done is undone on an error
            # (tools/libs/ctrl/xc_domain.c, xc_domain_memory_mapping()).
            self._simple(
                "xc_domain_memory_mapping", guest, first_gfn, first_mfn, nr_frames, ADD_MAPPING
            )
        except HypercallFailed:
            self._xlib.xc_domain_iomem_permission(self._xc, guest, first_mfn, nr_frames, False)
            raise

    def unmap_host_range(
        self, guest: DomId, first_gfn: Gfn, first_mfn: Mfn, nr_frames: int
    ) -> None:
        # libxenctrl skips all that follows a frame that is not there, so no call crosses a 2 MiB
        # border and one that fails is repeated frame by frame.
        done = 0
        while done < nr_frames:
            to_border = SUPERPAGE_FRAMES - (first_gfn + done) % SUPERPAGE_FRAMES
            count = min(to_border, nr_frames - done)
            if not self._removed(guest, first_gfn + done, first_mfn + done, count):
                for index in range(done, done + count):
                    self._removed(guest, first_gfn + index, first_mfn + index, 1)
            done += count
        self._simple("xc_domain_iomem_permission", guest, first_mfn, nr_frames, False)

    def _removed(self, guest: DomId, first_gfn: int, first_mfn: int, nr_frames: int) -> bool:
        """Remove a piece; False if some of it is not there.

        Only x86 says so (EINVAL).  Where the guest has no right to the frames (EPERM) none can be.
        """
        rc = self._xlib.xc_domain_memory_mapping(
            self._xc, self._guest_domid(guest), first_gfn, first_mfn, nr_frames, REMOVE_MAPPING
        )
        if rc < 0 and self._xffi.errno not in (errno.EINVAL, errno.EPERM):
            raise failure("xc_domain_memory_mapping", guest, self._xffi.errno)
        return bool(rc == 0)

    # -- what an x86 guest is told of its memory ------------------------------------------------

    def entry_register(self, domid: DomId) -> int | None:
        out = self._xffi.new("uint64_t *")
        if self._xlib.xshm_entry_register(self._xc, self._guest_domid(domid), out) == 0:
            return int(out[0])
        # ENODATA: the vCPU is down (xen/arch/x86/hvm/save.c, hvm_save_one()).
        if self._xffi.errno in (errno.ENODATA, errno.ENOENT, errno.ENOSYS):
            return None
        raise failure("xc_domain_hvm_getcontext_partial", domid, self._xffi.errno)

    def set_memory_map(self, domid: DomId, ranges: Sequence[MemoryRange]) -> None:
        array = self._xffi.new("xshm_range[]", len(ranges))
        for entry, wanted in zip(array, ranges, strict=True):
            entry.address, entry.size, entry.kind = wanted.address, wanted.size_bytes, wanted.kind
        rc = self._xlib.xshm_set_memory_map(self._xc, self._guest_domid(domid), array, len(ranges))
        self._check(rc, "xc_domain_set_memory_map", domid)
