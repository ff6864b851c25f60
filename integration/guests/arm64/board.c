/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The arm64 board: Xen's emulated SBSA UART to be heard (if the VM's
 * configuration asks for one), the virtual timer to sleep. The addresses are
 * those of xen/include/public/arch-arm.h, the same in every Xen so far; what
 * is there at all is read from the device tree.
 */
#include "../baremetal.h"

#define GICD_BASE  0x03001000u
#define GICC_BASE  0x03002000u          /* GICv2 */
#define GICR_BASE  0x03020000u          /* GICv3, the only CPU's */
#define UART_BASE  0x22000000u
#define TIMER_PPI  27u

static const char *cmdline = "";
static bool has_uart, has_gic_v3;
static uint64_t clock_hz;

/* Single plain instructions: the only loads and stores that Xen can emulate for us. */
static uint32_t mmio_read(uint64_t at)
{
    uint32_t value;

    asm volatile ("ldr %w0, [%1]" : "=r" (value) : "r" (at) : "memory");
    return value;
}

static void mmio_write(uint64_t at, uint32_t value)
{
    asm volatile ("str %w0, [%1]" :: "r" (value), "r" (at) : "memory");
}

#define read_sysreg(name) ({ uint64_t value; asm volatile ("mrs %0, " name : "=r" (value) :: "memory"); value; })
#define write_sysreg(name, value) asm volatile ("msr " name ", %0; isb" :: "r" ((uint64_t)(value)) : "memory")

#define ICC_PMR     "S3_0_C4_C6_0"
#define ICC_IAR1    "S3_0_C12_C12_0"
#define ICC_EOIR1   "S3_0_C12_C12_1"
#define ICC_SRE     "S3_0_C12_C12_5"
#define ICC_IGRPEN1 "S3_0_C12_C12_7"

/* ---- device tree ---- */

static uint32_t big_endian(const void *at)
{
    return __builtin_bswap32(*(const uint32_t *)at);
}

static bool equal(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

/* `compatible` is several strings, one after the other. */
static bool names(const char *list, uint32_t size, const char *wanted)
{
    const char *end = list + size;

    while (list < end) {
        if (equal(list, wanted))
            return true;
        while (*list++)
            ;
    }
    return false;
}

static void read_device_tree(const char *blob)
{
    const char *at = blob + big_endian(blob + 8), *strings = blob + big_endian(blob + 12);

    if (big_endian(blob) != 0xd00dfeed)
        return;
    for (;;) {
        uint32_t token = big_endian(at);

        at += 4;
        if (token == 1) {                               /* a node begins: its name */
            while (*at++)
                ;
        } else if (token == 3) {                        /* a property */
            uint32_t size = big_endian(at);
            const char *name = strings + big_endian(at + 4);

            at += 8;
            if (equal(name, "bootargs"))
                cmdline = at;
            if (equal(name, "compatible")) {
                has_uart |= names(at, size, "arm,sbsa-uart");
                has_gic_v3 |= names(at, size, "arm,gic-v3");
            }
            at += size;
        } else if (token == 9) {
            return;
        }
        at = (const char *)(((uintptr_t)at + 3) & ~(uintptr_t)3);
    }
}

/* ---- timer ---- */

/*
 * Interrupts are never taken, but the timer's must be enabled: one that fires
 * between setting the timer and the wfi has to be still pending for the wfi.
 */
static void start_timer_interrupt(void)
{
    if (has_gic_v3) {
        write_sysreg(ICC_SRE, read_sysreg(ICC_SRE) | 1);
        mmio_write(GICD_BASE, 0x12);                            /* affinity routing, group 1 */
        mmio_write(GICR_BASE + 0x10080, UINT32_MAX);            /* all in group 1 */
        mmio_write(GICR_BASE + 0x10100, 1u << TIMER_PPI);
        write_sysreg(ICC_PMR, 0xf8);
        write_sysreg(ICC_IGRPEN1, 1);
    } else {
        mmio_write(GICD_BASE, 1);
        mmio_write(GICD_BASE + 0x100, 1u << TIMER_PPI);
        mmio_write(GICC_BASE + 0x04, 0xf8);
        mmio_write(GICC_BASE, 1);
    }
}

static void end_timer_interrupt(void)
{
    if (has_gic_v3) {
        uint64_t irq = read_sysreg(ICC_IAR1);

        if (irq < 1020)
            write_sysreg(ICC_EOIR1, irq);
    } else {
        uint32_t irq = mmio_read(GICC_BASE + 0x0c);

        if ((irq & 0x3ff) < 1020)
            mmio_write(GICC_BASE + 0x10, irq);
    }
}

static uint64_t ns_of(uint64_t ticks)
{
    return ticks / clock_hz * 1000000000 + ticks % clock_hz * 1000000000 / clock_hz;
}

static uint64_t ticks_of(uint64_t ns)
{
    return ns / 1000000000 * clock_hz + ns % 1000000000 * clock_hz / 1000000000 + 1;
}

_Noreturn void board_entry(const char *device_tree)
{
    clock_hz = read_sysreg("cntfrq_el0");
    read_device_tree(device_tree);
    start_timer_interrupt();
    guest_main(cmdline);
}

/* ---- what main.c asks for ---- */

#define UART_FR   (UART_BASE + 0x18)
#define FR_TXFF   (1u << 5)
#define FR_TXFE   (1u << 7)

/* Nobody may be reading: better a lost character than a guest that waits for ever. */
static void uart_wait(uint32_t mask, uint32_t want)
{
    for (unsigned int ms = 0; ms < 2000 && (mmio_read(UART_FR) & mask) != want; ms++)
        board_sleep_until_ns(board_now_ns() + 1000000);
}

void board_putc(char c)
{
    if (!has_uart)
        return;
    uart_wait(FR_TXFF, 0);
    mmio_write(UART_BASE, (uint8_t)c);
}

/* The ring dies with the domain: xenconsoled has to have read it by then. */
void board_drain(void)
{
    if (has_uart)
        uart_wait(FR_TXFE, FR_TXFE);
}

uint64_t board_now_ns(void)
{
    asm volatile ("isb" ::: "memory");
    return ns_of(read_sysreg("cntvct_el0"));
}

void board_sleep_until_ns(uint64_t when)
{
    write_sysreg("cntv_cval_el0", ticks_of(when));
    while (board_now_ns() < when) {
        write_sysreg("cntv_ctl_el0", 1);                        /* Xen masks it when it fires */
        asm volatile ("dsb sy; wfi" ::: "memory");
        write_sysreg("cntv_ctl_el0", 0);
        end_timer_interrupt();
    }
}

_Noreturn void board_idle(void)
{
    for (;;)
        asm volatile ("dsb sy; wfi" ::: "memory");
}

void board_relax(void)
{
    asm volatile ("yield" ::: "memory");
}

bool board_has_gib_blocks(void)
{
    return true;
}

void board_map_changed(void)
{
    asm volatile ("dsb ishst; isb" ::: "memory");
}

long board_sched_op(unsigned int op, void *arg)
{
    register uint64_t x0 asm("x0") = op, x1 asm("x1") = (uintptr_t)arg, x16 asm("x16") = 29;    /* __HYPERVISOR_sched_op */

    asm volatile ("hvc #0xea1" : "+r" (x0), "+r" (x1), "+r" (x16) :: "memory", "x2", "x3", "x4");
    return (long)x0;
}
