/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * What the parts of the bare-metal guest promise one another. main.c, say.c
 * and map.c are the same on every machine; a board (start.S and board.c in the
 * folder of the architecture) is all that differs.
 */
#ifndef BAREMETAL_H
#define BAREMETAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- main.c ---- */

/* Runs the words of the command line; comes back never. */
_Noreturn void guest_main(const char *cmdline);

/* The board caught an access that nothing answers: says so and crashes. */
_Noreturn void guest_fault(uint64_t addr, uint64_t ip, uint64_t why);

/* ---- say.c ---- */

/* One line, with the guest's name before it: %s text, %u decimal, %x hex (both uint64_t). */
void say(const char *format, ...);
extern const char *say_name;

/* ---- disk.c ---- */

/* Writes sectors to the disk behind the virtqueue in this region and reads them again. */
void disk_write_and_read(uint64_t start, uint64_t sectors, uint32_t seed);

/* ---- map.c ---- */

/* Makes a region reachable where it is: virtual address = guest-physical address. */
bool map_identity(uint64_t start, uint64_t size);

#define MAP_LIMIT ((uint64_t)512 << 30)         /* what one table of 1 GiB entries reaches */
extern uint64_t map_gib_table[512];             /* the board's start.S gives the low entries ... */
extern uint64_t map_low_table[512];             /* ... and the 2 MiB entries of the first GiB */

#if defined(__x86_64__)
#define MAP_TABLE      0x003u                   /* present, writable */
#define MAP_IS_TABLE(e) (((e) & 0x80) == 0)
#define MAP_NORMAL     0x083u                   /* ... and large: write-back, for PAT entry 0 is that */
#define MAP_KIND       0x098u                   /* large, PCD, PWT */
#elif defined(__aarch64__)
#define MAP_TABLE      0x003u
#define MAP_IS_TABLE(e) (((e) & 3) == 3)
#define MAP_NORMAL     (0x701u | (uint64_t)3 << 53)     /* block, MAIR 0, inner shareable, accessed, never executed */
#define MAP_KIND       0x01fu                   /* block, MAIR index */
#endif

/* ---- board.c ---- */

void board_putc(char c);
void board_drain(void);                         /* until what was said is out of our hands */
uint64_t board_now_ns(void);                    /* since some moment before guest_main */
void board_sleep_until_ns(uint64_t when);       /* gives the CPU away meanwhile */
_Noreturn void board_idle(void);                /* for ever; xl destroy ends it */
void board_relax(void);                         /* one breath of a spin loop */
bool board_has_gib_blocks(void);
void board_map_changed(void);
long board_sched_op(unsigned int op, void *arg);

#define SCHEDOP_yield    0
#define SCHEDOP_shutdown 2
enum shutdown_reason { SHUTDOWN_poweroff = 0, SHUTDOWN_reboot = 1, SHUTDOWN_crash = 3 };

extern char image_start[], image_end[];         /* the linker script's */

#endif
