/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * What a guest can do with a region that has doorbells. Nothing here waits by
 * spinning: whoever has nothing to do sleeps until it is rung, so a ring that
 * is lost shows as a guest that says no more.
 */
#include "baremetal.h"
#include "bells.h"
#include "xshm_peer.h"

#define WATCHED   0x800u                /* offsets in page 0, behind the slots */
#define COUNTER   0x808u
#define RING_AT   PAGE_SIZE             /* the ring of messages has pages of its own */
#define RING_SIZE 32768u

static uint8_t shared_page[PAGE_SIZE] __attribute__((aligned(4096)));
static struct xshm peers;

/* The region whose doorbells are used: this guest has but one struct xshm. */
static struct xshm *opened(const struct region *r)
{
    static uint64_t start;
    int rc;

    if (start == r->start)
        return &peers;
    if (start)
        give_up("doorbells of a second region", "");
    rc = xshm_open(&peers, (void *)(uintptr_t)r->start, r->nr_pages * PAGE_SIZE, shared_page, false,
                   NULL, 0);
    if (rc)
        give_up("xshm_open", rc == -1 ? "no control page" : rc == -2 ? "not in it" : "refused by Xen");
    start = r->start;
    xshm_ready(&peers);
    xshm_connect(&peers);
    return &peers;
}

void do_peers(const struct region *r)
{
    struct xshm *xs = opened(r);

    say("peer id=%u of=%u first-port=%u", (uint64_t)xs->id, (uint64_t)xs->nr_peers, (uint64_t)xs->port[0]);
}

/* Sleeps until it is rung; how often that was. */
static uint64_t wakes;

static void wait_for_a_ring(struct xshm *xs)
{
    while (!xshm_take(xs))
        xshm_wait(xs);
    wakes++;
}

void do_await_peer(const struct region *r)
{
    struct xshm *xs = opened(r);

    while (!xshm_is_ready(xs, peer_slot))
        wait_for_a_ring(xs);
    say("peer ready id=%u", (uint64_t)peer_slot);
}

static void say_rung(const char *side, uint32_t last, uint64_t began)
{
    say("%s rounds=%u last=%u wakes=%u direct=%u us=%u", side, (uint64_t)ticks, (uint64_t)last, wakes,
        (uint64_t)(peers.connected >> peer_slot & 1), (board_now_ns() - began) / 1000);
}

void do_bell_ping(const struct region *r)
{
    struct xshm *xs = opened(r);
    uint32_t *mine = &page0(r)->slot[slot].ping, *theirs = &page0(r)->slot[peer_slot].ping;
    uint32_t next = get(theirs);
    uint64_t began = 0;

    for (uint32_t round = 0; round < ticks; round++) {
        set(mine, ++next);
        xshm_ring(xs, peer_slot);
        while (get(theirs) != next)
            wait_for_a_ring(xs);
        if (round == 0)
            began = board_now_ns(), wakes = 0;
    }
    say_rung("bell-ping", next, began);
}

void do_bell_pong(const struct region *r)
{
    struct xshm *xs = opened(r);
    uint32_t *mine = &page0(r)->slot[slot].ping, *theirs = &page0(r)->slot[peer_slot].ping;
    uint32_t next = get(mine);
    uint64_t began = 0;

    for (uint32_t round = 0; round < ticks; round++) {
        next++;
        while (get(theirs) != next)
            wait_for_a_ring(xs);
        set(mine, next);
        xshm_ring(xs, peer_slot);
        if (round == 0)
            began = board_now_ns(), wakes = 0;
    }
    say_rung("bell-pong", next, began);
}

/* Rings as often as it can, without waiting for anybody. */
void do_flood(const struct region *r)
{
    struct xshm *xs = opened(r);
    uint32_t *mine = &page0(r)->slot[slot].ping;
    uint64_t began = board_now_ns();

    set(mine, 0u);
    for (uint32_t round = 1; round <= ticks; round++) {
        set(mine, round);
        xshm_ring(xs, peer_slot);
    }
    say("flood rings=%u us=%u", (uint64_t)ticks, (board_now_ns() - began) / 1000);
}

/* Is woken at least after the last of them; rings that came together count as one. */
void do_flooded(const struct region *r)
{
    struct xshm *xs = opened(r);
    uint32_t *theirs = &page0(r)->slot[peer_slot].ping;

    wakes = 0;
    while (get(theirs) != ticks)
        wait_for_a_ring(xs);
    say("flooded last=%u wakes=%u", (uint64_t)ticks, wakes);
}

void do_triggered(const struct region *r)
{
    struct xshm *xs = opened(r);
    uint32_t *left = (uint32_t *)(uintptr_t)(r->start + COUNTER);

    set(left, ticks);
    if (!xshm_watch(xs, 0, WATCHED, COUNTER))
        give_up("xshm_watch", "");
    say("watching left=%u", (uint64_t)ticks);
    wakes = 0;
    while (get(left))
        wait_for_a_ring(xs);
    xshm_unwatch(xs, 0);
    say("triggered left=0 wakes=%u", wakes);
}

void do_trigger(const struct region *r)
{
    struct xshm *xs = opened(r);
    uint64_t woken = 0;

    while (get(&xs->control->watch[peer_slot][0].address) == 0)
        sleep_ms(10);
    for (uint32_t round = 0; round < ticks; round++)
        woken += xshm_trigger(xs, WATCHED);
    say("trigger times=%u woken=%u", (uint64_t)ticks, woken);
}

/* ---- messages ---- */

static uint64_t message[PAGE_SIZE / 8];

/* Each side rings only if the other may be asleep: it has found the ring empty, or full. */
void do_send(const struct region *r)
{
    struct xshm *xs = opened(r);
    struct xshm_ring ring;
    uint64_t began;

    if (!xshm_ring_open(&ring, xs, RING_AT, RING_SIZE, true, false))
        give_up("xshm_ring_open", "");
    while (!xshm_is_ready(xs, peer_slot))
        wait_for_a_ring(xs);
    began = board_now_ns();
    for (uint32_t n = 0; n < ticks; n++) {
        message[0] = n;
        while (!xshm_ring_put(&ring, message, message_bytes)) {
            xshm_ring(xs, peer_slot);
            wait_for_a_ring(xs);
        }
    }
    xshm_ring(xs, peer_slot);
    say("send messages=%u bytes=%u us=%u", (uint64_t)ticks, (uint64_t)message_bytes,
        (board_now_ns() - began) / 1000);
}

void do_receive(const struct region *r)
{
    struct xshm *xs = opened(r);
    struct xshm_ring ring;
    uint64_t bad = 0;

    if (!xshm_ring_open(&ring, xs, RING_AT, RING_SIZE, false, false))
        give_up("xshm_ring_open", "");
    for (uint32_t n = 0; n < ticks; ) {
        int32_t got = xshm_ring_get(&ring, message, sizeof(message));

        if (got == 0) {
            xshm_ring(xs, peer_slot);
            wait_for_a_ring(xs);
            continue;
        }
        bad += got != (int32_t)message_bytes || message[0] != n;
        n++;
    }
    say("receive messages=%u bad=%u", (uint64_t)ticks, bad);
}

/* ---- a peer that lies ---- */

static uint32_t any(void)
{
    static uint64_t state = 1;

    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

/* Writes whatever it likes where everybody reads, and rings: that is all a peer can do to others. */
void do_scribble(const struct region *r)
{
    struct xshm *xs = opened(r);
    uint32_t *control = (uint32_t *)(void *)xs->control, *ring = (uint32_t *)(uintptr_t)(r->start + RING_AT);

    for (uint32_t round = 0; round < ticks; round++) {
        for (unsigned int n = 0; n < 16; n++) {
            uint32_t value = any() % 4 ? any() % 8192 : any() << 1;

            set(&control[any() % (PAGE_SIZE / 4)], value);
            set(&ring[any() % 64], value);
        }
        xshm_ring(xs, peer_slot);
        xshm_ring(xs, XSHM_DOM0);
    }
    say("scribbled rounds=%u", (uint64_t)ticks);
}

/* Does what one does with a peer, whatever that writes: none of it faults or goes on for ever. */
void do_survive(const struct region *r)
{
    struct xshm *xs = opened(r);
    struct xshm_ring in, out;
    uint64_t messages = 0;

    if (!xshm_ring_open(&in, xs, RING_AT, RING_SIZE, false, false) ||
        !xshm_ring_open(&out, xs, RING_AT, RING_SIZE, true, false))
        give_up("xshm_ring_open", "");
    for (uint32_t round = 0; round < ticks; round++) {
        xshm_take(xs);
        xshm_connect(xs);
        xshm_trigger(xs, any() % (r->nr_pages * PAGE_SIZE));
        xshm_is_ready(xs, any() % 32);
        messages += xshm_ring_get(&in, message, sizeof(message)) > 0;
        xshm_ring_put(&out, message, message_bytes);
    }
    say("survived rounds=%u messages=%u", (uint64_t)ticks, messages);
}
