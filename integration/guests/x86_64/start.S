/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * Xen starts a PVH guest in flat 32-bit mode, paging off, with ebx at its
 * hvm_start_info. Regions lie far above 4 GiB, so the first thing to do is get
 * to 64-bit mode, with the first GiB mapped where it is; map.c adds the rest.
 */
#define STACK_SIZE 8192
#define CODE64 0x08
#define DATA64 0x10

    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 4, 18                      /* name and value sizes, XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long _start

    .section .text.start, "ax"
    .code32
    .globl _start
_start:
    cld
    mov $stack_top, %esp

    mov $(map_low_table + 3), %eax      /* present, writable */
    mov %eax, map_gib_table
    mov $(map_gib_table + 3), %eax
    mov %eax, top_table
    xor %ecx, %ecx
    mov $0x83, %eax                     /* ... and 2 MiB large */
1:  mov %eax, map_low_table(, %ecx, 8)
    add $0x200000, %eax
    inc %ecx
    cmp $512, %ecx
    jne 1b

    mov $top_table, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x20, %eax                      /* PAE */
    mov %eax, %cr4
    mov $0xc0000080, %ecx               /* EFER: long mode */
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80010001, %eax                /* paging, write protect, protected mode */
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $CODE64, $start64

    .code64
start64:
    mov $DATA64, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov %ebx, %edi
    call board_entry
    ud2

/* Exceptions: what happened goes to board_exception(vector, error, ip), which does not come back. */
    .balign 16
    .globl exception_stubs
exception_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)
    push $0                             /* the CPU pushes an error code for the others */
    .endif
    push $vector
    jmp exception
    .set vector, vector + 1
    .endr

exception:
    pop %rdi
    pop %rsi
    mov (%rsp), %rdx
    and $-16, %rsp
    call board_exception
    ud2

/* The APIC timer's only purpose is to end a hlt. */
    .globl timer_stub
timer_stub:
    push %rax
    push %rcx
    push %rdx
    mov $0x80b, %ecx                    /* x2APIC EOI */
    xor %eax, %eax
    xor %edx, %edx
    wrmsr
    pop %rdx
    pop %rcx
    pop %rax
    iretq

    .section .rodata
    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff            /* code, 64-bit */
    .quad 0x00cf93000000ffff            /* data */
gdt_pointer:
    .word . - gdt - 1
    .long gdt

    .bss
    .balign 4096
top_table:
    .skip 4096
    .skip STACK_SIZE
stack_top:

    .section .note.GNU-stack, "", @progbits
