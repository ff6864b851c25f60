/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * xshmd.xen._evtchn: the relay of doorbells, by Xen's libraries that keep their ABI.
 * evtchn.cdef.h says what of it Python calls. All is static, as cffi puts this text at the top of
 * the module's C (cffi_build.py).
 */

#define __XEN_TOOLS__ 1   /* today's numbers of hypercalls, not those of Xen 3.2 */
#include <alloca.h>   /* cffi's own code */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include <xencall.h>
#include <xenevtchn.h>
#include <xen/xen.h>
#include <xen/event_channel.h>

/* A doorbell that rings more often than this in one tick stays masked until the next: what its
 * guest does with it costs dom0 no more.  Masked, it goes on taking rings: none is lost. */
#define XSHM_RINGS_A_TICK 1000
#define XSHM_TICK_MS 10
#define XSHM_BATCH 256
#define XSHM_TELL UINT32_MAX      /* a port whose rings are not passed on but reported */

struct xshm_port {
    uint32_t to;                  /* 0: nowhere (no port has that number) */
    uint32_t tick, rings_in_tick;
    uint64_t rings;
};
typedef struct xshm_relay {
    xenevtchn_handle *evtchn;
    xencall_handle *call;
    void *buffer;                 /* for the two hypercalls that libxenevtchn does not have */
    int stop_fd, told_fd[2];
    uint32_t capacity, nr_late;
    uint64_t held;
    struct xshm_port *ports;
    uint32_t *late;               /* ports that stay masked until the next tick */
} xshm_relay;

static void xshm_relay_close(xshm_relay *relay)
{
    if ( relay->buffer )
        xencall_free_buffer(relay->call, relay->buffer);
    if ( relay->call )
        xencall_close(relay->call);
    if ( relay->evtchn )
        xenevtchn_close(relay->evtchn);
    if ( relay->stop_fd >= 0 )
        close(relay->stop_fd);
    if ( relay->told_fd[0] >= 0 ) {
        close(relay->told_fd[0]);
        close(relay->told_fd[1]);
    }
    free(relay->ports);
    free(relay->late);
    free(relay);
}

static xshm_relay *xshm_relay_open(uint32_t capacity, int *error)
{
    xshm_relay *relay = calloc(1, sizeof *relay);

    if ( !relay ) {
        *error = ENOMEM;
        return NULL;
    }
    relay->stop_fd = relay->told_fd[0] = relay->told_fd[1] = -1;
    relay->capacity = capacity;
    relay->ports = calloc(capacity, sizeof *relay->ports);
    relay->late = calloc(capacity, sizeof *relay->late);
    if ( relay->ports && relay->late &&
         (relay->evtchn = xenevtchn_open(NULL, 0)) != NULL &&
         (relay->call = xencall_open(NULL, 0)) != NULL &&
         (relay->buffer = xencall_alloc_buffer(relay->call, 64)) != NULL &&
         (relay->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) >= 0 &&
         socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0,
                    relay->told_fd) == 0 &&
         fcntl(xenevtchn_fd(relay->evtchn), F_SETFL, O_NONBLOCK) == 0 )
        return relay;
    *error = errno ? errno : ENOMEM;
    xshm_relay_close(relay);
    return NULL;
}

static int xshm_relay_fd(xshm_relay *relay) { return relay->told_fd[0]; }

static uint32_t xshm_now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint32_t)(now.tv_sec * 1000 + now.tv_nsec / 1000000);
}

/* To write a port to the device is to unmask it. */
static void xshm_unmask(xshm_relay *relay, const uint32_t *ports, uint32_t nr)
{
    ssize_t done;

    do
        done = write(xenevtchn_fd(relay->evtchn), ports, nr * sizeof *ports);
    while ( done < 0 && errno == EINTR );
}

/* Passes one ring on; returns whether the port may be unmasked at once. */
static int xshm_pass(xshm_relay *relay, uint32_t local, uint32_t tick)
{
    struct xshm_port *port;
    uint32_t to;

    if ( local >= relay->capacity )
        return 1;
    port = &relay->ports[local];
    __atomic_fetch_add(&port->rings, 1, __ATOMIC_RELAXED);
    to = __atomic_load_n(&port->to, __ATOMIC_ACQUIRE);
    if ( to == XSHM_TELL )        /* whoever reads it unmasks it: one report a port at a time */
        return write(relay->told_fd[1], &local, sizeof local) != sizeof local;
    if ( to )
        xenevtchn_notify(relay->evtchn, to);
    if ( port->tick != tick ) {
        port->tick = tick;
        port->rings_in_tick = 0;
    }
    if ( ++port->rings_in_tick < XSHM_RINGS_A_TICK )
        return 1;
    relay->late[relay->nr_late++] = local;
    __atomic_fetch_add(&relay->held, 1, __ATOMIC_RELAXED);
    return 0;
}

/* Passes rings on until xshm_relay_stop(); returns 0, or -errno. */
static int xshm_relay_run(xshm_relay *relay)
{
    int fd = xenevtchn_fd(relay->evtchn);
    uint32_t rung[XSHM_BATCH];
    struct pollfd fds[2] = { { fd, POLLIN, 0 }, { relay->stop_fd, POLLIN, 0 } };

    for (;;) {
        uint32_t now = xshm_now_ms(), tick = now / XSHM_TICK_MS, nr_open = 0;
        int wait_ms = relay->nr_late ? (int)(XSHM_TICK_MS - now % XSHM_TICK_MS) : -1;
        ssize_t got;

        if ( poll(fds, 2, wait_ms) < 0 ) {
            if ( errno == EINTR )
                continue;
            return -errno;
        }
        if ( fds[1].revents )
            return 0;
        now = xshm_now_ms();
        if ( relay->nr_late && now / XSHM_TICK_MS != tick ) {
            xshm_unmask(relay, relay->late, relay->nr_late);
            relay->nr_late = 0;
        }
        tick = now / XSHM_TICK_MS;
        got = read(fd, rung, sizeof rung);
        if ( got < 0 ) {
            if ( errno == EAGAIN || errno == EINTR )
                continue;
            return -errno;
        }
        for ( size_t i = 0; i < got / sizeof *rung; i++ ) {
            uint32_t local = rung[i];

            if ( xshm_pass(relay, local, tick) )
                rung[nr_open++] = local;
        }
        if ( nr_open )
            xshm_unmask(relay, rung, nr_open);
    }
}

static void xshm_relay_stop(xshm_relay *relay)
{
    uint64_t one = 1;

    (void)!write(relay->stop_fd, &one, sizeof one);
}

static int xshm_relay_to(xshm_relay *relay, uint32_t from, uint32_t to)
{
    if ( from >= relay->capacity )
        return -ERANGE;
    __atomic_store_n(&relay->ports[from].to, to, __ATOMIC_RELEASE);
    return 0;
}

static int xshm_relay_bind(xshm_relay *relay, uint32_t domid, uint32_t port)
{
    int local = xenevtchn_bind_interdomain(relay->evtchn, domid, port);

    if ( local < 0 )
        return -errno;
    if ( (uint32_t)local >= relay->capacity ) {
        xenevtchn_unbind(relay->evtchn, local);
        return -ERANGE;
    }
    return local;
}

static int xshm_relay_unbind(xshm_relay *relay, uint32_t local)
{
    int rc;

    xshm_relay_to(relay, local, 0);
    rc = xenevtchn_unbind(relay->evtchn, local) ? -errno : 0;
    if ( local < relay->capacity )
        __atomic_store_n(&relay->ports[local].rings, 0, __ATOMIC_RELAXED);
    return rc;
}

static int xshm_relay_notify(xshm_relay *relay, uint32_t local)
{
    return xenevtchn_notify(relay->evtchn, local) ? -errno : 0;
}

static int xshm_relay_unmask(xshm_relay *relay, uint32_t local)
{
    return xenevtchn_unmask(relay->evtchn, local) ? -errno : 0;
}

static uint64_t xshm_relay_rings(xshm_relay *relay, uint32_t local)
{
    return local < relay->capacity ?
           __atomic_load_n(&relay->ports[local].rings, __ATOMIC_RELAXED) : 0;
}

static uint64_t xshm_relay_held(xshm_relay *relay)
{
    return __atomic_load_n(&relay->held, __ATOMIC_RELAXED);
}

/* A port of a domain, to be bound by the remote one; returns it, or -errno. */
static int xshm_evtchn_allocate(xshm_relay *relay, uint16_t domid, uint16_t remote)
{
    struct evtchn_alloc_unbound *arg = relay->buffer;

    memset(arg, 0, sizeof *arg);
    arg->dom = domid;
    arg->remote_dom = remote;
    if ( xencall2(relay->call, __HYPERVISOR_event_channel_op, EVTCHNOP_alloc_unbound,
                  (uint64_t)(uintptr_t)arg) < 0 )
        return -errno;
    return arg->port;
}

/* What a port of a domain is: EVTCHNSTAT_*, or -errno. */
static int xshm_evtchn_status(xshm_relay *relay, uint16_t domid, uint32_t port,
                              uint32_t *remote, uint32_t *remote_port)
{
    struct evtchn_status *arg = relay->buffer;

    memset(arg, 0, sizeof *arg);
    arg->dom = domid;
    arg->port = port;
    if ( xencall2(relay->call, __HYPERVISOR_event_channel_op, EVTCHNOP_status,
                  (uint64_t)(uintptr_t)arg) < 0 )
        return -errno;
    *remote = arg->status == EVTCHNSTAT_unbound ? arg->u.unbound.dom : arg->u.interdomain.dom;
    *remote_port = arg->status == EVTCHNSTAT_interdomain ? arg->u.interdomain.port : 0;
    return arg->status;
}
