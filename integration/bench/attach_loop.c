/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The attach benchmark's other side: what xshmd asks of Xen, asked from C with nothing around it.
 *
 * The same hypercalls as xshmd/xen (c/stable.c): XENMEM_add_to_physmap_batch of 16384 entries
 * in rising order of frames, XENMEM_remove_from_physmap by multicalls of 512; buffers of libxencall,
 * so nothing is bounced; error slots poisoned before and every one looked at after.
 *
 * One command a line on stdin, one answer a line on stdout: "ok NANOSECONDS HYPERCALLS" or
 * "failed ...".  It stays open for the whole benchmark, so that starting it is in no figure.
 *
 *   null COUNT                                 COUNT times XENVER_version
 *   map GUEST HOLDER GUEST_GFN HOLDER_GFN NR   map the holder's frames into the guest
 *   single DOMID GFN NR                        remove the frames, one hypercall each
 *   multi DOMID GFN NR                         remove the frames, by multicall
 *   fill DOMID GFN NR SEED                     write a word of its own into every page
 *   check DOMID GFN NR SEED                    read those words back
 *   grant HOLDER REF GFN NR DOMID              write entries of the holder's grant table
 *   gntdev HOLDER REF NR                       map them, and unmap them
 *
 * The words of a command may be arguments instead: then it is the only one.
 */
#define __XEN_TOOLS__ 1 /* today's layouts of Xen's structures, not those of Xen 3.2 */
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <xencall.h>
#include <xenforeignmemory.h>
#include <xen/xen.h>
#include <xen/grant_table.h>
#include <xen/memory.h>
#include <xen/version.h>

#define BATCH 16384u
#define MULTICALL 512u
#define WINDOW 4096u
#define POISON INT_MAX
#define PAGE 4096u

struct map_buffer {
    struct xen_add_to_physmap_batch call;
    xen_ulong_t idxs[BATCH];
    xen_pfn_t gpfns[BATCH];
    int errs[BATCH];
};

struct remove_buffer {
    multicall_entry_t calls[MULTICALL];
    struct xen_remove_from_physmap args[MULTICALL];
};

static xencall_handle *xcall;
static xenforeignmemory_handle *fmem;
static struct map_buffer *map;
static struct remove_buffer *rem;
static uint64_t hypercalls;

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static int failed(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    printf("failed ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
    return -1;
}

static int do_null(uint64_t count)
{
    while ( count-- ) {
        if ( xencall2(xcall, __HYPERVISOR_xen_version, XENVER_version, 0) < 0 )
            return failed("xen_version: %s", strerror(errno));
        hypercalls++;
    }
    return 0;
}

static int do_map(unsigned guest, unsigned holder, uint64_t guest_gfn, uint64_t holder_gfn,
                  uint64_t nr)
{
    uint64_t done;
    unsigned i, count;

    for ( done = 0; done < nr; done += count ) {
        count = nr - done < BATCH ? nr - done : BATCH;
        memset(&map->call, 0, sizeof map->call);
        map->call.domid = guest;
        map->call.space = XENMAPSPACE_gmfn_foreign;
        map->call.size = count;
        map->call.u.foreign_domid = holder;
        set_xen_guest_handle(map->call.idxs, map->idxs);
        set_xen_guest_handle(map->call.gpfns, map->gpfns);
        set_xen_guest_handle(map->call.errs, map->errs);
        for ( i = 0; i < count; i++ ) {
            map->idxs[i] = holder_gfn + done + i;
            map->gpfns[i] = guest_gfn + done + i;
            map->errs[i] = POISON;
        }
        if ( xencall2L(xcall, __HYPERVISOR_memory_op, XENMEM_add_to_physmap_batch,
                       (uint64_t)(uintptr_t)&map->call) < 0 )
            return failed("add_to_physmap_batch: %s", strerror(errno));
        hypercalls++;
        for ( i = 0; i < count; i++ )
            if ( map->errs[i] )
                return failed("frame %" PRIu64 ": %d", done + i, map->errs[i]);
    }
    return 0;
}

static int do_single(unsigned domid, uint64_t gfn, uint64_t nr)
{
    uint64_t i;

    for ( i = 0; i < nr; i++ ) {
        rem->args[0].domid = domid;
        rem->args[0].gpfn = gfn + i;
        if ( xencall2L(xcall, __HYPERVISOR_memory_op, XENMEM_remove_from_physmap,
                       (uint64_t)(uintptr_t)&rem->args[0]) < 0 )
            return failed("remove_from_physmap of frame %" PRIu64 ": %s", i, strerror(errno));
        hypercalls++;
    }
    return 0;
}

static int do_multi(unsigned domid, uint64_t gfn, uint64_t nr)
{
    uint64_t done;
    unsigned i, count;

    for ( done = 0; done < nr; done += count ) {
        count = nr - done < MULTICALL ? nr - done : MULTICALL;
        for ( i = 0; i < count; i++ ) {
            memset(&rem->calls[i], 0, sizeof rem->calls[i]);
            rem->calls[i].op = __HYPERVISOR_memory_op;
            rem->calls[i].result = (xen_ulong_t)-ENODATA;
            rem->calls[i].args[0] = XENMEM_remove_from_physmap;
            rem->calls[i].args[1] = (xen_ulong_t)(uintptr_t)&rem->args[i];
            rem->args[i].domid = domid;
            rem->args[i].gpfn = gfn + done + i;
        }
        if ( xencall2L(xcall, __HYPERVISOR_multicall, (uint64_t)(uintptr_t)rem->calls, count) < 0 )
            return failed("multicall: %s", strerror(errno));
        hypercalls++;
        for ( i = 0; i < count; i++ )
            if ( rem->calls[i].result )
                return failed("frame %" PRIu64 ": %ld", done + i, (long)rem->calls[i].result);
    }
    return 0;
}

/* dom0 reaches a guest's foreign frame as it reaches its own: the guest has the owner as target. */
static int do_pages(unsigned domid, uint64_t gfn, uint64_t nr, uint64_t seed, int write)
{
    static xen_pfn_t gfns[WINDOW];
    static int errs[WINDOW];
    uint64_t done;
    unsigned i, count;

    for ( done = 0; done < nr; done += count ) {
        volatile char *pages;
        int wrong = 0;

        count = nr - done < WINDOW ? nr - done : WINDOW;
        for ( i = 0; i < count; i++ )
            gfns[i] = gfn + done + i;
        pages = xenforeignmemory_map(fmem, domid, write ? PROT_READ | PROT_WRITE : PROT_READ,
                                     count, gfns, errs);
        if ( !pages )
            return failed("foreign map: %s", strerror(errno));
        for ( i = 0; i < count && !wrong; i++ ) {
            volatile uint64_t *word = (volatile uint64_t *)(pages + (size_t)i * PAGE);

            if ( errs[i] )
                wrong = failed("foreign map of frame %" PRIu64 ": %d", done + i, errs[i]);
            else if ( write )
                *word = seed + done + i;
            else if ( *word != seed + done + i )
                wrong = failed("frame %" PRIu64 " holds %" PRIu64, done + i, *word);
        }
        xenforeignmemory_unmap(fmem, (void *)pages, count);
        if ( wrong )
            return wrong;
    }
    return 0;
}

static int do_grant(unsigned holder, uint64_t ref, uint64_t gfn, uint64_t nr, unsigned domid)
{
    xenforeignmemory_resource_handle *resource;
    grant_entry_v1_t *entry;
    void *table = NULL;
    uint64_t i;

    resource = xenforeignmemory_map_resource(
        fmem, holder, XENMEM_resource_grant_table, XENMEM_resource_grant_table_id_shared, 0,
        (ref + nr + 511) / 512, &table, PROT_READ | PROT_WRITE, 0);
    if ( !resource )
        return failed("map_resource: %s", strerror(errno));
    for ( entry = (grant_entry_v1_t *)table + ref, i = 0; i < nr; i++, entry++ ) {
        entry->domid = domid;
        entry->frame = gfn + i;
        __atomic_store_n(&entry->flags, GTF_permit_access, __ATOMIC_RELEASE);
    }
    xenforeignmemory_unmap_resource(fmem, resource);
    return 0;
}

/* include/uapi/xen/gntdev.h of Linux, IOCTL_GNTDEV_MAP_GRANT_REF */
static int do_gntdev(unsigned holder, uint64_t ref, uint64_t nr)
{
    struct { uint32_t count, pad; uint64_t index; struct { uint32_t domid, ref; } refs[]; } *op;
    int fd = open("/dev/xen/gntdev", O_RDWR | O_CLOEXEC), rc = 0;
    void *pages;
    uint64_t i;

    op = calloc(1, sizeof *op + nr * sizeof op->refs[0]);
    if ( fd < 0 || !op )
        return failed("gntdev: %s", strerror(errno));
    op->count = nr;
    for ( i = 0; i < nr; i++ ) {
        op->refs[i].domid = holder;
        op->refs[i].ref = ref + i;
    }
    if ( ioctl(fd, _IOC(_IOC_NONE, 'G', 0, 24), op) )
        rc = failed("map_grant_ref: %s", strerror(errno));
    else if ( (pages = mmap(NULL, nr * PAGE, PROT_READ, MAP_SHARED, fd, op->index)) == MAP_FAILED )
        rc = failed("mmap: %s", strerror(errno));
    else
        munmap(pages, nr * PAGE);
    free(op);
    close(fd);
    return rc;
}

static void obey(const char *line)
{
    uint64_t a = 0, b = 0, c = 0, d = 0, e = 0, began;
    char verb[16];
    int rc;

    if ( sscanf(line, "%15s %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64,
                verb, &a, &b, &c, &d, &e) < 2 ) {
        failed("no command: %s", line);
        return;
    }
    hypercalls = 0;
    began = now_ns();
    if ( !strcmp(verb, "null") )
        rc = do_null(a);
    else if ( !strcmp(verb, "map") )
        rc = do_map(a, b, c, d, e);
    else if ( !strcmp(verb, "single") )
        rc = do_single(a, b, c);
    else if ( !strcmp(verb, "multi") )
        rc = do_multi(a, b, c);
    else if ( !strcmp(verb, "fill") || !strcmp(verb, "check") )
        rc = do_pages(a, b, c, d, verb[0] == 'f');
    else if ( !strcmp(verb, "grant") )
        rc = do_grant(a, b, c, d, e);
    else if ( !strcmp(verb, "gntdev") )
        rc = do_gntdev(a, b, c);
    else
        rc = failed("unknown command %s", verb);
    if ( !rc )
        printf("ok %" PRIu64 " %" PRIu64 "\n", now_ns() - began, hypercalls);
}

int main(int argc, char **argv)
{
    char line[256];
    size_t used = 0;
    int i;

    setvbuf(stdout, NULL, _IOLBF, 0);
    xcall = xencall_open(NULL, 0);
    fmem = xenforeignmemory_open(NULL, 0);
    if ( !xcall || !fmem ) {
        fprintf(stderr, "attach_loop: cannot open Xen's devices: %s\n", strerror(errno));
        return 1;
    }
    map = xencall_alloc_buffer(xcall, sizeof *map);
    rem = xencall_alloc_buffer(xcall, sizeof *rem);
    if ( !map || !rem ) {
        fprintf(stderr, "attach_loop: no hypercall buffer\n");
        return 1;
    }
    for ( i = 1; i < argc && used < sizeof line; i++ )
        used += snprintf(line + used, sizeof line - used, "%s ", argv[i]);
    if ( used )
        obey(line);
    else
        while ( fgets(line, sizeof line, stdin) )
            obey(line);
    xencall_free_buffer(xcall, map);
    xencall_free_buffer(xcall, rem);
    xenforeignmemory_close(fmem);
    xencall_close(xcall);
    return 0;
}
