# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds the compiled modules through which ``xshmd.xen`` reaches Xen (cffi, API mode).

Xen's libraries make two promises: those in ``_stable`` and ``_evtchn`` keep their ABI from release
to release, while libxenctrl is bound to one Xen version.  A Xen upgrade therefore breaks one module
and not the others.  All use Python's limited API, so one build serves every Python >=
3.11.

Run by setuptools (``cffi_modules`` in setup.py), or by hand to cross-compile::

    python3 cffi_build.py emit OUTDIR

which writes the C sources and prints, as JSON, what each is to be linked with.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from cffi import FFI

STABLE_LIBRARIES = ("xencall", "xenforeignmemory", "xengnttab", "xentoollog")
XENCTRL_LIBRARIES = ("xenctrl", "xentoollog")
EVTCHN_LIBRARIES = ("xenevtchn", "xencall")
# cffi's own C calls memset(), and Python.h of 3.13 no longer declares it under the limited API.
COMPILE_ARGS = ("-O2", "-include", "string.h")

STABLE = FFI()
STABLE.cdef(
    """
    typedef struct xencall_handle xencall_handle;
    xencall_handle *xshm_call_open(void);
    int xencall_close(xencall_handle *xcall);
    void *xencall_alloc_buffer_pages(xencall_handle *xcall, size_t nr_pages);
    void xencall_free_buffer_pages(xencall_handle *xcall, void *p, size_t nr_pages);

    long xshm_xen_version(xencall_handle *call, int subcall, void *memory);

    size_t xshm_batch_bytes(uint32_t capacity);
    int xshm_batch_map(xencall_handle *call, void *buffer, uint32_t capacity,
                       uint16_t guest, uint16_t holder, uint64_t guest_gfn, uint64_t holder_gfn,
                       uint32_t nr, uint32_t *nr_done, uint32_t *first_bad, int *first_error);
    int xshm_batch_undo(xencall_handle *call, void *buffer, uint32_t capacity,
                        uint16_t guest, uint64_t guest_gfn, uint32_t nr, uint32_t *nr_removed);
    int xshm_batch_remove(xencall_handle *call, void *buffer, uint16_t domid,
                          uint64_t first_gfn, uint32_t nr,
                          uint32_t *nr_removed, uint32_t *nr_absent, int *first_error);

    typedef struct xenforeignmemory_handle xenforeignmemory_handle;
    xenforeignmemory_handle *xshm_foreign_open(void);
    int xenforeignmemory_close(xenforeignmemory_handle *fmem);
    void *xshm_foreign_map(xenforeignmemory_handle *fmem, uint32_t domid, int writable,
                           uint64_t first_gfn, size_t nr, size_t *nr_bad, int *first_error);
    void *xshm_foreign_map_frames(xenforeignmemory_handle *fmem, uint32_t domid, int writable,
                                  const uint64_t *gfns, size_t nr, size_t *nr_bad,
                                  int *first_error);
    typedef struct { uint64_t offset, length; } xshm_piece;
    int64_t xshm_scatter_copy(void *target, uint64_t target_size, const xshm_piece *into,
                              uint32_t nr_into, const void *source, uint64_t source_size,
                              const xshm_piece *from, uint32_t nr_from);
    void xshm_store_count(void *word, uint64_t count);
    int xshm_foreign_probe(xenforeignmemory_handle *fmem, uint32_t domid,
                           const uint64_t *gfns, size_t nr, uint8_t *present);
    int xenforeignmemory_unmap(xenforeignmemory_handle *fmem, void *addr, size_t pages);
    void *memset(void *s, int c, size_t n);

    typedef struct xenforeignmemory_resource_handle xenforeignmemory_resource_handle;
    xenforeignmemory_resource_handle *xshm_grant_table(xenforeignmemory_handle *fmem,
                                                       uint16_t domid, uint32_t nr_table_frames,
                                                       void **table);
    int xenforeignmemory_unmap_resource(xenforeignmemory_handle *fmem,
                                        xenforeignmemory_resource_handle *fres);
    uint32_t xshm_grants_write(void *table, uint32_t first_ref, uint32_t nr, uint16_t domid,
                               uint32_t first_gfn, int readonly);
    uint32_t xshm_grants_end(void *table, uint32_t first_ref, uint32_t nr);
    uint32_t xshm_grants_in_use(const void *table, uint32_t first_ref, uint32_t nr);

    typedef struct xengntdev_handle xengnttab_handle;
    xengnttab_handle *xshm_gnttab_open(void);
    int xengnttab_close(xengnttab_handle *xgt);
    void *xshm_gnttab_map(xengnttab_handle *xgt, uint32_t domid, uint32_t first_ref, uint32_t nr,
                          int writable);
    int xengnttab_unmap(xengnttab_handle *xgt, void *start_address, uint32_t count);
    int64_t xshm_decrement(void *word);
    """
)
STABLE.set_source(
    "xshmd.xen._stable",
    r"""
    #define __XEN_TOOLS__ 1   /* today's layouts of Xen's structures, not those of Xen 3.2 */
    #include <alloca.h>   /* cffi's own code */
    #include <errno.h>
    #include <limits.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <xencall.h>
    #include <xenforeignmemory.h>
    #include <xengnttab.h>
    #include <xentoollog.h>
    #include <xen/xen.h>
    #include <xen/grant_table.h>
    #include <xen/memory.h>

    /* One hypercall-safe buffer serves both directions; its parts, for a capacity of n entries:
     * mapping:  header | idxs[n] | gpfns[n] | errs[n]
     * removing: calls[n] | args[n], of which one multicall takes XSHM_MULTICALL at the most. */
    #define XSHM_MULTICALL 512
    #define XSHM_ALIGN(n) (((n) + 15) & ~(size_t)15)
    #define XSHM_POISON INT_MAX   /* no errno: an entry Xen did not write is an error, not a 0 */

    typedef struct { uint64_t offset, length; } xshm_piece;

    struct xshm_remove_buffer {
        multicall_entry_t calls[XSHM_MULTICALL];
        struct xen_remove_from_physmap args[XSHM_MULTICALL];
    };

    /* Others decrement the word too, and may write anything into it; -1: nothing is left of it. */
    static int64_t xshm_decrement(void *at)
    {
        uint32_t *word = at, left = __atomic_load_n(word, __ATOMIC_RELAXED);

        while ( left )
            if ( __atomic_compare_exchange_n(word, &left, left - 1, 0, __ATOMIC_SEQ_CST,
                                             __ATOMIC_RELAXED) )
                return left - 1;
        return -1;
    }

    static xencall_handle *xshm_call_open(void) { return xencall_open(NULL, 0); }
    static xenforeignmemory_handle *xshm_foreign_open(void)
    {
        return xenforeignmemory_open(NULL, 0);
    }

    /* Returns what Xen does, or -errno. */
    static long xshm_xen_version(xencall_handle *call, int subcall, void *memory)
    {
        long rc = xencall2(call, __HYPERVISOR_xen_version, (uint64_t)(unsigned int)subcall,
                           (uint64_t)(uintptr_t)memory);

        return rc < 0 ? -errno : rc;
    }

    static size_t xshm_map_bytes(uint32_t n)
    {
        return 64 + (size_t)n * (sizeof(xen_ulong_t) + sizeof(xen_pfn_t) + sizeof(int));
    }

    static size_t xshm_batch_bytes(uint32_t capacity)
    {
        /* The error slots of a mapping must survive the removal that undoes it. */
        return XSHM_ALIGN(xshm_map_bytes(capacity)) + sizeof(struct xshm_remove_buffer);
    }

    static int *xshm_errs(void *buffer, uint32_t capacity)
    {
        return (int *)((char *)buffer + 64 +
                       (size_t)capacity * (sizeof(xen_ulong_t) + sizeof(xen_pfn_t)));
    }

    /* Returns 0 with the three counts set, or -errno if the whole call was refused. */
    static int xshm_batch_map(xencall_handle *call, void *buffer, uint32_t capacity,
                              uint16_t guest, uint16_t holder, uint64_t guest_gfn,
                              uint64_t holder_gfn, uint32_t nr,
                              uint32_t *nr_done, uint32_t *first_bad, int *first_error)
    {
        struct xen_add_to_physmap_batch *xatp = buffer;
        xen_ulong_t *idxs = (xen_ulong_t *)((char *)buffer + 64);
        xen_pfn_t *gpfns = (xen_pfn_t *)(idxs + capacity);
        int *errs = xshm_errs(buffer, capacity);
        uint32_t i;
        long rc;

        *nr_done = 0; *first_bad = nr; *first_error = 0;
        if ( nr > capacity || nr > UINT16_MAX )  /* .size is 16 bits wide: 65536 would be 0 */
            return -E2BIG;
        memset(xatp, 0, sizeof *xatp);
        xatp->domid = guest;
        xatp->space = XENMAPSPACE_gmfn_foreign;
        xatp->size = nr;
        xatp->u.foreign_domid = holder;
        set_xen_guest_handle(xatp->idxs, idxs);
        set_xen_guest_handle(xatp->gpfns, gpfns);
        set_xen_guest_handle(xatp->errs, errs);
        for ( i = 0; i < nr; i++ ) {
            idxs[i] = holder_gfn + i;
            gpfns[i] = guest_gfn + i;
            errs[i] = XSHM_POISON;
        }
        rc = xencall2L(call, __HYPERVISOR_memory_op, XENMEM_add_to_physmap_batch,
                       (uint64_t)(uintptr_t)xatp);
        if ( rc < 0 )
            rc = -errno;
        for ( i = 0; i < nr; i++ ) {
            if ( errs[i] == 0 )
                ++*nr_done;
            else if ( *first_bad == nr ) {
                *first_bad = i;
                *first_error = errs[i] == XSHM_POISON ? (rc ? (int)-rc : ENODATA) : -errs[i];
            }
        }
        return *nr_done || !rc ? 0 : (int)rc;
    }

    /* Removes the frames; an empty one is counted in *nr_absent and is no error. */
    static int xshm_remove_some(xencall_handle *call, struct xshm_remove_buffer *rb,
                                uint16_t domid, uint32_t nr,
                                uint32_t *nr_removed, uint32_t *nr_absent, int *first_error)
    {
        uint32_t i;
        long rc;

        for ( i = 0; i < nr; i++ ) {
            memset(&rb->calls[i], 0, sizeof rb->calls[i]);
            rb->calls[i].op = __HYPERVISOR_memory_op;
            rb->calls[i].result = (xen_ulong_t)-ENODATA;
            rb->calls[i].args[0] = XENMEM_remove_from_physmap;
            rb->calls[i].args[1] = (xen_ulong_t)(uintptr_t)&rb->args[i];
            rb->args[i].domid = domid;
        }
        rc = xencall2L(call, __HYPERVISOR_multicall, (uint64_t)(uintptr_t)rb->calls, nr);
        if ( rc < 0 )
            return -errno;
        for ( i = 0; i < nr; i++ ) {
            long result = (long)rb->calls[i].result;
            if ( result == 0 )
                ++*nr_removed;
            else if ( result == -ENOENT )
                ++*nr_absent;
            else if ( !*first_error )
                *first_error = (int)-result;
        }
        return 0;
    }

    static struct xshm_remove_buffer *xshm_remove_part(void *buffer, uint32_t capacity)
    {
        return (struct xshm_remove_buffer *)
            ((char *)buffer + XSHM_ALIGN(xshm_map_bytes(capacity)));
    }

    static int xshm_batch_remove(xencall_handle *call, void *buffer, uint16_t domid,
                                 uint64_t first_gfn, uint32_t nr, uint32_t *nr_removed,
                                 uint32_t *nr_absent, int *first_error)
    {
        struct xshm_remove_buffer *rb = buffer;
        uint32_t done, i;

        *nr_removed = *nr_absent = 0; *first_error = 0;
        for ( done = 0; done < nr; done += i ) {
            int rc;
            for ( i = 0; i < XSHM_MULTICALL && done + i < nr; i++ )
                rb->args[i].gpfn = first_gfn + done + i;
            rc = xshm_remove_some(call, rb, domid, i, nr_removed, nr_absent, first_error);
            if ( rc )
                return rc;
        }
        return 0;
    }

    /* Undoes the mapping just made with the same arguments: exactly the entries that were done. */
    static int xshm_batch_undo(xencall_handle *call, void *buffer, uint32_t capacity,
                               uint16_t guest, uint64_t guest_gfn, uint32_t nr,
                               uint32_t *nr_removed)
    {
        struct xshm_remove_buffer *rb = xshm_remove_part(buffer, capacity);
        const int *errs = xshm_errs(buffer, capacity);
        uint32_t i, n = 0, absent = 0;
        int error = 0, rc;

        *nr_removed = 0;
        for ( i = 0; i < nr; i++ ) {
            if ( errs[i] == 0 )
                rb->args[n++].gpfn = guest_gfn + i;
            if ( n == XSHM_MULTICALL || (n && i + 1 == nr) ) {
                rc = xshm_remove_some(call, rb, guest, n, nr_removed, &absent, &error);
                if ( rc )
                    return rc;
                n = 0;
            }
        }
        return error ? -error : 0;
    }

    static void *xshm_foreign_map_frames(xenforeignmemory_handle *fmem, uint32_t domid,
                                         int writable, const uint64_t *gfns, size_t nr,
                                         size_t *nr_bad, int *first_error)
    {
        xen_pfn_t *frames = calloc(nr, sizeof *frames);
        int *errs = calloc(nr, sizeof *errs);
        void *map = NULL;
        size_t i;

        *nr_bad = 0; *first_error = 0;
        if ( !frames || !errs ) {
            *first_error = ENOMEM;
            goto out;
        }
        for ( i = 0; i < nr; i++ )
            frames[i] = gfns[i];
        map = xenforeignmemory_map(fmem, domid, writable ? PROT_READ | PROT_WRITE : PROT_READ,
                                   nr, frames, errs);
        if ( !map )
            *first_error = errno;
        for ( i = 0; map && i < nr; i++ )
            if ( errs[i] ) {   /* negative in practice, positive by the header: take both */
                ++*nr_bad;
                if ( !*first_error )
                    *first_error = abs(errs[i]);
            }
    out:
        free(frames); free(errs);
        return map;
    }

    static void *xshm_foreign_map(xenforeignmemory_handle *fmem, uint32_t domid, int writable,
                                  uint64_t first_gfn, size_t nr, size_t *nr_bad, int *first_error)
    {
        uint64_t *gfns = calloc(nr, sizeof *gfns);
        void *map;
        size_t i;

        *nr_bad = 0; *first_error = ENOMEM;
        if ( !gfns )
            return NULL;
        for ( i = 0; i < nr; i++ )
            gfns[i] = first_gfn + i;
        map = xshm_foreign_map_frames(fmem, domid, writable, gfns, nr, nr_bad, first_error);
        free(gfns);
        return map;
    }

    static int xshm_outside(const xshm_piece *pieces, uint32_t nr, uint64_t size)
    {
        uint32_t i;

        for ( i = 0; i < nr; i++ )
            if ( pieces[i].length > size || pieces[i].offset > size - pieces[i].length )
                return 1;
        return 0;
    }

    /* Copies until either list ends.  Returns the bytes, or -ERANGE, and then nothing is copied, if
     * a piece is not in its memory: others have checked that, but none so near to the copy. */
    static int64_t xshm_scatter_copy(void *target, uint64_t target_size, const xshm_piece *into,
                                     uint32_t nr_into, const void *source, uint64_t source_size,
                                     const xshm_piece *from, uint32_t nr_from)
    {
        uint64_t done_into = 0, done_from = 0, total = 0;
        uint32_t i = 0, j = 0;

        if ( xshm_outside(into, nr_into, target_size) || xshm_outside(from, nr_from, source_size) )
            return -ERANGE;
        while ( i < nr_into && j < nr_from ) {
            uint64_t room = into[i].length - done_into, rest = from[j].length - done_from;
            uint64_t n = room < rest ? room : rest;

            memcpy((char *)target + into[i].offset + done_into,
                   (const char *)source + from[j].offset + done_from, n);
            total += n;
            done_into += n;
            done_from += n;
            if ( done_into == into[i].length ) {
                i++;
                done_into = 0;
            }
            if ( done_from == from[j].length ) {
                j++;
                done_from = 0;
            }
        }
        return (int64_t)total;
    }

    /* Who sees the count sees all that was copied before it. */
    static void xshm_store_count(void *word, uint64_t count)
    {
        __atomic_store_n((uint64_t *)word, count, __ATOMIC_RELEASE);
    }

    /* present[i] = whether dom0 can map gfns[i] of the domain.  Returns 0 or -errno. */
    static int xshm_foreign_probe(xenforeignmemory_handle *fmem, uint32_t domid,
                                  const uint64_t *gfns, size_t nr, uint8_t *present)
    {
        xen_pfn_t *frames = calloc(nr, sizeof *frames);
        int *errs = calloc(nr, sizeof *errs), rc = 0;
        void *map;
        size_t i;

        if ( !frames || !errs ) {
            free(frames); free(errs);
            return -ENOMEM;
        }
        for ( i = 0; i < nr; i++ )
            frames[i] = gfns[i];
        map = xenforeignmemory_map(fmem, domid, PROT_READ, nr, frames, errs);
        if ( !map )
            rc = -errno;
        else {
            for ( i = 0; i < nr; i++ )
                present[i] = errs[i] == 0;
            xenforeignmemory_unmap(fmem, map, nr);
        }
        free(frames); free(errs);
        return rc;
    }

    /* The first frames of a domain's grant table, which Xen makes as large as is asked for
     * (xen/common/grant_table.c, gnttab_acquire_resource()). */
    static xenforeignmemory_resource_handle *xshm_grant_table(xenforeignmemory_handle *fmem,
                                                              uint16_t domid,
                                                              uint32_t nr_table_frames,
                                                              void **table)
    {
        *table = NULL;
        return xenforeignmemory_map_resource(
            fmem, domid, XENMEM_resource_grant_table, XENMEM_resource_grant_table_id_shared, 0,
            nr_table_frames, table, PROT_READ | PROT_WRITE, 0);
    }

    #define XSHM_IN_USE (GTF_reading | GTF_writing)   /* set and cleared by Xen alone */

    /* Returns how many entries could not be written, as a domain still maps what they gave it. */
    static uint32_t xshm_grants_write(void *table, uint32_t first_ref, uint32_t nr,
                                      uint16_t domid, uint32_t first_gfn, int readonly)
    {
        grant_entry_v1_t *entry = (grant_entry_v1_t *)table + first_ref;
        uint16_t flags = GTF_permit_access | (readonly ? GTF_readonly : 0);
        uint32_t i, busy = 0;

        for ( i = 0; i < nr; i++, entry++ ) {
            uint16_t found = __atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE);
            if ( (found & ~XSHM_IN_USE) == flags && entry->domid == domid &&
                 entry->frame == first_gfn + i )
                continue;   /* done by an attempt that was cut off */
            if ( found & XSHM_IN_USE ) {
                busy++;
                continue;
            }
            __atomic_store_n(&entry->flags, 0, __ATOMIC_RELEASE);
            entry->domid = domid;
            entry->frame = first_gfn + i;
            __atomic_store_n(&entry->flags, flags, __ATOMIC_RELEASE);
        }
        return busy;
    }

    /* Returns how many entries a domain still maps.  Of those what Xen set is kept, so that it can
     * be seen when it is gone; no type, so that nobody maps them anew; and read-only, so that who
     * maps one for reading does not come to write (_set_status_v1() asks a domain that has an entry
     * mapped for nothing else). */
    static uint32_t xshm_grants_end(void *table, uint32_t first_ref, uint32_t nr)
    {
        grant_entry_v1_t *entry = (grant_entry_v1_t *)table + first_ref;
        uint32_t i, in_use = 0;

        for ( i = 0; i < nr; i++, entry++ ) {
            uint16_t found = __atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE), left;
            do
                left = found & XSHM_IN_USE ? (found & XSHM_IN_USE) | GTF_readonly : 0;
            while ( !__atomic_compare_exchange_n(&entry->flags, &found, left, 0,
                                                 __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE) );
            in_use += !!left;
        }
        return in_use;
    }

    static uint32_t xshm_grants_in_use(const void *table, uint32_t first_ref, uint32_t nr)
    {
        const grant_entry_v1_t *entry = (const grant_entry_v1_t *)table + first_ref;
        uint32_t i, in_use = 0;

        for ( i = 0; i < nr; i++, entry++ )
            in_use += !!(__atomic_load_n(&entry->flags, __ATOMIC_RELAXED) & XSHM_IN_USE);
        return in_use;
    }

    static xengnttab_handle *xshm_gnttab_open(void)
    {
        /* As of libxenctrl, below: every error comes back and is reported by us. */
        return xengnttab_open((xentoollog_logger *)
                              xtl_createlogger_stdiostream(stderr, XTL_CRITICAL, 0), 0);
    }

    static void *xshm_gnttab_map(xengnttab_handle *xgt, uint32_t domid, uint32_t first_ref,
                                 uint32_t nr, int writable)
    {
        uint32_t *refs = calloc(nr, sizeof *refs), i;
        void *map = NULL;

        for ( i = 0; refs && i < nr; i++ )
            refs[i] = first_ref + i;
        if ( refs )
            map = xengnttab_map_domain_grant_refs(
                xgt, nr, domid, refs, writable ? PROT_READ | PROT_WRITE : PROT_READ);
        i = errno;
        free(refs);
        errno = i;
        return map;
    }
    """,
    libraries=list(STABLE_LIBRARIES),
    extra_compile_args=list(COMPILE_ARGS),
    py_limited_api=True,
    # Without Xen's headers the package still installs: every unit test runs, and xen/_ffi.py says
    # what is missing to whoever needs the module.
    optional=True,
)

XENCTRL = FFI()
XENCTRL.cdef(
    """
    typedef struct xc_interface_core xc_interface;
    typedef uint64_t xen_pfn_t;

    xc_interface *xshm_xc_open(void);
    int xc_interface_close(xc_interface *xch);

    typedef struct { uint8_t handle[16]; uint32_t flags, max_vcpus, max_evtchn_port;
                     int32_t max_grant_frames, max_maptrack_frames; uint32_t grant_opts,
                     vmtrace_size, emulation_flags; } xshm_recipe;
    void xshm_holder_recipe(const uint8_t handle[16], xshm_recipe *out);
    int xshm_create_holder(xc_interface *xch, const uint8_t handle[16], uint32_t nr_grant_frames,
                           uint32_t *domid);
    int xc_domain_max_vcpus(xc_interface *xch, uint32_t domid, unsigned int max);
    int xc_domain_setmaxmem(xc_interface *xch, uint32_t domid, uint64_t max_memkb);
    int xc_domain_set_target(xc_interface *xch, uint32_t domid, uint32_t target);
    int xc_domain_pause(xc_interface *xch, uint32_t domid);
    int xc_domain_unpause(xc_interface *xch, uint32_t domid);
    int xc_domain_destroy(xc_interface *xch, uint32_t domid);
    int xc_domain_shutdown(xc_interface *xch, uint32_t domid, int reason);
    int xc_get_paging_mempool_size(xc_interface *xch, uint32_t domid, uint64_t *size);
    int xc_set_paging_mempool_size(xc_interface *xch, uint32_t domid, uint64_t size);
    int xc_domain_populate_physmap(xc_interface *xch, uint32_t domid, unsigned long nr_extents,
                                   unsigned int extent_order, unsigned int mem_flags,
                                   xen_pfn_t *extent_start);
    int xc_domain_decrease_reservation(xc_interface *xch, uint32_t domid,
                                       unsigned long nr_extents, unsigned int extent_order,
                                       xen_pfn_t *extent_start);
    int xc_domain_cacheflush(xc_interface *xch, uint32_t domid, xen_pfn_t start, xen_pfn_t nr);
    int xc_evtchn_alloc_unbound(xc_interface *xch, uint32_t domid, uint32_t remote_dom);
    int xc_domain_iomem_permission(xc_interface *xch, uint32_t domid, unsigned long first_mfn,
                                   unsigned long nr_mfns, uint8_t allow_access);
    int xc_domain_memory_mapping(xc_interface *xch, uint32_t domid, unsigned long first_gfn,
                                 unsigned long first_mfn, unsigned long nr_mfns,
                                 uint32_t add_mapping);

    typedef struct { uint64_t address, size; uint32_t kind; } xshm_range;
    int xshm_set_memory_map(xc_interface *xch, uint32_t domid, const xshm_range *ranges,
                            uint32_t nr);
    int xshm_machine_memory_map(xc_interface *xch, xshm_range *out, uint32_t capacity);
    int xshm_entry_register(xc_interface *xch, uint32_t domid, uint64_t *out);

    typedef struct { uint32_t domid, flags, max_vcpu_id, nr_online_vcpus, gpaddr_bits;
                     uint64_t tot_pages, max_pages, cpu_time; uint8_t handle[16]; } xshm_info;
    int xshm_domain_list(xc_interface *xch, uint32_t first, unsigned int max, xshm_info *out);

    typedef struct { uint32_t major, minor, has_hvm, has_hap; uint64_t total_pages, free_pages;
                     char extra[17]; char command_line[1025]; int is_arm; } xshm_host;
    int xshm_host_info(xc_interface *xch, xshm_host *out);

    #define XEN_DOMINF_dying ...
    #define XEN_DOMINF_hvm_guest ...
    #define XEN_DOMINF_shutdown ...
    #define XEN_DOMINF_paused ...
    #define XEN_DOMINF_hap ...
    #define XEN_DOMINF_shutdownmask ...
    #define XEN_DOMINF_shutdownshift ...
    """
)
XENCTRL.set_source(
    "xshmd.xen._xenctrl",
    r"""
    #include <alloca.h>   /* cffi's own code */
    #include <errno.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <string.h>
    #include <xenctrl.h>
    #include <xentoollog.h>
    #include <xen/hvm/save.h>

    typedef struct { uint64_t address, size; uint32_t kind; } xshm_range;
    typedef struct { uint8_t handle[16]; uint32_t flags, max_vcpus, max_evtchn_port;
                     int32_t max_grant_frames, max_maptrack_frames; uint32_t grant_opts,
                     vmtrace_size, emulation_flags; } xshm_recipe;
    typedef struct { uint32_t domid, flags, max_vcpu_id, nr_online_vcpus, gpaddr_bits;
                     uint64_t tot_pages, max_pages, cpu_time; uint8_t handle[16]; } xshm_info;
    typedef struct { uint32_t major, minor, has_hvm, has_hap; uint64_t total_pages, free_pages;
                     char extra[17]; char command_line[1025]; int is_arm; } xshm_host;

    static xc_interface *xshm_xc_open(void)
    {
        /* libxenctrl's own complaints would go to stderr without a domain's name or a remedy;
         * every error comes back as an errno, and is reported by us with both. */
        xentoollog_logger *quiet = (xentoollog_logger *)
            xtl_createlogger_stdiostream(stderr, XTL_CRITICAL, 0);
        return xc_interface_open(quiet, quiet, 0);
    }

    /* The holder: looks like an ordinary HVM guest, has a vCPU 0 that never runs, no event channel
     * but the reserved port 0, the smallest grant table there is, no maptrack. */
    static void xshm_fill(const uint8_t handle[16], struct xen_domctl_createdomain *c)
    {
        memset(c, 0, sizeof *c);
        memcpy(c->handle, handle, 16);
        c->flags = XEN_DOMCTL_CDF_hvm | XEN_DOMCTL_CDF_hap;
        c->max_vcpus = 1;
        c->max_evtchn_port = 0;
        c->max_grant_frames = 1;
        c->max_maptrack_frames = 0;
        c->grant_opts = XEN_DOMCTL_GRANT_version(1);
    #if defined(__x86_64__)
        c->arch.emulation_flags =
            XEN_X86_EMU_ALL & ~(XEN_X86_EMU_VPCI | XEN_X86_EMU_USE_PIRQ);
    #elif defined(__aarch64__)
        c->arch.gic_version = XEN_DOMCTL_CONFIG_GIC_NATIVE;
    #else
    #error "Xen runs this project's guests on x86_64 and arm64 only"
    #endif
    }

    static void xshm_holder_recipe(const uint8_t handle[16], xshm_recipe *out)
    {
        struct xen_domctl_createdomain c;
        xshm_fill(handle, &c);
        memset(out, 0, sizeof *out);
        memcpy(out->handle, c.handle, 16);
        out->flags = c.flags;
        out->max_vcpus = c.max_vcpus;
        out->max_evtchn_port = c.max_evtchn_port;
        out->max_grant_frames = c.max_grant_frames;
        out->max_maptrack_frames = c.max_maptrack_frames;
        out->grant_opts = c.grant_opts;
        out->vmtrace_size = c.vmtrace_size;
    #if defined(__x86_64__)
        out->emulation_flags = c.arch.emulation_flags;
    #endif
    }

    /* One that serves grants differs in nothing but the most its grant table may grow to. */
    static int xshm_create_holder(xc_interface *xch, const uint8_t handle[16],
                                  uint32_t nr_grant_frames, uint32_t *domid)
    {
        struct xen_domctl_createdomain c;
        xshm_fill(handle, &c);
        c.max_grant_frames = nr_grant_frames;
        *domid = 0x7FF5;   /* DOMID_ANY, by number: the name is younger than Xen 4.18's headers */
        return xc_domain_create(xch, domid, &c);
    }

    /* x86's E820 maps, and what is in a vCPU's registers: Arm has neither, and says ENOSYS. */
    #if defined(__x86_64__)
    static int xshm_set_memory_map(xc_interface *xch, uint32_t domid, const xshm_range *ranges,
                                   uint32_t nr)
    {
        struct e820entry entries[E820MAX];
        uint32_t i;

        if ( nr > E820MAX ) {
            errno = EINVAL;
            return -1;
        }
        for ( i = 0; i < nr; i++ ) {
            entries[i].addr = ranges[i].address;
            entries[i].size = ranges[i].size;
            entries[i].type = ranges[i].kind;
        }
        return xc_domain_set_memory_map(xch, domid, entries, nr);
    }

    static int xshm_machine_memory_map(xc_interface *xch, xshm_range *out, uint32_t capacity)
    {
        struct e820entry entries[E820MAX];
        int n, i;

        n = xc_get_machine_memory_map(xch, entries, capacity < E820MAX ? capacity : E820MAX);
        for ( i = 0; i < n; i++ ) {
            out[i].address = entries[i].addr;
            out[i].size = entries[i].size;
            out[i].kind = entries[i].type;
        }
        return n;
    }

    static int xshm_entry_register(xc_interface *xch, uint32_t domid, uint64_t *out)
    {
        HVM_SAVE_TYPE(CPU) cpu;

        if ( xc_domain_hvm_getcontext_partial(xch, domid, HVM_SAVE_CODE(CPU), 0, &cpu,
                                              sizeof cpu) )
            return -1;
        *out = cpu.rbx;
        return 0;
    }
    #else
    static int xshm_unknown_here(void) { errno = ENOSYS; return -1; }
    static int xshm_set_memory_map(xc_interface *xch, uint32_t domid, const xshm_range *ranges,
                                   uint32_t nr)
    {
        (void)xch; (void)domid; (void)ranges; (void)nr;
        return xshm_unknown_here();
    }
    static int xshm_machine_memory_map(xc_interface *xch, xshm_range *out, uint32_t capacity)
    {
        (void)xch; (void)out; (void)capacity;
        return xshm_unknown_here();
    }
    static int xshm_entry_register(xc_interface *xch, uint32_t domid, uint64_t *out)
    {
        (void)xch; (void)domid; (void)out;
        return xshm_unknown_here();
    }
    #endif

    static int xshm_domain_list(xc_interface *xch, uint32_t first, unsigned int max, xshm_info *out)
    {
        xc_domaininfo_t infos[64];
        int n, i;

        n = xc_domain_getinfolist(xch, first, max < 64 ? max : 64, infos);
        for ( i = 0; i < n; i++ ) {
            memset(&out[i], 0, sizeof out[i]);
            out[i].domid = infos[i].domain;
            out[i].flags = infos[i].flags;
            out[i].max_vcpu_id = infos[i].max_vcpu_id;
            out[i].nr_online_vcpus = infos[i].nr_online_vcpus;
            out[i].gpaddr_bits = infos[i].gpaddr_bits;
            out[i].tot_pages = infos[i].tot_pages;
            out[i].max_pages = infos[i].max_pages;
            out[i].cpu_time = infos[i].cpu_time;
            memcpy(out[i].handle, infos[i].handle, 16);
        }
        return n;
    }

    static int xshm_host_info(xc_interface *xch, xshm_host *out)
    {
        xc_physinfo_t phys;
        xen_extraversion_t extra;
        xen_commandline_t command_line;
        int version;

        memset(out, 0, sizeof *out);
        memset(&phys, 0, sizeof phys);
        memset(extra, 0, sizeof extra);
        memset(command_line, 0, sizeof command_line);
        version = xc_version(xch, XENVER_version, NULL);
        if ( version < 0 || xc_version(xch, XENVER_extraversion, &extra) < 0 ||
             xc_version(xch, XENVER_commandline, &command_line) < 0 || xc_physinfo(xch, &phys) )
            return -1;
        out->major = version >> 16;
        out->minor = version & 0xffff;
        memcpy(out->extra, extra, 16);
        memcpy(out->command_line, command_line, 1024);
        out->has_hvm = !!(phys.capabilities & XEN_SYSCTL_PHYSCAP_hvm);
        out->has_hap = !!(phys.capabilities & XEN_SYSCTL_PHYSCAP_hap);
        out->total_pages = phys.total_pages;
        out->free_pages = phys.free_pages;
    #if defined(__aarch64__)
        out->is_arm = 1;
    #endif
        return 0;
    }
    """,
    libraries=list(XENCTRL_LIBRARIES),
    extra_compile_args=list(COMPILE_ARGS),
    py_limited_api=True,
    optional=True,
)

EVTCHN = FFI()
EVTCHN.cdef(
    """
    typedef struct xshm_relay xshm_relay;
    xshm_relay *xshm_relay_open(uint32_t capacity, int *error);
    void xshm_relay_close(xshm_relay *relay);
    int xshm_relay_fd(xshm_relay *relay);
    int xshm_relay_run(xshm_relay *relay);
    void xshm_relay_stop(xshm_relay *relay);
    int xshm_relay_bind(xshm_relay *relay, uint32_t domid, uint32_t port);
    int xshm_relay_unbind(xshm_relay *relay, uint32_t local);
    int xshm_relay_notify(xshm_relay *relay, uint32_t local);
    int xshm_relay_unmask(xshm_relay *relay, uint32_t local);
    int xshm_relay_to(xshm_relay *relay, uint32_t from, uint32_t to);
    uint64_t xshm_relay_rings(xshm_relay *relay, uint32_t local);
    uint64_t xshm_relay_held(xshm_relay *relay);
    int xshm_evtchn_allocate(xshm_relay *relay, uint16_t domid, uint16_t remote);
    int xshm_evtchn_status(xshm_relay *relay, uint16_t domid, uint32_t port,
                           uint32_t *remote, uint32_t *remote_port);
    #define EVTCHNSTAT_unbound ...
    #define EVTCHNSTAT_interdomain ...
    """
)
EVTCHN.set_source(
    "xshmd.xen._evtchn",
    r"""
    #define __XEN_TOOLS__ 1   /* today's numbers of hypercalls, not those of Xen 3.2 */
    #include <alloca.h>   /* cffi's own code */
    #include <errno.h>
    #include <fcntl.h>
    #include <poll.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/eventfd.h>
    #include <sys/socket.h>
    #include <time.h>
    #include <unistd.h>
    #include <xencall.h>
    #include <xenevtchn.h>
    #include <xen/xen.h>
    #include <xen/event_channel.h>

    /* A doorbell that rings more often than this in one tick stays masked until the next: what its
     * guest does with it costs dom0 no more.  Masked, it goes on taking rings: none is lost. */
    #define XSHM_RINGS_A_TICK 1000
    #define XSHM_TICK_MS 10
    #define XSHM_BATCH 256
    #define XSHM_TELL UINT32_MAX      /* a port whose rings are not passed on but reported */

    struct xshm_port {
        uint32_t to;                  /* 0: nowhere (no port has that number) */
        uint32_t tick, rings_in_tick;
        uint64_t rings;
    };
    typedef struct xshm_relay {
        xenevtchn_handle *evtchn;
        xencall_handle *call;
        void *buffer;                 /* for the two hypercalls that libxenevtchn does not have */
        int stop_fd, told_fd[2];
        uint32_t capacity, nr_late;
        uint64_t held;
        struct xshm_port *ports;
        uint32_t *late;               /* ports that stay masked until the next tick */
    } xshm_relay;

    static void xshm_relay_close(xshm_relay *relay)
    {
        if ( relay->buffer )
            xencall_free_buffer(relay->call, relay->buffer);
        if ( relay->call )
            xencall_close(relay->call);
        if ( relay->evtchn )
            xenevtchn_close(relay->evtchn);
        if ( relay->stop_fd >= 0 )
            close(relay->stop_fd);
        if ( relay->told_fd[0] >= 0 ) {
            close(relay->told_fd[0]);
            close(relay->told_fd[1]);
        }
        free(relay->ports);
        free(relay->late);
        free(relay);
    }

    static xshm_relay *xshm_relay_open(uint32_t capacity, int *error)
    {
        xshm_relay *relay = calloc(1, sizeof *relay);

        if ( !relay ) {
            *error = ENOMEM;
            return NULL;
        }
        relay->stop_fd = relay->told_fd[0] = relay->told_fd[1] = -1;
        relay->capacity = capacity;
        relay->ports = calloc(capacity, sizeof *relay->ports);
        relay->late = calloc(capacity, sizeof *relay->late);
        if ( relay->ports && relay->late &&
             (relay->evtchn = xenevtchn_open(NULL, 0)) != NULL &&
             (relay->call = xencall_open(NULL, 0)) != NULL &&
             (relay->buffer = xencall_alloc_buffer(relay->call, 64)) != NULL &&
             (relay->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) >= 0 &&
             socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0,
                        relay->told_fd) == 0 &&
             fcntl(xenevtchn_fd(relay->evtchn), F_SETFL, O_NONBLOCK) == 0 )
            return relay;
        *error = errno ? errno : ENOMEM;
        xshm_relay_close(relay);
        return NULL;
    }

    static int xshm_relay_fd(xshm_relay *relay) { return relay->told_fd[0]; }

    static uint32_t xshm_now_ms(void)
    {
        struct timespec now;

        clock_gettime(CLOCK_MONOTONIC, &now);
        return (uint32_t)(now.tv_sec * 1000 + now.tv_nsec / 1000000);
    }

    /* To write a port to the device is to unmask it. */
    static void xshm_unmask(xshm_relay *relay, const uint32_t *ports, uint32_t nr)
    {
        ssize_t done;

        do
            done = write(xenevtchn_fd(relay->evtchn), ports, nr * sizeof *ports);
        while ( done < 0 && errno == EINTR );
    }

    /* Passes one ring on; returns whether the port may be unmasked at once. */
    static int xshm_pass(xshm_relay *relay, uint32_t local, uint32_t tick)
    {
        struct xshm_port *port;
        uint32_t to;

        if ( local >= relay->capacity )
            return 1;
        port = &relay->ports[local];
        __atomic_fetch_add(&port->rings, 1, __ATOMIC_RELAXED);
        to = __atomic_load_n(&port->to, __ATOMIC_ACQUIRE);
        if ( to == XSHM_TELL )        /* whoever reads it unmasks it: one report a port at a time */
            return write(relay->told_fd[1], &local, sizeof local) != sizeof local;
        if ( to )
            xenevtchn_notify(relay->evtchn, to);
        if ( port->tick != tick ) {
            port->tick = tick;
            port->rings_in_tick = 0;
        }
        if ( ++port->rings_in_tick < XSHM_RINGS_A_TICK )
            return 1;
        relay->late[relay->nr_late++] = local;
        __atomic_fetch_add(&relay->held, 1, __ATOMIC_RELAXED);
        return 0;
    }

    /* Passes rings on until xshm_relay_stop(); returns 0, or -errno. */
    static int xshm_relay_run(xshm_relay *relay)
    {
        int fd = xenevtchn_fd(relay->evtchn);
        uint32_t rung[XSHM_BATCH];
        struct pollfd fds[2] = { { fd, POLLIN, 0 }, { relay->stop_fd, POLLIN, 0 } };

        for (;;) {
            uint32_t now = xshm_now_ms(), tick = now / XSHM_TICK_MS, nr_open = 0;
            int wait_ms = relay->nr_late ? (int)(XSHM_TICK_MS - now % XSHM_TICK_MS) : -1;
            ssize_t got;

            if ( poll(fds, 2, wait_ms) < 0 ) {
                if ( errno == EINTR )
                    continue;
                return -errno;
            }
            if ( fds[1].revents )
                return 0;
            now = xshm_now_ms();
            if ( relay->nr_late && now / XSHM_TICK_MS != tick ) {
                xshm_unmask(relay, relay->late, relay->nr_late);
                relay->nr_late = 0;
            }
            tick = now / XSHM_TICK_MS;
            got = read(fd, rung, sizeof rung);
            if ( got < 0 ) {
                if ( errno == EAGAIN || errno == EINTR )
                    continue;
                return -errno;
            }
            for ( size_t i = 0; i < got / sizeof *rung; i++ ) {
                uint32_t local = rung[i];

                if ( xshm_pass(relay, local, tick) )
                    rung[nr_open++] = local;
            }
            if ( nr_open )
                xshm_unmask(relay, rung, nr_open);
        }
    }

    static void xshm_relay_stop(xshm_relay *relay)
    {
        uint64_t one = 1;

        (void)!write(relay->stop_fd, &one, sizeof one);
    }

    static int xshm_relay_to(xshm_relay *relay, uint32_t from, uint32_t to)
    {
        if ( from >= relay->capacity )
            return -ERANGE;
        __atomic_store_n(&relay->ports[from].to, to, __ATOMIC_RELEASE);
        return 0;
    }

    static int xshm_relay_bind(xshm_relay *relay, uint32_t domid, uint32_t port)
    {
        int local = xenevtchn_bind_interdomain(relay->evtchn, domid, port);

        if ( local < 0 )
            return -errno;
        if ( (uint32_t)local >= relay->capacity ) {
            xenevtchn_unbind(relay->evtchn, local);
            return -ERANGE;
        }
        return local;
    }

    static int xshm_relay_unbind(xshm_relay *relay, uint32_t local)
    {
        int rc;

        xshm_relay_to(relay, local, 0);
        rc = xenevtchn_unbind(relay->evtchn, local) ? -errno : 0;
        if ( local < relay->capacity )
            __atomic_store_n(&relay->ports[local].rings, 0, __ATOMIC_RELAXED);
        return rc;
    }

    static int xshm_relay_notify(xshm_relay *relay, uint32_t local)
    {
        return xenevtchn_notify(relay->evtchn, local) ? -errno : 0;
    }

    static int xshm_relay_unmask(xshm_relay *relay, uint32_t local)
    {
        return xenevtchn_unmask(relay->evtchn, local) ? -errno : 0;
    }

    static uint64_t xshm_relay_rings(xshm_relay *relay, uint32_t local)
    {
        return local < relay->capacity ?
               __atomic_load_n(&relay->ports[local].rings, __ATOMIC_RELAXED) : 0;
    }

    static uint64_t xshm_relay_held(xshm_relay *relay)
    {
        return __atomic_load_n(&relay->held, __ATOMIC_RELAXED);
    }

    /* A port of a domain, to be bound by the remote one; returns it, or -errno. */
    static int xshm_evtchn_allocate(xshm_relay *relay, uint16_t domid, uint16_t remote)
    {
        struct evtchn_alloc_unbound *arg = relay->buffer;

        memset(arg, 0, sizeof *arg);
        arg->dom = domid;
        arg->remote_dom = remote;
        if ( xencall2(relay->call, __HYPERVISOR_event_channel_op, EVTCHNOP_alloc_unbound,
                      (uint64_t)(uintptr_t)arg) < 0 )
            return -errno;
        return arg->port;
    }

    /* What a port of a domain is: EVTCHNSTAT_*, or -errno. */
    static int xshm_evtchn_status(xshm_relay *relay, uint16_t domid, uint32_t port,
                                  uint32_t *remote, uint32_t *remote_port)
    {
        struct evtchn_status *arg = relay->buffer;

        memset(arg, 0, sizeof *arg);
        arg->dom = domid;
        arg->port = port;
        if ( xencall2(relay->call, __HYPERVISOR_event_channel_op, EVTCHNOP_status,
                      (uint64_t)(uintptr_t)arg) < 0 )
            return -errno;
        *remote = arg->status == EVTCHNSTAT_unbound ? arg->u.unbound.dom : arg->u.interdomain.dom;
        *remote_port = arg->status == EVTCHNSTAT_interdomain ? arg->u.interdomain.port : 0;
        return arg->status;
    }
    """,
    libraries=list(EVTCHN_LIBRARIES),
    extra_compile_args=list(COMPILE_ARGS),
    py_limited_api=True,
    optional=True,
)

_MODULES = (
    ("xshmd.xen._stable", STABLE, STABLE_LIBRARIES),
    ("xshmd.xen._xenctrl", XENCTRL, XENCTRL_LIBRARIES),
    ("xshmd.xen._evtchn", EVTCHN, EVTCHN_LIBRARIES),
)


def emit(directory: Path) -> list[dict[str, object]]:
    """Write each module's C source into ``directory``; return what to compile and link."""
    directory.mkdir(parents=True, exist_ok=True)
    recipes: list[dict[str, object]] = []
    for module, builder, libraries in _MODULES:
        c_file = directory / f"{module.rpartition('.')[2]}.c"
        with contextlib.redirect_stdout(sys.stderr):  # it chats; stdout is for our JSON
            builder.emit_c_code(str(c_file))
        recipes.append({"module": module, "c_file": str(c_file), "libraries": list(libraries)})
    return recipes


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "emit":
        sys.exit("usage: cffi_build.py emit OUTDIR")
    print(json.dumps(emit(Path(sys.argv[2])), indent=1))
