/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a PC boots from the disk under test, to say whether that disk works: it
 * reads sector 1, wants the word "XSHM" at its start, adds one to the number
 * after it, writes all of it to sector 2 and leaves with QEMU's isa-debug-exit
 * (0x10 for right, 0x11 for wrong). The BIOS drives the disk.
 */
    .code16
    .globl _start
_start:
    xorw    %ax, %ax
    movw    %ax, %ds
    movw    %ax, %es
    movw    %ax, %ss
    movw    $0x7c00, %sp
    movw    $0x0080, %dx            /* head 0 of the first disk */
    movw    $0x0201, %ax            /* read one sector */
    movw    $0x0002, %cx            /* cylinder 0, sector 2 counted from 1 */
    movw    $0x8000, %bx
    int     $0x13
    jc      wrong
    cmpl    $0x4d485358, 0x8000
    jne     wrong
    incl    0x8004
    movw    $0x0080, %dx
    movw    $0x0301, %ax            /* write one */
    movw    $0x0003, %cx
    movw    $0x8000, %bx
    int     $0x13
    jc      wrong
    movb    $0x10, %al
    jmp     leave
wrong:
    movb    $0x11, %al
leave:
    outb    %al, $0xf4
    cli
stay:                               /* QEMU leaves when it gets to it, with the last it was told */
    hlt
    jmp     stay
    .org    510
    .word   0xaa55
