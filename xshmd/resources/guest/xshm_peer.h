/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * A guest's side of a region with doorbells: who else has it, ringing and being rung, waiting for
 * an address to be triggered, and a ring of messages between two peers. For guests without an
 * operating system, and for drivers; it needs nothing but a C11 compiler and this file's .c.
 *
 * What is in the region can be written by every peer. Nothing here believes it beyond what it can
 * do to the region itself: every number read from there is checked against the region's size and
 * used once, and a peer that lies wakes somebody too often, or is told nothing.
 *
 * One struct xshm is used by one CPU at a time. Numbers in memory are little-endian.
 */
#ifndef XSHM_PEER_H
#define XSHM_PEER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define XSHM_PAGE        4096u
#define XSHM_MAX_PEERS   15u
#define XSHM_DOM0        XSHM_MAX_PEERS     /* dom0's row among the watches; it is no peer */
#define XSHM_WATCHES     8u                 /* that each of them can have at a time */
#define XSHM_MAGIC       0x50485358u
#define XSHM_VERSION     1u
/* ---- the control page: the region's last ---- */

enum xshm_state { XSHM_ABSENT = 0, XSHM_JOINED = 1, XSHM_LEFT = 2 };

struct xshm_row {                       /* dom0 writes the first three words */
    uint32_t state, domid;
    uint32_t lives;                     /* one more each time the peer joins */
    uint32_t ready;                     /* the peer's own words: not 0 once it uses the region ... */
    uint32_t hears;                     /* ... and once it hears the ports that it offers */
    uint32_t spare[3];
};

struct xshm_watch {
    uint64_t address;                   /* offset of a byte of the region, plus one; 0: no watch */
    uint64_t counter;                   /* offset of a word that a trigger decrements; 0: none */
};

struct xshm_control {
    uint32_t magic;
    uint16_t version, nr_peers;
    uint32_t changes;                   /* one more whenever dom0 has written the table */
    uint32_t spare[13];
    struct xshm_row row[XSHM_MAX_PEERS];            /* 0x040 */
    uint32_t spare2[8];
    uint32_t port[XSHM_MAX_PEERS][16];              /* 0x240: [whose][whom it rings]; own: dom0 */
    uint16_t offer[XSHM_MAX_PEERS][16];             /* 0x600: [whose][who alone may bind it] */
    uint16_t spare3[16];
    struct xshm_watch watch[XSHM_MAX_PEERS + 1][XSHM_WATCHES];  /* 0x800 */
};

_Static_assert(offsetof(struct xshm_control, row) == 0x40, "rows");
_Static_assert(offsetof(struct xshm_control, port) == 0x240, "ports");
_Static_assert(offsetof(struct xshm_control, offer) == 0x600, "offers");
_Static_assert(offsetof(struct xshm_control, watch) == 0x800, "watches");
_Static_assert(sizeof(struct xshm_control) == XSHM_PAGE, "control page");

/* ---- finding it ---- */

struct xshm {
    uint8_t *base;
    uint64_t size;                      /* without the control page */
    struct xshm_control *control;
    void *shared_info;
    bool polls;                         /* waits in Xen, rather than for an interrupt */
    uint32_t id, nr_peers;
    uint32_t port[16];                  /* as they were at xshm_open: what is there now may lie */
    uint32_t direct[16];                /* channels without dom0 between; 0: none */
    uint32_t lives[16];                 /* of the peer that a direct channel leads to */
    uint32_t connected, refused;        /* which of them lead there, and which may not be: bits */
    bool connects, hears;
};

/*
 * Makes xs ready to use; returns 0, or why not: -1 no control page there (yet), -2 this domain is
 * not in it, -3 Xen refused.
 * base, size: the region, mapped, control page and all.
 * shared_info: a page of this guest's own, page-aligned and mapped where it is (virtual =
 *   guest-physical); Xen's shared page takes its place. A guest that has mapped that already says
 *   where, and passes `mapped` true.
 * ports: as this guest's xenstore node has them; no other event channel is then touched. NULL: as
 *   the page says, where a peer may have written that of any to dom0; for guests that use no others.
 */
int xshm_open(struct xshm *xs, void *base, uint64_t size, void *shared_info, bool mapped,
              const uint32_t *ports, uint32_t nr_ports);

/* Tells everybody that this peer uses the region from now on. */
void xshm_ready(struct xshm *xs);

enum xshm_state xshm_state_of(const struct xshm *xs, uint32_t peer);
bool xshm_is_ready(const struct xshm *xs, uint32_t peer);

/* From now on binds what peers offer: rings go to them directly, where Xen allows it. Not for guests
 * with other channels to guests: a peer that lies may offer one that waits for this guest. */
void xshm_connect(struct xshm *xs);

/* ---- doorbells ---- */

/* Rings a peer; its own number, or XSHM_DOM0, is dom0. What was written before, it sees. */
void xshm_ring(struct xshm *xs, uint32_t peer);

/* Who has rung since the last time, as a bit for each peer; the own bit: dom0, who says that the
 * table has changed or a watch is due. Look at everything after taking, never before. */
uint32_t xshm_take(struct xshm *xs);

/* Sleeps until somebody rings, or has rung and was not taken; or less. */
void xshm_wait(struct xshm *xs);

/* ---- watch and trigger ---- */

/* Wakes this peer when somebody triggers the byte at offset `address`; with a counter (the offset
 * of an aligned word, not 0) when a trigger has decremented that to 0. False: out of the region. */
bool xshm_watch(struct xshm *xs, uint32_t slot, uint64_t address, uint64_t counter);
void xshm_unwatch(struct xshm *xs, uint32_t slot);

/* Triggers the byte at `address`; how many were woken. */
uint32_t xshm_trigger(struct xshm *xs, uint64_t address);

/* ---- a ring of messages from one peer to another ---- */

/*
 * It lies at a place both know, 64-byte aligned: this header, then `size` bytes, a power of two.
 * Messages are 1 to size/2 bytes and come out whole, in order. Each side owns one index.
 */
struct xshm_ring_header {
    uint32_t written; uint32_t spare[15];
    uint32_t read;    uint32_t spare2[15];
};

struct xshm_ring {
    struct xshm_ring_header *header;
    uint8_t *bytes;
    uint32_t size, mine;                /* mine: this side's own index, whatever is in memory */
};

/* Either end, each its own struct: `fresh` starts it empty, which its writer alone may do. */
bool xshm_ring_open(struct xshm_ring *ring, const struct xshm *xs, uint64_t at, uint32_t size,
                    bool writer, bool fresh);
bool xshm_ring_put(struct xshm_ring *ring, const void *message, uint32_t nr_bytes);
/* The bytes of the next message; 0: there is none; -1: what is there is none, or no room for it, and
 * it is dropped. `room` of size/2 is enough for any. */
int32_t xshm_ring_get(struct xshm_ring *ring, void *message, uint32_t room);

#endif
