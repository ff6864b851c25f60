/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Regions live where the VM's configuration says, often far above RAM, so the
 * few pages that start.S maps do not reach them. Only the 2 MiB around what
 * the command line names is added: any other stray access is a fault that the
 * test sees, not a write into somebody's memory.
 *
 * x86 and arm64 both translate these levels with tables of 512 eight-byte
 * entries (1 GiB, then 2 MiB each); only the bits in an entry differ.
 */
#include "baremetal.h"

#define GIB ((uint64_t)1 << 30)
#define TWO_MIB ((uint64_t)1 << 21)
#define ADDRESS_BITS 0x0000fffffffff000u

/* Four regions have at most eight ends that do not fill their GiB. */
static uint64_t spare_tables[8][512] __attribute__((aligned(4096)));
static unsigned int spare_tables_used;

uint64_t map_gib_table[512] __attribute__((aligned(4096)));
uint64_t map_low_table[512] __attribute__((aligned(4096)));

static bool map_block(uint64_t *entry, uint64_t at)
{
    if (*entry == 0)
        *entry = at | MAP_NORMAL;
    return (*entry & MAP_KIND) == (MAP_NORMAL & MAP_KIND);      /* not where a device is */
}

bool map_identity(uint64_t start, uint64_t size)
{
    uint64_t at = start & ~(TWO_MIB - 1), end = start + size;

    if (end < start || end > MAP_LIMIT)
        return false;
    while (at < end) {
        uint64_t *gib = &map_gib_table[at / GIB];
        bool whole = at % GIB == 0 && end - at >= GIB;

        if (*gib ? !MAP_IS_TABLE(*gib) : whole && board_has_gib_blocks()) {
            if (!map_block(gib, at & ~(GIB - 1)))
                return false;
            at = (at | (GIB - 1)) + 1;
            continue;
        }
        if (*gib == 0) {
            if (spare_tables_used == sizeof(spare_tables) / sizeof(spare_tables[0]))
                return false;
            *gib = (uintptr_t)spare_tables[spare_tables_used++] | MAP_TABLE;
        }
        if (!map_block((uint64_t *)(uintptr_t)(*gib & ADDRESS_BITS) + at / TWO_MIB % 512, at))
            return false;
        at += TWO_MIB;
    }
    board_map_changed();
    return true;
}
