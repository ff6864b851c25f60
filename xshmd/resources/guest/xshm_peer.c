/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * See xshm_peer.h. All that depends on the machine is at the top: a hypercall, and where Xen's
 * shared page has the bits of event channels. The barriers are C11's, which are plain loads and
 * stores on x86, and ldar and stlr on arm64: they hold for write-back memory, as regions are.
 */
#include "xshm_peer.h"

#define load(p)      __atomic_load_n(p, __ATOMIC_ACQUIRE)
#define store(p, v)  __atomic_store_n(p, v, __ATOMIC_RELEASE)
#define full_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)

/* ---- the machine ---- */

enum { HYPERCALL_memory_op = 12, HYPERCALL_sched_op = 29, HYPERCALL_event_channel_op = 32 };

/* Where they are: after 32 struct vcpu_info on x86, after one on Arm (xen/include/public/xen.h). */
#if defined(__x86_64__)
enum { EVTCHN_PENDING = 2048, EVTCHN_MASK = 2560 };
#else
enum { EVTCHN_PENDING = 48, EVTCHN_MASK = 560 };
#endif

#if defined(XSHM_HYPERCALL)             /* a kernel has one of its own, and says its name */
long XSHM_HYPERCALL(unsigned long op, unsigned long first, void *second);
#define hypercall XSHM_HYPERCALL
#elif defined(__x86_64__)
static bool is_amd(void)
{
    uint32_t a = 0, b, c, d;

    __asm__ volatile ("cpuid" : "+a" (a), "=b" (b), "=c" (c), "=d" (d));
    return b == 0x68747541 || b == 0x6f677948;          /* "Auth...", "Hygo..." */
}

static long hypercall(unsigned long op, unsigned long first, void *second)
{
    static uint8_t amd;                 /* 0: not known yet; else 1 + is_amd() */
    unsigned long rdi = first, rsi = (uintptr_t)second;
    long result = (long)op;

    if (!amd)
        amd = 1 + is_amd();
#define CALL(how) \
    __asm__ volatile (how : "+a" (result), "+D" (rdi), "+S" (rsi) :: "memory", "rdx", "r10", "r8", "r9")
    if (amd == 2) CALL("vmmcall"); else CALL("vmcall");
    return result;
}
#elif defined(__aarch64__)
static long hypercall(unsigned long op, unsigned long first, void *second)
{
    register unsigned long x0 __asm__("x0") = first, x1 __asm__("x1") = (uintptr_t)second;
    register unsigned long x16 __asm__("x16") = op;

    __asm__ volatile ("hvc #0xea1" : "+r" (x0), "+r" (x1), "+r" (x16) :: "memory", "x2", "x3", "x4");
    return (long)x0;
}
#else
#error "Xen's guests with regions are x86_64 and arm64"
#endif

/* ---- Xen's interface, as far as it is needed: xen/include/public ---- */

#define DOMID_SELF 0x7ff0u

struct add_to_physmap { uint16_t domid, size; uint32_t space; uint64_t index, gpfn; };
struct evtchn_bind { uint16_t remote; uint32_t remote_port, port; };
struct evtchn_alloc { uint16_t domid, remote; uint32_t port; };
struct evtchn_status { uint16_t domid; uint32_t port, status, vcpu; uint16_t remote; uint32_t remote_port; };
struct sched_poll { uint32_t *ports; uint32_t nr_ports; uint64_t timeout; };

enum { XENMEM_add_to_physmap = 7, XENMAPSPACE_shared_info = 0 };
enum { EVTCHNOP_bind_interdomain = 0, EVTCHNOP_close = 3, EVTCHNOP_send = 4, EVTCHNOP_status = 5, EVTCHNOP_alloc_unbound = 6 };
enum { EVTCHNSTAT_unbound = 1, EVTCHNSTAT_interdomain = 2, SCHEDOP_poll = 3 };

static bool map_shared_info(void *page)
{
    struct add_to_physmap map = {
        .domid = DOMID_SELF, .space = XENMAPSPACE_shared_info, .gpfn = (uintptr_t)page / XSHM_PAGE,
    };

    return hypercall(HYPERCALL_memory_op, XENMEM_add_to_physmap, &map) == 0;
}

/* Rings at a port, or closes it. */
static void port_op(unsigned long op, uint32_t port)
{
    hypercall(HYPERCALL_event_channel_op, op, &port);
}

/* What two levels of 64 bits reach; a port beyond is none of libxl's guests'. */
static bool is_port(uint32_t port)
{
    return port != 0 && port < 64 * 64;
}

/* The domain that a port of this one leads to, or waits for; -1: it is no channel between domains. */
static int32_t remote_of(uint32_t port)
{
    struct evtchn_status status = { .domid = DOMID_SELF, .port = port };

    if (!is_port(port) || hypercall(HYPERCALL_event_channel_op, EVTCHNOP_status, &status) ||
        (status.status != EVTCHNSTAT_unbound && status.status != EVTCHNSTAT_interdomain))
        return -1;
    return status.remote;
}

/* Xen tells nobody his number, but for whom a port is that is for oneself. */
static int32_t own_domid(void)
{
    struct evtchn_alloc alloc = { .domid = DOMID_SELF, .remote = DOMID_SELF };
    int32_t domid;

    if (hypercall(HYPERCALL_event_channel_op, EVTCHNOP_alloc_unbound, &alloc))
        return -1;
    domid = remote_of(alloc.port);
    port_op(EVTCHNOP_close, alloc.port);
    return domid;
}

static uint64_t *bits_of(const struct xshm *xs, uint32_t which, uint32_t port)
{
    return (uint64_t *)(void *)((uint8_t *)xs->shared_info + which) + port / 64;
}

/* Whoever waits in Xen wants no interrupt for it. */
static void mask(const struct xshm *xs, uint32_t port)
{
    if (xs->polls)
        __atomic_fetch_or(bits_of(xs, EVTCHN_MASK, port), (uint64_t)1 << port % 64,
                          __ATOMIC_SEQ_CST);
}

static bool take(const struct xshm *xs, uint32_t port)
{
    uint64_t bit = (uint64_t)1 << port % 64;

    return (__atomic_fetch_and(bits_of(xs, EVTCHN_PENDING, port), ~bit, __ATOMIC_SEQ_CST) & bit) != 0;
}

/* ---- finding it ---- */

int xshm_open(struct xshm *xs, void *base, uint64_t size, void *shared_info, bool mapped,
              const uint32_t *ports, uint32_t nr_ports)
{
    struct xshm_control *control;
    int32_t domid;

    if (size < 2 * XSHM_PAGE || size % XSHM_PAGE)
        return -1;
    control = (struct xshm_control *)(void *)((uint8_t *)base + size - XSHM_PAGE);
    if (load(&control->magic) != XSHM_MAGIC || control->version != XSHM_VERSION ||
        (xs->nr_peers = ports ? nr_ports : load(&control->nr_peers)) > XSHM_MAX_PEERS)
        return -1;
    xs->base = base;
    xs->size = size - XSHM_PAGE;
    xs->control = control;
    xs->shared_info = shared_info;
    xs->polls = !mapped;
    domid = own_domid();
    if (domid < 0 || (!mapped && !map_shared_info(shared_info)))
        return -3;
    for (xs->id = 0; xs->id < xs->nr_peers; xs->id++)
        if (xshm_state_of(xs, xs->id) == XSHM_JOINED && load(&control->row[xs->id].domid) == (uint32_t)domid)
            break;
    if (xs->id == xs->nr_peers)
        return -2;
    for (uint32_t k = 0; k < xs->nr_peers; k++) {
        xs->port[k] = ports ? ports[k] : load(&control->port[xs->id][k]);
        xs->direct[k] = ports ? 0 : load(&control->offer[xs->id][k]);
        xs->lives[k] = load(&control->row[k].lives);
        if (remote_of(xs->port[k]) != 0)                /* every doorbell ends in dom0 */
            return -2;
        mask(xs, xs->port[k]);
        if (remote_of(xs->direct[k]) <= 0)              /* and what is offered to peers never */
            xs->direct[k] = 0;
        else
            mask(xs, xs->direct[k]);
    }
    xs->hears = ports == NULL;
    xs->connected = xs->refused = 0;
    xs->connects = false;
    return 0;
}

void xshm_ready(struct xshm *xs)
{
    store(&xs->control->row[xs->id].hears, (uint32_t)xs->hears);
    store(&xs->control->row[xs->id].ready, 1u);
    for (uint32_t k = 0; k < xs->nr_peers; k++)
        xshm_ring(xs, k);
}

enum xshm_state xshm_state_of(const struct xshm *xs, uint32_t peer)
{
    uint32_t state = peer < XSHM_MAX_PEERS ? load(&xs->control->row[peer].state) : XSHM_ABSENT;

    return state <= XSHM_LEFT ? (enum xshm_state)state : XSHM_ABSENT;
}

bool xshm_is_ready(const struct xshm *xs, uint32_t peer)
{
    return xshm_state_of(xs, peer) == XSHM_JOINED && load(&xs->control->row[peer].ready) != 0;
}

static void connect(struct xshm *xs, uint32_t peer)
{
    const struct xshm_row *row = &xs->control->row[peer];
    struct evtchn_bind bind = {
        .remote = (uint16_t)load(&row->domid), .remote_port = load(&xs->control->offer[peer][xs->id]),
    };

    if (bind.remote == 0 || !is_port(bind.remote_port) || load(&row->hears) == 0)
        return;
    if (hypercall(HYPERCALL_event_channel_op, EVTCHNOP_bind_interdomain, &bind)) {
        xs->refused |= 1u << peer;      /* once is enough to learn Xen's policy */
    } else if (is_port(bind.port)) {
        xs->direct[peer] = bind.port;
        xs->connected |= 1u << peer;
        mask(xs, bind.port);
        port_op(EVTCHNOP_send, bind.port);                /* so that it knows, too */
    } else
        port_op(EVTCHNOP_close, bind.port);
}

void xshm_connect(struct xshm *xs)
{
    xs->connects = true;
    for (uint32_t peer = 0; peer < xs->nr_peers; peer++) {
        uint32_t lives = load(&xs->control->row[peer].lives);
        bool here = xshm_state_of(xs, peer) == XSHM_JOINED, again = lives != xs->lives[peer];

        if (!here || again) {
            if (xs->direct[peer])
                port_op(EVTCHNOP_close, xs->direct[peer]);
            xs->direct[peer] = 0;
            xs->connected &= ~(1u << peer);
            xs->refused &= ~(1u << peer);
        }
        xs->lives[peer] = lives;
        if (here && peer != xs->id && !xs->direct[peer] && !(xs->refused >> peer & 1))
            connect(xs, peer);
    }
}

/* ---- doorbells ---- */

void xshm_ring(struct xshm *xs, uint32_t peer)
{
    uint32_t whom = peer == XSHM_DOM0 ? xs->id : peer;

    if (whom >= xs->nr_peers)
        return;
    full_fence();
    /* A peer that has come again is at the end of no channel that was made before. */
    if ((xs->connected >> whom & 1) && load(&xs->control->row[whom].lives) == xs->lives[whom])
        port_op(EVTCHNOP_send, xs->direct[whom]);
    else
        port_op(EVTCHNOP_send, xs->port[whom]);
}

uint32_t xshm_take(struct xshm *xs)
{
    uint32_t rung = 0, k;

    for (k = 0; k < xs->nr_peers; k++) {
        if (take(xs, xs->port[k]))
            rung |= 1u << k;
        if (xs->direct[k] && take(xs, xs->direct[k])) {
            rung |= 1u << k;
            xs->connected |= 1u << k;   /* who rings here hears here */
        }
    }
    if (xs->connects && (rung & ~xs->connected))
        xshm_connect(xs);               /* the table may have changed: the own bit is never in it */
    return rung;
}

void xshm_wait(struct xshm *xs)
{
    uint32_t ports[2 * XSHM_MAX_PEERS], k;
    struct sched_poll poll = { .ports = ports };

    for (k = 0; k < xs->nr_peers; k++) {
        ports[poll.nr_ports++] = xs->port[k];
        if (xs->direct[k])
            ports[poll.nr_ports++] = xs->direct[k];
    }
    hypercall(HYPERCALL_sched_op, SCHEDOP_poll, &poll);
}

/* ---- watch and trigger ---- */

static bool is_counter(const struct xshm *xs, uint64_t counter)
{
    return counter % 4 == 0 && counter <= xs->size - 4;
}

bool xshm_watch(struct xshm *xs, uint32_t slot, uint64_t address, uint64_t counter)
{
    struct xshm_watch *watch;

    if (slot >= XSHM_WATCHES || address >= xs->size + XSHM_PAGE || !is_counter(xs, counter))
        return false;
    watch = &xs->control->watch[xs->id][slot];
    store(&watch->address, (uint64_t)0);
    store(&watch->counter, counter);
    store(&watch->address, address + 1);
    full_fence();                       /* a trigger from here on finds it */
    return true;
}

void xshm_unwatch(struct xshm *xs, uint32_t slot)
{
    if (slot < XSHM_WATCHES)
        store(&xs->control->watch[xs->id][slot].address, (uint64_t)0);
}

#define TRIES 100000u

/* Takes one off, unless nothing is left; whether that made it 0. */
static bool is_due(const struct xshm *xs, uint64_t counter)
{
    uint32_t *word = (uint32_t *)(void *)(xs->base + counter), tries = TRIES;
    uint32_t left = __atomic_load_n(word, __ATOMIC_RELAXED);

    for (; left && tries; tries--)      /* weak, so that one try is one: on Arm a peer can foil it */
        if (__atomic_compare_exchange_n(word, &left, left - 1, true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            return left == 1;
    return left != 0;                   /* who writes there without end has a ring too many */
}

uint32_t xshm_trigger(struct xshm *xs, uint64_t address)
{
    uint32_t woken = 0, peer, slot;

    if (address >= xs->size + XSHM_PAGE)
        return 0;
    full_fence();
    for (peer = 0; peer <= XSHM_MAX_PEERS; peer++) {
        bool due = false;

        for (slot = 0; slot < XSHM_WATCHES; slot++) {
            struct xshm_watch *watch = &xs->control->watch[peer][slot];
            uint64_t counter;

            if (load(&watch->address) != address + 1)
                continue;
            counter = load(&watch->counter);            /* once: it may change any time */
            due |= counter == 0 || (is_counter(xs, counter) && is_due(xs, counter));
        }
        if (due)
            woken++, xshm_ring(xs, peer);
    }
    return woken;
}

/* ---- a ring of messages ---- */

/* A message is a word that says how long it is, and its bytes, in whole words: none is ever cut. */
#define WORD 8u
#define WORDS_OF(nr_bytes) (WORD + (((nr_bytes) + WORD - 1) & ~(WORD - 1)))

bool xshm_ring_open(struct xshm_ring *ring, const struct xshm *xs, uint64_t at, uint32_t size,
                    bool writer, bool fresh)
{
    if (size < 64 || (size & (size - 1)) || at % 64 || at > xs->size ||
        xs->size - at < sizeof(*ring->header) + size)
        return false;
    ring->header = (struct xshm_ring_header *)(void *)(xs->base + at);
    ring->bytes = xs->base + at + sizeof(*ring->header);
    ring->size = size;
    if (fresh && writer) {
        store(&ring->header->read, 0u);
        store(&ring->header->written, 0u);
    }
    ring->mine = load(writer ? &ring->header->written : &ring->header->read);
    return true;
}

/* Indexes go on and on; only their lowest bits say where. */
static uint64_t *word_at(const struct xshm_ring *ring, uint32_t at)
{
    return (uint64_t *)(void *)(ring->bytes + (at & (ring->size - WORD)));
}

/* Up to a word's bytes of a message, wherever that lies; there may be no memcpy to call. */
static uint64_t word_from(const uint8_t *from, uint32_t nr_bytes)
{
    uint64_t word = 0;

    if (nr_bytes >= WORD)
        __builtin_memcpy(&word, from, WORD);
    else while (nr_bytes--)
        word = word << 8 | from[nr_bytes];
    return word;
}

static void word_to(uint8_t *to, uint64_t word, uint32_t nr_bytes)
{
    if (nr_bytes >= WORD)
        __builtin_memcpy(to, &word, WORD);
    else for (; nr_bytes; nr_bytes--, word >>= 8)
        *to++ = (uint8_t)word;
}

bool xshm_ring_put(struct xshm_ring *ring, const void *message, uint32_t nr_bytes)
{
    uint32_t used = ring->mine - load(&ring->header->read), at = ring->mine, left = nr_bytes;
    const uint8_t *from = message;

    if (nr_bytes == 0 || nr_bytes > ring->size / 2 || used > ring->size ||
        ring->size - used < WORDS_OF(nr_bytes))
        return false;
    *word_at(ring, at) = nr_bytes;
    for (at += WORD; left; at += WORD) {
        *word_at(ring, at) = word_from(from, left);
        from += WORD, left -= left < WORD ? left : WORD;
    }
    ring->mine = at;
    store(&ring->header->written, at);
    return true;
}

int32_t xshm_ring_get(struct xshm_ring *ring, void *message, uint32_t room)
{
    uint32_t written = load(&ring->header->written), used = written - ring->mine;
    uint32_t at = ring->mine, left;
    uint8_t *to = message;
    uint64_t length;

    if (used == 0)
        return 0;
    length = *(volatile uint64_t *)word_at(ring, at);
    if (used > ring->size || used % WORD || length == 0 || length > ring->size / 2 ||
        WORDS_OF(length) > used) {
        at = written;                   /* what else is there cannot be told apart */
        length = UINT64_MAX;
    } else if (length > room)
        at += WORDS_OF((uint32_t)length);
    else {
        left = (uint32_t)length;
        for (at += WORD; left; at += WORD) {
            word_to(to, *word_at(ring, at), left);
            to += WORD, left -= left < WORD ? left : WORD;
        }
    }
    ring->mine = at;
    store(&ring->header->read, at);
    return length > room ? -1 : (int32_t)length;
}
