/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The other side of the ratio of messages: what libxenvchan does between two Linux guests.
 *
 *   vchan_loop receive DOMID       takes messages of each size for ever, from that domain
 *   vchan_loop send DOMID          sends to that one: a second of each size in turn, for ever, and
 *                                  says "vchan bytes=N messages=N us=T" after each
 *
 * A channel of its own for each size, with rings as large as that of the bare-metal guests.
 */
#include <libxenvchan.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define RING_SIZE 32768
#define AT_ONCE   64            /* messages between two looks at the clock */
#define CHUNK_US  1000000

static const int sizes[] = { 64, 4096 };
#define NR_SIZES ((int)(sizeof(sizes) / sizeof(*sizes)))

static char message[4096];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static int64_t now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * (int64_t)1000000 + now.tv_nsec / 1000;
}

static void receive(int domid, int size)
{
    char path[32];
    struct libxenvchan *channel;

    snprintf(path, sizeof(path), "data/vchan-%d", size);
    channel = libxenvchan_server_init(NULL, domid, path, RING_SIZE, 0);
    if (!channel)
        fail("libxenvchan_server_init");
    channel->blocking = 1;
    while (libxenvchan_recv(channel, message, size) == size)
        ;
    fail("libxenvchan_recv");
}

static struct libxenvchan *channel_to(int domid, int size)
{
    char path[64];
    struct libxenvchan *channel;

    snprintf(path, sizeof(path), "/local/domain/%d/data/vchan-%d", domid, size);
    while (!(channel = libxenvchan_client_init(NULL, domid, path)))
        sleep(1);               /* it is not there yet */
    channel->blocking = 1;
    return channel;
}

static void send_messages(struct libxenvchan *channel, int size)
{
    int64_t began = now_us(), took;
    unsigned long messages = 0;

    do {
        for (int n = 0; n < AT_ONCE; n++)
            if (libxenvchan_send(channel, message, size) != size)
                fail("libxenvchan_send");
        messages += AT_ONCE;
        took = now_us() - began;
    } while (took < CHUNK_US);
    printf("vchan bytes=%d messages=%lu us=%lld\n", size, messages, (long long)took);
}

int main(int argc, char **argv)
{
    struct libxenvchan *channel[NR_SIZES];
    int domid = argc == 3 ? atoi(argv[2]) : 0;

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc != 3 || (strcmp(argv[1], "send") && strcmp(argv[1], "receive")))
        return 2;
    if (!strcmp(argv[1], "receive")) {
        for (int n = 1; n < NR_SIZES; n++)
            if (fork() == 0)
                receive(domid, sizes[n]);
        receive(domid, sizes[0]);
    }
    for (int n = 0; n < NR_SIZES; n++)
        channel[n] = channel_to(domid, sizes[n]);
    for (int n = 0;; n = (n + 1) % NR_SIZES)
        send_messages(channel[n], sizes[n]);
}
