/* SPDX-License-Identifier: BSD-2-Clause */
/* The verbs that ring and are rung: they stand on xshmd/resources/guest/xshm_peer.h. */
#ifndef BELLS_H
#define BELLS_H

#include <stdint.h>

#include "region.h"

struct region {
    uint64_t start, nr_pages;
};

extern uint32_t ticks, slot, peer_slot, message_bytes;

#define get(p)      __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define set(p, v)   __atomic_store_n(p, v, __ATOMIC_RELEASE)

static inline struct page0 *page0(const struct region *r)
{
    return (struct page0 *)(uintptr_t)r->start;
}

_Noreturn void give_up(const char *what, const char *word);
void sleep_ms(uint64_t ms);

void do_peers(const struct region *r);
void do_await_peer(const struct region *r);
void do_bell_ping(const struct region *r);
void do_bell_pong(const struct region *r);
void do_flood(const struct region *r);
void do_flooded(const struct region *r);
void do_trigger(const struct region *r);
void do_triggered(const struct region *r);
void do_send(const struct region *r);
void do_receive(const struct region *r);
void do_scribble(const struct region *r);
void do_survive(const struct region *r);

#endif
