/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Every guest that shares a region has to agree on what lies where in it, and
 * there is no protocol to ask: this file is that agreement. The Linux guest
 * (linux-init.sh) and the README say the same in words and numbers.
 *
 * Every page of the region holds a tag twice, near its start and at its end,
 * so that a page that is missing, swapped or only half there shows. Page 0
 * also holds what the guests say to each other, clear of the tags.
 */
#ifndef REGION_H
#define REGION_H

#include <stdint.h>

#define PAGE_SIZE 4096u

#define TAG_FIRST 8u                    /* byte offsets in every page */
#define TAG_LAST  (PAGE_SIZE - 8u)

#define NR_SLOTS 16u

/* One guest's words: it alone writes them, every other guest only reads. */
struct slot {
    uint32_t boots;                     /* how often this guest has started */
    uint32_t beat;                      /* its heartbeat */
    uint32_t ping;                      /* its side of ping-pong */
    uint32_t talk;                      /* what it tells a human */
    uint32_t spare[12];                 /* a slot is one 64-byte cache line */
};

struct page0 {
    uint64_t free_word;                 /* 0: no guest writes it; dom0 may, and `peek` says it */
    uint64_t tag;                       /* 8: TAG_FIRST */
    uint8_t spare0[48];
    uint64_t filled;                    /* 64: FILLED | seed once `fill` has finished */
    uint8_t spare1[56];
    struct slot slot[NR_SLOTS];         /* 128 + 64 * slot */
};

_Static_assert(__builtin_offsetof(struct page0, tag) == TAG_FIRST, "tag");
_Static_assert(__builtin_offsetof(struct page0, filled) == 64, "filled");
_Static_assert(__builtin_offsetof(struct page0, slot) == 128, "slots");
_Static_assert(sizeof(struct slot) == 64, "slot");
_Static_assert(sizeof(struct page0) <= TAG_LAST, "page 0");

#define FILLED ((uint64_t)0x5853484d << 32)     /* "XSHM" above the seed */

/*
 * The tag of one page. An odd factor makes it one-to-one, so no two pages (or
 * seeds) share a tag, and none is 0, which is what a fresh region holds.
 */
static inline uint64_t region_tag(uint64_t page, uint32_t seed)
{
    return (((uint64_t)seed << 32) + page + 1) * 0x9e3779b97f4a7c15u;
}

#endif
