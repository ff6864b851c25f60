/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Tries the relay of xshmd/xen/c/evtchn.c with a device and a clock that are made up: one guest rings
 * without end, another now and then. Nothing here waits, and all of it is the same every time.
 */
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int fake_clock(clockid_t clock, struct timespec *now);
static int fake_poll(struct pollfd *fds, nfds_t nr, int wait_ms);
static ssize_t fake_read(int fd, void *to, size_t size);
static ssize_t fake_write(int fd, const void *from, size_t size);

#define clock_gettime fake_clock
#define poll          fake_poll
#define read          fake_read
#define write         fake_write
#include "evtchn.c"
#undef read
#undef write

#define check(what) do { if (!(what)) { printf("line %d: not so: %s\n", __LINE__, #what); exit(1); } } while (0)

/* What rings, and what it rings; a ring takes the relay a microsecond, a guest's next comes at once. */
enum { FLOOD = 5, CALM = 7, TO_FLOOD = 6, TO_CALM = 8, NR_PORTS = 16 };
enum { DEVICE = 1000, TICKS = 20, TICK_US = 10000, CALM_EVERY_US = 3000 };

static int pending[NR_PORTS], masked[NR_PORTS];
static uint64_t now_us, calm_at, asked[NR_PORTS], passed[NR_PORTS], in_tick, most_in_tick, longest_wait;
static int64_t last_tick = -1;

static void guests_ring(void)
{
    if (now_us < TICKS * TICK_US && !pending[FLOOD])
        pending[FLOOD] = 1, asked[FLOOD]++;
    if (now_us < TICKS * TICK_US && now_us >= calm_at + CALM_EVERY_US && !pending[CALM])
        pending[CALM] = 1, asked[CALM]++, calm_at = now_us;
}

static int fake_clock(clockid_t clock, struct timespec *now)
{
    (void)clock;
    now->tv_sec = (time_t)(now_us / 1000000);
    now->tv_nsec = (long)(now_us % 1000000 * 1000);
    return 0;
}

static int fake_poll(struct pollfd *fds, nfds_t nr, int wait_ms)
{
    int ready = 0;

    check(nr == 2);
    guests_ring();
    for (int port = 0; port < NR_PORTS; port++)
        ready |= pending[port] && !masked[port];
    if (!ready && now_us < TICKS * TICK_US)             /* until the calm one rings, or as long as it wants */
        now_us = wait_ms >= 0 && now_us + wait_ms * 1000 < calm_at + CALM_EVERY_US ?
            now_us + wait_ms * 1000 : calm_at + CALM_EVERY_US;
    else if (!ready && wait_ms >= 0)
        now_us += (uint64_t)wait_ms * 1000;
    guests_ring();
    fds[0].revents = ready ? POLLIN : 0;
    fds[1].revents = !ready && wait_ms < 0 && now_us >= TICKS * TICK_US ? POLLIN : 0;
    return 1;
}

static ssize_t fake_read(int fd, void *to, size_t size)
{
    uint32_t *ports = to, nr = 0;

    check(fd == DEVICE);
    for (uint32_t port = 0; port < NR_PORTS && nr < size / 4; port++)
        if (pending[port] && !masked[port])
            pending[port] = 0, masked[port] = 1, ports[nr++] = port;
    if (nr)
        return (ssize_t)(nr * 4);
    errno = EAGAIN;
    return -1;
}

static ssize_t fake_write(int fd, const void *from, size_t size)
{
    const uint32_t *ports = from;

    check(fd == DEVICE);
    for (size_t n = 0; n < size / 4; n++) {
        check(masked[ports[n]]);
        masked[ports[n]] = 0;
    }
    return (ssize_t)size;
}

int xenevtchn_notify(xenevtchn_handle *handle, evtchn_port_t to)
{
    uint32_t from = to == TO_FLOOD ? FLOOD : CALM;

    (void)handle;
    passed[from]++;
    if (from == CALM && now_us - calm_at > longest_wait)
        longest_wait = now_us - calm_at;
    if (from == FLOOD) {
        in_tick = (int64_t)(now_us / TICK_US) == last_tick ? in_tick + 1 : 1;
        last_tick = (int64_t)(now_us / TICK_US);
        if (in_tick > most_in_tick)
            most_in_tick = in_tick;
    }
    now_us++;
    return 0;
}

int xenevtchn_fd(xenevtchn_handle *handle) { (void)handle; return DEVICE; }

int main(void)
{
    static struct xshm_port ports[NR_PORTS];
    static uint32_t late[NR_PORTS];
    xshm_relay relay = { .capacity = NR_PORTS, .ports = ports, .late = late, .stop_fd = -1 };

    check(xshm_relay_to(&relay, NR_PORTS, 1) == -ERANGE);
    check(xshm_relay_to(&relay, FLOOD, TO_FLOOD) == 0 && xshm_relay_to(&relay, CALM, TO_CALM) == 0);
    check(xshm_relay_run(&relay) == 0);
    /* Every ring is passed on, those of the last tick too; the flood only as often as it may be. */
    check(passed[FLOOD] == asked[FLOOD] && passed[CALM] == asked[CALM]);
    check(passed[FLOOD] == xshm_relay_rings(&relay, FLOOD));
    check(most_in_tick == 1000 && xshm_relay_held(&relay) >= TICKS - 1);
    check(asked[CALM] > TICKS && longest_wait < 10);    /* and nobody else waits for it */
    printf("flood %llu calm %llu\n", (unsigned long long)passed[FLOOD], (unsigned long long)passed[CALM]);
    return 0;
}
