/* SPDX-License-Identifier: BSD-2-Clause
 *
 * What the kernel of a member could ask Xen to do to its holder, asked by root of a Linux guest
 * through /dev/xen/privcmd: each verb is one hypercall, and says what Xen answered.
 *
 *     xshm-member VERB HOLDER [NUMBER...]
 *
 * Needs nothing of Xen's but its ABI (xen/include/public: memory.h, event_channel.h,
 * grant_table.h, hvm/dm_op.h), of which it has its own declarations. */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define MEMORY_OP 12
#define GRANT_TABLE_OP 20
#define EVENT_CHANNEL_OP 32
#define DM_OP 41

#define INCREASE_RESERVATION 0
#define DECREASE_RESERVATION 1
#define POPULATE_PHYSMAP 6
#define REMOVE_FROM_PHYSMAP 15
#define ADD_TO_PHYSMAP_BATCH 23
#define ACQUIRE_RESOURCE 28
#define GMFN_FOREIGN 4
#define RESOURCE_GRANT_TABLE 1
#define SETUP_TABLE 2
#define ALLOC_UNBOUND 6
#define CREATE_IOREQ_SERVER 1
#define DOMID_SELF 0x7FF0

struct privcmd_hypercall { uint64_t op, arg[5]; };
#define PRIVCMD_HYPERCALL _IOC(_IOC_NONE, 'P', 0, sizeof(struct privcmd_hypercall))

struct batch {
    uint16_t domid, space, size, foreign_domid;
    uint64_t idxs, gpfns, errs;
};
struct removal { uint16_t domid; uint64_t gpfn; };
struct reservation {
    uint64_t extents, nr_extents;
    uint32_t order, flags;
    uint16_t domid;
};
struct resource {
    uint16_t domid, type;
    uint32_t id, nr_frames, pad;
    uint64_t frame, frame_list;
};
struct unbound { uint16_t dom, remote; uint32_t port; };
struct table { uint16_t dom; uint32_t nr_frames; int16_t status; uint64_t frame_list; };
struct dm_buffer { uint64_t address, size; };

/* All that Xen reads or writes: one page that stays where it is. */
static struct shared {
    union {
        struct batch batch;
        struct removal removal;
        struct reservation reservation;
        struct resource resource;
        struct unbound unbound;
        struct table table;
        struct dm_buffer dm_buffer;
    } argument;
    uint64_t from, to;
    int32_t error;
    uint32_t dm_op[32];
} *shared;

static int privcmd;

static long hypercall(uint64_t op, uint64_t a, uint64_t b, uint64_t c)
{
    struct privcmd_hypercall call = { op, { a, b, c } };
    long rc = ioctl(privcmd, PRIVCMD_HYPERCALL, &call);

    return rc < 0 ? -errno : rc;
}

static uint64_t at(const void *p) { return (uintptr_t)p; }

static long memory_op(unsigned int op)
{
    return hypercall(MEMORY_OP, op, at(&shared->argument), 0);
}

static long map(uint16_t holder, uint64_t gfn, uint64_t own_gfn)
{
    long rc;

    shared->from = gfn;
    shared->to = own_gfn;
    shared->error = 1;
    shared->argument.batch = (struct batch){
        DOMID_SELF, GMFN_FOREIGN, 1, holder, at(&shared->from), at(&shared->to),
        at(&shared->error) };
    rc = memory_op(ADD_TO_PHYSMAP_BATCH);
    return rc ? rc : shared->error;
}

static long hide(uint16_t domid, uint64_t gfn)
{
    shared->argument.removal = (struct removal){ domid, gfn };
    return memory_op(REMOVE_FROM_PHYSMAP);
}

/* How many of one extent. */
static long reserve(unsigned int op, uint16_t holder, uint64_t gfn)
{
    shared->from = gfn;
    shared->argument.reservation = (struct reservation){ at(&shared->from), 1, 0, 0, holder };
    return memory_op(op);
}

static long grant_frame(uint16_t holder, uint64_t frame, uint64_t own_gfn)
{
    shared->from = own_gfn;
    shared->argument.resource = (struct resource){
        holder, RESOURCE_GRANT_TABLE, 0, 1, 0, frame, at(&shared->from) };
    return memory_op(ACQUIRE_RESOURCE);
}

static long grow_table(uint16_t holder, uint32_t nr_frames)
{
    long rc;

    shared->argument.table = (struct table){ holder, nr_frames, 1, at(shared->dm_op) };
    rc = hypercall(GRANT_TABLE_OP, SETUP_TABLE, at(&shared->argument), 1);
    return rc ? rc : shared->argument.table.status;
}

static long port(uint16_t holder)
{
    shared->argument.unbound = (struct unbound){ holder, DOMID_SELF, 0 };
    return hypercall(EVENT_CHANNEL_OP, ALLOC_UNBOUND, at(&shared->argument), 0);
}

static long ioreq_server(uint16_t holder)
{
    memset(shared->dm_op, 0, sizeof shared->dm_op);
    shared->dm_op[0] = CREATE_IOREQ_SERVER;
    shared->argument.dm_buffer = (struct dm_buffer){ at(shared->dm_op), sizeof shared->dm_op };
    return hypercall(DM_OP, holder, 1, at(&shared->argument));
}

static long ask(const char *verb, uint16_t holder, const uint64_t number[2])
{
    if ( !strcmp(verb, "map") )
        return map(holder, number[0], number[1]);
    if ( !strcmp(verb, "unmap") )
        return hide(DOMID_SELF, number[0]);
    if ( !strcmp(verb, "hide") )
        return hide(holder, number[0]);
    if ( !strcmp(verb, "free") )
        return reserve(DECREASE_RESERVATION, holder, number[0]);
    if ( !strcmp(verb, "populate") )
        return reserve(POPULATE_PHYSMAP, holder, number[0]);
    if ( !strcmp(verb, "increase") )
        return reserve(INCREASE_RESERVATION, holder, number[0]);
    if ( !strcmp(verb, "grant-frame") )
        return grant_frame(holder, number[0], number[1]);
    if ( !strcmp(verb, "grant-table") )
        return grow_table(holder, number[0]);
    if ( !strcmp(verb, "port") )
        return port(holder);
    if ( !strcmp(verb, "ioreq-server") )
        return ioreq_server(holder);
    fprintf(stderr, "xshm-member: no verb %s\n", verb);
    exit(2);
}

int main(int argc, char **argv)
{
    uint64_t number[2] = { 0, 0 };
    int i;

    if ( argc < 3 || argc > 5 ) {
        fprintf(stderr, "usage: xshm-member VERB HOLDER [NUMBER [NUMBER]]\n");
        return 2;
    }
    for ( i = 3; i < argc; i++ )
        number[i - 3] = strtoull(argv[i], NULL, 0);
    privcmd = open("/dev/xen/privcmd", O_RDWR | O_CLOEXEC);
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED | MAP_POPULATE, -1, 0);
    if ( privcmd < 0 || shared == MAP_FAILED ) {
        perror("xshm-member");
        return 1;
    }
    printf("%ld\n", ask(argv[1], (uint16_t)strtoul(argv[2], NULL, 0), number));
    return 0;
}
