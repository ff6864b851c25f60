/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * A guest without drivers can still have a disk: a virtqueue in a region, and
 * a vhost-user back-end in dom0 that looks into it. Nobody is notified of
 * anything: both sides look at the rings' indices, as the other verbs look at
 * their words. Split virtqueue and requests are those of virtio 1.2 (2.7, 5.2).
 *
 * Pages of the region: 16 descriptors, 17 available ring, 18 used ring,
 * 19 header and status, 20 data.
 */
#include "baremetal.h"
#include "region.h"

#define QUEUE_SIZE 8u
#define SECTOR 512u
#define BLK_IN 0u
#define BLK_OUT 1u
#define DESC_NEXT 1u
#define DESC_WRITE 2u
#define PATIENCE_MS 60000u

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

struct available {
    uint16_t flags, index, ring[QUEUE_SIZE];
};

struct used {
    uint16_t flags, index;
    struct { uint32_t id, length; } ring[QUEUE_SIZE];
};

struct request {
    uint32_t kind, reserved;
    uint64_t sector;
    uint8_t status;
};

static uint64_t page(uint64_t start, unsigned int number)
{
    return start + number * PAGE_SIZE;
}

/* One request and its answer; false if none came, or it says that it failed. */
static bool ask(uint64_t start, uint32_t kind, uint64_t sector)
{
    struct descriptor *table = (void *)(uintptr_t)page(start, 16);
    struct available *available = (void *)(uintptr_t)page(start, 17);
    struct used *used = (void *)(uintptr_t)page(start, 18);
    struct request *request = (void *)(uintptr_t)page(start, 19);
    uint16_t index = available->index;

    *request = (struct request){ kind, 0, sector, 0xff };
    table[0] = (struct descriptor){ (uintptr_t)request, 16, DESC_NEXT, 1 };
    table[1] = (struct descriptor){
        page(start, 20), SECTOR, DESC_NEXT | (kind == BLK_IN ? DESC_WRITE : 0), 2
    };
    table[2] = (struct descriptor){ (uintptr_t)&request->status, 1, DESC_WRITE, 0 };
    available->ring[index % QUEUE_SIZE] = 0;
    __atomic_store_n(&available->index, (uint16_t)(index + 1), __ATOMIC_RELEASE);
    for (unsigned int ms = 0; ms < PATIENCE_MS; ms++) {
        if (__atomic_load_n(&used->index, __ATOMIC_ACQUIRE) == (uint16_t)(index + 1))
            return request->status == 0;
        board_sleep_until_ns(board_now_ns() + 1000000u);
    }
    return false;
}

void disk_write_and_read(uint64_t start, uint64_t sectors, uint32_t seed)
{
    uint64_t *data = (void *)(uintptr_t)page(start, 20);
    uint64_t bad = 0;

    for (uint64_t sector = 0; sector < sectors; sector++) {
        for (unsigned int i = 0; i < SECTOR / 8; i++)
            data[i] = region_tag(sector * 64 + i, seed);
        if (!ask(start, BLK_OUT, sector))
            bad++;
    }
    for (uint64_t sector = 0; sector < sectors; sector++) {
        bool right = ask(start, BLK_IN, sector);

        for (unsigned int i = 0; i < SECTOR / 8; i++)
            right = right && data[i] == region_tag(sector * 64 + i, seed);
        bad += !right;
    }
    say("disk sectors=%u bad=%u", sectors, bad);
}
