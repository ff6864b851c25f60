/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Tries xshm_peer.c where sanitizers can watch it: an ordinary program in
 * place of a guest, a function in place of Xen, and another peer that first
 * behaves and then writes whatever it likes. argv[1]: how many rounds of each.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "xshm_peer.h"

#define OWN_DOMID 7
#define PEER      6
#define SIZE      0x20000u
#define RING_AT   4096u
#define RING_SIZE 1024u

static uint8_t region[SIZE] __attribute__((aligned(4096)));
static uint8_t shared_page[4096] __attribute__((aligned(4096)));

/* The channels that the guest has besides its doorbells, 3 and 4, and one that it offers its peer. */
enum { TO_DOM0 = 2, OFFERED = 5, OWN_PORT = 60 };
static unsigned int sent[4096], closed[4096], bound, bound_to_dom0;

#define check(what) do { if (!(what)) { printf("line %d: not so: %s\n", __LINE__, #what); exit(1); } } while (0)

/* What the file asks of Xen, as far as it needs an answer; binding is refused, as SILO does. */
long test_hypercall(unsigned long op, unsigned long first, void *second)
{
    uint32_t *words = second;

    if (op != 32)                       /* __HYPERVISOR_event_channel_op */
        return 0;
    if (first == 4)                     /* EVTCHNOP_send: the port */
        sent[words[0] % 4096]++;
    else if (first == 3)                /* EVTCHNOP_close: the port */
        closed[words[0] % 4096]++;
    else if (first == 6)                /* EVTCHNOP_alloc_unbound: two domids, the port */
        words[1] = OWN_PORT;
    else if (first == 5) {              /* EVTCHNOP_status: the port, its state, a CPU, whom it is for */
        words[2] = words[1] <= OFFERED || words[1] == OWN_PORT;
        words[4] = words[1] == OWN_PORT ? OWN_DOMID : words[1] == OFFERED ? PEER : 0;
    }
    if (first == 0)                     /* EVTCHNOP_bind_interdomain: whose port comes first */
        bound++, bound_to_dom0 += (uint16_t)words[0] == 0;
    return first == 0 ? -1 : 0;
}

static uint32_t any(void)
{
    static uint64_t state = 1;

    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

static void check_peers(struct xshm *xs, struct xshm_control *control)
{
    uint64_t *bits = (uint64_t *)(void *)shared_page;

    check(xshm_open(xs, region, SIZE, shared_page, false, NULL, 0) == -1);
    control->version = XSHM_VERSION;
    control->nr_peers = 2;
    control->magic = XSHM_MAGIC;
    check(xshm_open(xs, region, SIZE, shared_page, false, NULL, 0) == -2);
    for (uint32_t peer = 0; peer < 2; peer++) {
        control->row[peer].state = XSHM_JOINED;
        control->row[peer].domid = peer ? OWN_DOMID : PEER;
        control->port[peer][0] = 3;
        control->port[peer][1] = 4;
    }
    control->port[1][0] = OFFERED;      /* no doorbell: it does not lead to dom0 */
    check(xshm_open(xs, region, SIZE, shared_page, false, NULL, 0) == -2);
    control->port[1][0] = 3;
    control->offer[1][0] = TO_DOM0;     /* and no channel to dom0 is for a peer to bind */
    check(xshm_open(xs, region, SIZE, shared_page, false, NULL, 0) == 0 && xs->id == 1 && xs->direct[0] == 0);
    control->offer[1][0] = OFFERED;
    check(xshm_open(xs, region, SIZE, shared_page, false, NULL, 0) == 0 && xs->direct[0] == OFFERED);
    control->offer[1][0] = 0;
    check(xshm_open(xs, region, SIZE, shared_page, false, NULL, 0) == 0);
    xshm_ring(xs, 0);
    check(sent[3] == 1 && sent[4] == 0);
    xshm_ring(xs, XSHM_DOM0);
    xshm_ring(xs, 14);                  /* nobody has that number */
    check(sent[3] == 1 && sent[4] == 1);
#if defined(__x86_64__)
    check(bits[2560 / 8] == (1u << 3 | 1u << 4 | 1u << OFFERED));       /* masked: they are waited for */
    bits[2048 / 8] = 1u << 3;
    check(xshm_take(xs) == 1 && xshm_take(xs) == 0);
#else
    (void)bits;
#endif
}

static void check_watches(struct xshm *xs)
{
    uint32_t *counter = (uint32_t *)(void *)(region + 64);

    check(xshm_watch(xs, 0, 100, 64));
    *counter = 2;
    check(xshm_trigger(xs, 101) == 0 && xshm_trigger(xs, 100) == 0 && *counter == 1);
    check(xshm_trigger(xs, 100) == 1 && *counter == 0 && sent[4] == 2);
    check(xshm_trigger(xs, 100) == 0 && *counter == 0);
    xshm_unwatch(xs, 0);
    check(xshm_trigger(xs, SIZE) == 0 && xshm_trigger(xs, UINT64_MAX) == 0);   /* watches that are none */
    check(!xshm_watch(xs, 0, SIZE, 64));
    check(!xshm_watch(xs, 0, 0, SIZE - XSHM_PAGE));     /* the control page counts for nobody */
    check(!xshm_watch(xs, 0, 0, 66) && !xshm_watch(xs, XSHM_WATCHES, 0, 64));
    check(xshm_watch(xs, 0, 0, SIZE - XSHM_PAGE - 4));
    xshm_unwatch(xs, 0);
}

static void check_ring(struct xshm_ring *in, struct xshm_ring *out, long rounds)
{
    uint8_t message[RING_SIZE];
    uint32_t put = 0, got = 0;

    while (rounds--) {
        uint32_t size = 1 + put * 7919u % (RING_SIZE / 2);
        int32_t found;

        if (any() % 2) {
            memset(message, (int)(put & 0xff), size);
            put += xshm_ring_put(out, message, size);
            continue;
        }
        found = xshm_ring_get(in, message, sizeof(message));
        check(found >= 0);
        if (found == 0)
            continue;
        size = 1 + got * 7919u % (RING_SIZE / 2);
        check((uint32_t)found == size);
        for (uint32_t k = 0; k < size; k++)
            check(message[k] == (uint8_t)got);
        got++;
    }
    check(put - got <= RING_SIZE / 8 && got > 0);
    printf("messages %u\n", (unsigned int)got);
}

/* Whatever stands there, it is refused once: whoever takes messages until there are none comes to an end. */
static void check_false_indexes(struct xshm_ring *in, struct xshm_ring *out)
{
    static const uint32_t lies[] = { 3, 0x80000000u, 0xffffffffu, RING_SIZE + 8, 8 };
    uint8_t message[RING_SIZE];

    for (size_t n = 0; n < sizeof(lies) / sizeof(*lies); n++) {
        in->header->written = in->mine + lies[n];
        memset(in->bytes, n % 2 ? 0xff : 0, RING_SIZE);
        check(xshm_ring_get(in, message, sizeof(message)) == -1);
        check(xshm_ring_get(in, message, sizeof(message)) == 0);
    }
    out->mine = in->mine = in->header->read = in->header->written = 0;
    check(xshm_ring_put(out, "too long", 9) && xshm_ring_put(out, "short", 6));
    check(xshm_ring_get(in, message, 8) == -1 && xshm_ring_get(in, message, 8) == 6);
    check(!memcmp(message, "short", 6) && xshm_ring_get(in, message, 8) == 0);
    out->header->read = out->mine + 8;                  /* more than was ever written */
    check(!xshm_ring_put(out, "short", 6));
    out->header->read = out->mine;
}

static void check_lies(struct xshm *xs, struct xshm_ring *in, struct xshm_ring *out, long rounds)
{
    static const uint32_t own[] = { 3, 4 };
    uint32_t *control = (uint32_t *)(void *)xs->control, *ring = (uint32_t *)(void *)(region + RING_AT);
    uint64_t *bits = (uint64_t *)(void *)shared_page, others;
    uint8_t message[RING_SIZE] = { 0 };
    struct xshm again;

    xs->control->row[1].state = XSHM_JOINED, xs->control->row[1].domid = OWN_DOMID;
    xs->control->port[1][0] = TO_DOM0, xs->control->offer[1][0] = OFFERED;
    check(xshm_open(xs, region, SIZE, shared_page, false, own, 2) == 0);
    memset(sent, 0, sizeof(sent));
    memset(closed, 0, sizeof(closed));
    others = bits[2048 / 8] = ~(uint64_t)(1u << 3 | 1u << 4);
    while (rounds--) {
        control[any() % 1024] = any() % 4 ? any() % SIZE : any();
        ring[any() % (RING_SIZE / 4 + 32)] = any() % 2 ? any() % 2048 : any();
        xshm_ring_get(in, message, any() % sizeof(message));
        xshm_ring_put(out, message, any() % sizeof(message));
        xshm_trigger(xs, any() % SIZE);
        xshm_ring(xs, any() % 4);
        xshm_connect(xs);
        xshm_take(xs);
        xshm_is_ready(xs, any());
        check(xs->id == 1 && xs->nr_peers == 2);
    }
    /* Not one of the guest's other channels was rung, closed or taken from. */
    for (uint32_t port = 0; port < 4096; port++)
        check(closed[port] == 0 && (sent[port] == 0 || port == 3 || port == 4));
    check((bits[2048 / 8] & others) == others && sent[3] && sent[4]);
    for (rounds = 0; rounds < 20000; rounds++) {        /* by what the page says, none to dom0 is closed */
        struct xshm_control *page = xs->control;

        page->magic = XSHM_MAGIC, page->version = XSHM_VERSION, page->nr_peers = 2;
        for (uint32_t peer = 0; peer < 2; peer++) {
            page->row[peer] = (struct xshm_row){ any() % 3, any() % 8, any() % 2, any() % 2, any() % 2, { 0 } };
            for (uint32_t other = 0; other < 2; other++)
                page->port[peer][other] = any() % 8, page->offer[peer][other] = any() % 8;
        }
        if (xshm_open(&again, region, SIZE, shared_page, false, NULL, 0) == 0)
            xshm_connect(&again);
    }
    for (uint32_t port = 0; port < 4096; port++)
        check(closed[port] == 0 || port == OFFERED || port == OWN_PORT);
    check(bound && !bound_to_dom0);
    puts("survived");
}

int main(int argc, char **argv)
{
    long rounds = argc > 1 ? atol(argv[1]) : 100000;
    struct xshm_ring in, out;
    struct xshm xs;

    check_peers(&xs, (struct xshm_control *)(void *)(region + SIZE - XSHM_PAGE));
    check_watches(&xs);
    check(!xshm_ring_open(&in, &xs, SIZE - XSHM_PAGE - 512, RING_SIZE, false, false));
    check(!xshm_ring_open(&in, &xs, 1, RING_SIZE, false, false) && !xshm_ring_open(&in, &xs, 0, 1000, false, false));
    check(xshm_ring_open(&out, &xs, RING_AT, RING_SIZE, true, true));
    check(xshm_ring_open(&in, &xs, RING_AT, RING_SIZE, false, false));
    check_ring(&in, &out, rounds);
    check_false_indexes(&in, &out);
    check_lies(&xs, &in, &out, rounds);
    return 0;
}
