/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The other side of the doorbell ratio: what libxenevtchn alone does.
 *
 *   bell_loop ping           makes two ports and says "ports A B"; each line "go N" rings at A and
 *                            waits for B, N times: "ok NANOSECONDS"
 *   bell_loop relay DOMID A DOMID B   binds these ports of these domains; whatever rings at one rings
 *                            at the other, until it is killed
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <xenevtchn.h>

static xenevtchn_handle *evtchn;

static int bound(int port)
{
    if (port < 0) {
        perror("event channel");
        exit(1);
    }
    return port;
}

/* The next port that rang; it may ring again. */
static int heard(void)
{
    int port = bound(xenevtchn_pending(evtchn));

    bound(xenevtchn_unmask(evtchn, (evtchn_port_t)port));
    return port;
}

static int line(const char *domid, const char *port)
{
    return bound(xenevtchn_bind_interdomain(evtchn, (uint32_t)atoi(domid), (evtchn_port_t)atoi(port)));
}

static void relay(char **ends)
{
    int lines[2] = { line(ends[0], ends[1]), line(ends[2], ends[3]) };

    puts("ready");
    for (;;)
        xenevtchn_notify(evtchn, (evtchn_port_t)lines[heard() == lines[0]]);
}

static void ping(void)
{
    int one = bound(xenevtchn_bind_unbound_port(evtchn, 0));
    int other = bound(xenevtchn_bind_unbound_port(evtchn, 0));
    struct timespec began, ended;
    unsigned int rounds;

    printf("ports %d %d\n", one, other);
    while (scanf(" go %u", &rounds) == 1) {
        clock_gettime(CLOCK_MONOTONIC, &began);
        for (unsigned int n = 0; n < rounds; n++) {
            xenevtchn_notify(evtchn, (evtchn_port_t)one);
            while (heard() != other)
                ;
        }
        clock_gettime(CLOCK_MONOTONIC, &ended);
        printf("ok %lld\n", (long long)(ended.tv_sec - began.tv_sec) * 1000000000 +
                                (ended.tv_nsec - began.tv_nsec));
    }
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    evtchn = xenevtchn_open(NULL, 0);
    if (!evtchn) {
        perror("/dev/xen/evtchn");
        return 1;
    }
    if (argc == 6 && !strcmp(argv[1], "relay"))
        relay(argv + 2);
    else if (argc == 2 && !strcmp(argv[1], "ping"))
        ping();
    return 2;
}
