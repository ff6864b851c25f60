/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * xshmd.xen._stable: mappings, foreign memory and grants, by Xen's libraries that keep their ABI.
 * stable.cdef.h says what of it Python calls. All is static, as cffi puts this text at the top of
 * the module's C (cffi_build.py).
 */

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

/* Others decrement the word too, and may write anything into it; -1: nothing is left of it.
 * One that writes there without end could foil every try, on Arm one that never ends (XSA-295):
 * so each is a single one, there are not many, and then it is as if the word had come to 0. */
#define XSHM_TRIES 100000
#ifdef __aarch64__
__attribute__((target("no-outline-atomics")))   /* whose helper tries for ever itself */
#endif
static int64_t xshm_decrement(void *at)
{
    uint32_t *word = at, left = __atomic_load_n(word, __ATOMIC_RELAXED), tries;

    for ( tries = XSHM_TRIES; left && tries; tries-- )
        if ( __atomic_compare_exchange_n(word, &left, left - 1, 1, __ATOMIC_SEQ_CST,
                                         __ATOMIC_RELAXED) )
            return left - 1;
    return left ? 0 : -1;
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

/* Frames of a domain's grant table, which Xen makes as large as is asked for
 * (xen/common/grant_table.c, gnttab_acquire_resource()). */
static xenforeignmemory_resource_handle *xshm_grant_table(xenforeignmemory_handle *fmem,
                                                          uint16_t domid,
                                                          uint32_t first_frame,
                                                          uint32_t nr_table_frames,
                                                          void **table)
{
    *table = NULL;
    return xenforeignmemory_map_resource(
        fmem, domid, XENMEM_resource_grant_table, XENMEM_resource_grant_table_id_shared,
        first_frame, nr_table_frames, table, PROT_READ | PROT_WRITE, 0);
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

/* Returns how many entries are anybody's but this domain's, or mapped. */
static uint32_t xshm_grants_of_others(const void *table, uint32_t first_ref, uint32_t nr,
                                      uint16_t domid)
{
    const grant_entry_v1_t *entry = (const grant_entry_v1_t *)table + first_ref;
    uint32_t i, taken = 0;

    for ( i = 0; i < nr; i++, entry++ ) {
        uint16_t flags = __atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE);
        taken += flags && ((flags & XSHM_IN_USE) || entry->domid != domid);
    }
    return taken;
}

typedef struct {
    uint32_t first_ref, nr_refs;
    const xshm_piece *pieces;
    uint32_t nr;
} xshm_granted;

/* Has Xen copy (GNTTABOP_copy); whether it did all of it. */
static int xshm_have_copied(xengnttab_handle *xgt, xengnttab_grant_copy_segment_t *segments,
                            uint32_t nr)
{
    uint32_t i;

    if ( xengnttab_grant_copy(xgt, nr, segments) )
        return -errno;
    for ( i = 0; i < nr; i++ )
        if ( segments[i].status != GNTST_okay )
            return -EINVAL;
    return 0;
}

/* As xshm_scatter_copy(), of bytes that lie one after the other in what references lead to. */
static int64_t xshm_grant_copy(xengnttab_handle *xgt, uint16_t domid, const xshm_granted *into,
                               const xshm_granted *from)
{
    uint64_t done_into = 0, done_from = 0, total = 0;
    uint32_t i = 0, j = 0, k, nr = 0, nr_refs = into->nr_refs + from->nr_refs;
    /* Each segment ends where a frame ends, or a piece. */
    xengnttab_grant_copy_segment_t *segments =
        calloc((size_t)nr_refs + into->nr + from->nr, sizeof *segments);
    char seen;
    int rc;

    if ( !segments )
        return -ENOMEM;
    rc = -ERANGE;
    if ( xshm_outside(into->pieces, into->nr, into->nr_refs * (uint64_t)4096) ||
         xshm_outside(from->pieces, from->nr, from->nr_refs * (uint64_t)4096) )
        goto out;
    /* Xen goes from frame to frame: that all are there is seen first, by a byte of each. */
    for ( k = 0; k < nr_refs; k++ ) {
        segments[k].source.foreign.ref = k < into->nr_refs ?
            into->first_ref + k : from->first_ref + (k - into->nr_refs);
        segments[k].source.foreign.domid = domid;
        segments[k].dest.virt = &seen;
        segments[k].len = 1;
        segments[k].flags = GNTCOPY_source_gref;
    }
    rc = xshm_have_copied(xgt, segments, nr_refs);
    if ( rc )
        goto out;
    while ( i < into->nr && j < from->nr ) {
        uint64_t at = into->pieces[i].offset + done_into;
        uint64_t start = from->pieces[j].offset + done_from;
        uint64_t n = into->pieces[i].length - done_into;

        if ( n > from->pieces[j].length - done_from )
            n = from->pieces[j].length - done_from;
        if ( n > 4096 - at % 4096 )
            n = 4096 - at % 4096;
        if ( n > 4096 - start % 4096 )
            n = 4096 - start % 4096;
        segments[nr].source.foreign.ref = from->first_ref + (uint32_t)(start / 4096);
        segments[nr].source.foreign.offset = start % 4096;
        segments[nr].source.foreign.domid = domid;
        segments[nr].dest.foreign.ref = into->first_ref + (uint32_t)(at / 4096);
        segments[nr].dest.foreign.offset = at % 4096;
        segments[nr].dest.foreign.domid = domid;
        segments[nr].len = n;
        segments[nr].flags = GNTCOPY_source_gref | GNTCOPY_dest_gref;
        nr++;
        total += n;
        done_into += n;
        done_from += n;
        if ( done_into == into->pieces[i].length ) {
            i++;
            done_into = 0;
        }
        if ( done_from == from->pieces[j].length ) {
            j++;
            done_from = 0;
        }
    }
    rc = xshm_have_copied(xgt, segments, nr);
 out:
    free(segments);
    return rc ? rc : (int64_t)total;
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
