/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The x86_64 PVH board. There are no devices to drive: port 0xE9 is Xen's own
 * debug console, the APIC timer and the TSC are the clock, and the one
 * hypercall needed takes plain registers.
 */
#include "../baremetal.h"

#define TIMER_VECTOR 32

extern char exception_stubs[], timer_stub[];

static uint64_t tsc_khz, tsc_at_start;
static bool is_amd, gib_blocks;

struct cpuid { uint32_t a, b, c, d; };

static struct cpuid cpuid(uint32_t leaf, uint32_t subleaf)
{
    struct cpuid r;

    asm volatile ("cpuid" : "=a" (r.a), "=b" (r.b), "=c" (r.c), "=d" (r.d) : "0" (leaf), "2" (subleaf));
    return r;
}

static uint64_t rdmsr(uint32_t msr)
{
    uint32_t low, high;

    asm volatile ("rdmsr" : "=a" (low), "=d" (high) : "c" (msr));
    return (uint64_t)high << 32 | low;
}

static void wrmsr(uint32_t msr, uint64_t value)
{
    asm volatile ("wrmsr" :: "c" (msr), "a" ((uint32_t)value), "d" ((uint32_t)(value >> 32)) : "memory");
}

static uint64_t rdtsc(void)
{
    uint32_t low, high;

    asm volatile ("rdtsc" : "=a" (low), "=d" (high) :: "memory");
    return (uint64_t)high << 32 | low;
}

/* ---- start ---- */

/* xen/include/public/arch-x86/hvm/start_info.h */
struct hvm_start_info {
    uint32_t magic, version, flags, nr_modules;
    uint64_t modlist_paddr, cmdline_paddr;
};

struct gate {
    uint16_t offset_low, selector;
    uint8_t ist, type;
    uint16_t offset_mid;
    uint32_t offset_high, zero;
};

static struct gate idt[TIMER_VECTOR + 1];

static void set_gate(unsigned int vector, const char *handler)
{
    uint64_t at = (uintptr_t)handler;

    idt[vector] = (struct gate){
        .offset_low = (uint16_t)at, .offset_mid = (uint16_t)(at >> 16), .offset_high = (uint32_t)(at >> 32),
        .selector = 0x08, .type = 0x8e,                 /* present, 64-bit interrupt gate */
    };
}

static void start_exceptions(void)
{
    struct { uint16_t limit; uint64_t base; } __attribute__((packed)) pointer = { sizeof(idt) - 1, (uintptr_t)idt };

    for (unsigned int vector = 0; vector < 32; vector++)
        set_gate(vector, exception_stubs + 16 * vector);
    set_gate(TIMER_VECTOR, timer_stub);
    asm volatile ("lidt %0" :: "m" (pointer));
}

#define MSR_APIC_BASE     0x1b
#define X2APIC_TPR        0x808
#define X2APIC_SPURIOUS   0x80f
#define X2APIC_LVT_TIMER  0x832
#define X2APIC_COUNT      0x838
#define X2APIC_DIVIDE     0x83e

static void start_clock(void)
{
    /* Xen tells the TSC's frequency; its leaves may sit higher when it also shows another hypervisor's. */
    for (uint32_t base = 0x40000000; base < 0x40010000 && tsc_khz == 0; base += 0x100) {
        struct cpuid r = cpuid(base, 0);

        if (r.b == 0x566e6558 && r.c == 0x65584d4d && r.d == 0x4d4d566e)        /* "XenVMMXenVMM" */
            tsc_khz = cpuid(base + 3, 0).c;
    }
    if (tsc_khz == 0)
        tsc_khz = 1000000;              /* waits get longer or shorter, nothing else depends on it */
    tsc_at_start = rdtsc();

    wrmsr(MSR_APIC_BASE, rdmsr(MSR_APIC_BASE) | 0xc00);         /* on, x2APIC: no page to map */
    wrmsr(X2APIC_TPR, 0);
    wrmsr(X2APIC_SPURIOUS, 0x1ff);
    wrmsr(X2APIC_DIVIDE, 0xb);                                  /* by 1 */
    wrmsr(X2APIC_LVT_TIMER, TIMER_VECTOR);                      /* one shot */
}

_Noreturn void board_entry(const struct hvm_start_info *info)
{
    struct cpuid vendor = cpuid(0, 0);

    is_amd = vendor.b == 0x68747541 || vendor.b == 0x6f677948;  /* "Auth...", "Hygo..." */
    gib_blocks = cpuid(0x80000000, 0).a >= 0x80000001 && cpuid(0x80000001, 0).d >> 26 & 1;
    start_exceptions();
    start_clock();
    guest_main(info->magic == 0x336ec578 && info->cmdline_paddr ? (const char *)info->cmdline_paddr : "");
}

_Noreturn void board_exception(uint64_t vector, uint64_t error, uint64_t ip)
{
    uint64_t addr;

    (void)error;
    asm volatile ("mov %%cr2, %0" : "=r" (addr));
    guest_fault(vector == 14 ? addr : 0, ip, vector);
}

/* ---- what main.c asks for ---- */

void board_putc(char c)
{
    asm volatile ("outb %0, $0xe9" :: "a" (c));
}

void board_drain(void)
{
    /* Xen has the line when outb returns. */
}

uint64_t board_now_ns(void)
{
    uint64_t ticks = rdtsc() - tsc_at_start;

    return ticks / tsc_khz * 1000000 + ticks % tsc_khz * 1000000 / tsc_khz;
}

/* A halt with interrupts off would be a shutdown to Xen, so every halt here has them on. */
void board_sleep_until_ns(uint64_t when)
{
    for (;;) {
        uint64_t now = board_now_ns(), left;

        if (now >= when)
            return;
        left = (when - now) / 10 + 1;                           /* Xen's APIC counts at 100 MHz */
        wrmsr(X2APIC_COUNT, left < UINT32_MAX ? left : UINT32_MAX);
        asm volatile ("sti; hlt; cli" ::: "memory");            /* sti lets nothing in before hlt */
    }
}

_Noreturn void board_idle(void)
{
    wrmsr(X2APIC_COUNT, 0);
    for (;;)
        asm volatile ("sti; hlt" ::: "memory");
}

void board_relax(void)
{
    asm volatile ("pause" ::: "memory");
}

bool board_has_gib_blocks(void)
{
    return gib_blocks;
}

void board_map_changed(void)
{
    /* An entry that was absent is in no TLB. */
}

long board_sched_op(unsigned int op, void *arg)
{
    long result = 29;                                           /* __HYPERVISOR_sched_op */
    uint64_t rdi = op, rsi = (uintptr_t)arg;

    if (is_amd)
        asm volatile ("vmmcall" : "+a" (result), "+D" (rdi), "+S" (rsi) :: "memory", "rdx", "r10", "r8", "r9");
    else
        asm volatile ("vmcall" : "+a" (result), "+D" (rdi), "+S" (rsi) :: "memory", "rdx", "r10", "r8", "r9");
    return result;
}
