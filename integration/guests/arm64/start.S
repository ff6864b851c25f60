/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Xen loads an arm64 guest as it loads Linux: this header, MMU and caches off,
 * x0 at the device tree. A region is write-back memory that others cache too,
 * so nothing may touch it before the caches are on; that needs page tables,
 * and these say what is memory and what is a device.
 */
#define STACK_SIZE  8192
#define NORMAL      0x701               /* block, MAIR 0, inner shareable, accessed */
#define DEVICE      0x405               /* block, MAIR 1, accessed */
#define GIC_BLOCK   (0x03000000 >> 21)
#define UART_BLOCK  (0x22000000 >> 21)

    .section .text.start, "ax"
    .globl _start
_start:                                 /* Linux: Documentation/arch/arm64/booting.rst */
    b begin
    .long 0
    .quad 0                             /* at the start of RAM: link.ld knows where that is */
    .quad image_size
    .quad 2                             /* little-endian, 4 KiB pages */
    .quad 0, 0, 0
    .ascii "ARM\x64"
    .long 0

begin:
    mov x19, x0
    ldr x1, =bss_start
    ldr x2, =image_end
1:  stp xzr, xzr, [x1], #16
    cmp x1, x2
    b.lo 1b

    ldr x1, =map_gib_table
    ldr x2, =map_low_table
    orr x3, x2, #3
    str x3, [x1]                        /* GiB 0: devices, and the regions of small address */
    ldr x3, =0x40000000 + NORMAL
    str x3, [x1, #8]                    /* GiB 1: RAM */
    ldr x3, =(GIC_BLOCK << 21) + DEVICE
    str x3, [x2, #GIC_BLOCK * 8]
    ldr x3, =(UART_BLOCK << 21) + DEVICE
    str x3, [x2, #UART_BLOCK * 8]

    dsb sy                              /* drop cached copies older than what was just written */
    mrs x4, ctr_el0
    ubfx x4, x4, #16, #4
    mov x5, #4
    lsl x5, x5, x4                      /* bytes in a data cache line */
    ldr x1, =bss_start
    ldr x2, =image_end
2:  dc ivac, x1
    add x1, x1, x5
    cmp x1, x2
    b.lo 2b
    dsb sy

    ldr x1, =0x04ff                     /* 0: write-back memory, 1: device */
    msr mair_el1, x1
    mrs x2, id_aa64mmfr0_el1
    and x2, x2, #7                      /* physical address size */
    ldr x1, =0x00803519                 /* TTBR0 only: 39 bits, 4 KiB, write-back, inner shareable */
    orr x1, x1, x2, lsl #32
    msr tcr_el1, x1
    ldr x1, =map_gib_table
    msr ttbr0_el1, x1
    ldr x1, =vectors
    msr vbar_el1, x1
    tlbi vmalle1
    ic iallu
    dsb sy
    isb
    mrs x1, sctlr_el1
    ldr x2, =0x1005                     /* MMU, data and instruction caches */
    orr x1, x1, x2
    msr sctlr_el1, x1
    isb

    ldr x1, =stack_top
    mov sp, x1
    mov x29, xzr
    mov x30, xzr
    mov x0, x19
    bl board_entry

/* Interrupts stay masked (a wfi ends all the same), so whatever comes here is a fault. */
    .balign 2048
vectors:
    .rept 16
    .balign 128
    ldr x0, =stack_top
    mov sp, x0
    mrs x0, far_el1
    mrs x1, elr_el1
    mrs x2, esr_el1
    b guest_fault
    .endr
    .ltorg

    .bss
    .balign 4096
    .skip STACK_SIZE
stack_top:

    .section .note.GNU-stack, "", %progbits
