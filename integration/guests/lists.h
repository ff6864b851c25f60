/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * A guest's side of scatter-gather: the page in which it asks dom0 for lists
 * and transfers. docs/scatter.md says the same in words. Freestanding; take it
 * for your own guest.
 */
#ifndef LISTS_H
#define LISTS_H

#include <stdbool.h>
#include <stdint.h>

#define LISTS_MAGIC 0x4c485358u                 /* "XSHL": dom0 has opened the page */
#define LISTS_RANGES 64u
#define LISTS_NO_LIST 5u                        /* the status where nobody has posted one */

enum lists_operation {
    LISTS_REGISTER_INPUT = 1, LISTS_REGISTER_OUTPUT = 2, LISTS_UNREGISTER = 3,
    LISTS_TRANSFER_OUTPUT = 4, LISTS_TRANSFER_INPUT = 5,
};

struct lists_range {
    uint64_t offset, length;                    /* in this guest's part of the region */
};

struct lists_page {
    uint32_t magic, version;                    /* dom0's */
    uint32_t asked;                             /* ours: the number of our newest request */
    uint32_t answered;                          /* dom0's: of the newest it has answered */
    uint32_t operation, list, nr_ranges;        /* ours */
    uint32_t status;                            /* dom0's; 0: done */
    uint64_t count_place;                       /* ours: where the count goes, plus one; 0: nowhere */
    uint64_t result;                            /* dom0's: id of the list, or bytes moved */
    uint8_t spare[16];
    struct lists_range range[LISTS_RANGES];     /* ours */
};

_Static_assert(__builtin_offsetof(struct lists_page, count_place) == 0x20, "count_place");
_Static_assert(__builtin_offsetof(struct lists_page, range) == 0x40, "range");

static inline bool lists_open(const struct lists_page *page)
{
    return __atomic_load_n(&page->magic, __ATOMIC_ACQUIRE) == LISTS_MAGIC;
}

/* Asks for what has been put into operation, list, nr_ranges, count_place and range. */
static inline void lists_ask(struct lists_page *page)
{
    __atomic_store_n(&page->asked, page->asked + 1, __ATOMIC_RELEASE);
}

/* Whether that is answered: then status and result are there. */
static inline bool lists_answered(const struct lists_page *page)
{
    return __atomic_load_n(&page->answered, __ATOMIC_ACQUIRE) == page->asked;
}

#endif
