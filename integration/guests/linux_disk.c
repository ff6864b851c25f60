/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The bare-metal guest's disk (disk.c) as a program of a Linux guest, whose
 * kernel has no part in it. Requests name guest-physical addresses, so the
 * region is mapped where it is: for this program, too, both are one.
 *
 *     xshm-disk START SIZE SECTORS SEED
 */
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include "baremetal.h"

#define NS_PER_S 1000000000u

void say(const char *format, ...)
{
    va_list values;

    va_start(values, format);
    for (; *format; format++)
        if (format[0] == '%' && format[1] == 'u') {
            printf("%" PRIu64, va_arg(values, uint64_t));
            format++;
        } else {
            putchar(*format);
        }
    va_end(values);
    putchar('\n');
}

uint64_t board_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

void board_sleep_until_ns(uint64_t when)
{
    struct timespec until = { (time_t)(when / NS_PER_S), (long)(when % NS_PER_S) };

    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    uint64_t start = strtoull(argv[1], NULL, 0), size = strtoull(argv[2], NULL, 0);
    void *wanted = (void *)(uintptr_t)start;
    int fd = open("/dev/mem", O_RDWR);
    void *there = fd < 0 ? MAP_FAILED : mmap(wanted, size, PROT_READ | PROT_WRITE,
                                             MAP_SHARED | MAP_FIXED_NOREPLACE, fd, (off_t)start);

    if (there != wanted) {
        perror("xshm-disk: the region cannot be mapped where it is");
        return 1;
    }
    disk_write_and_read(start, strtoull(argv[3], NULL, 0), (uint32_t)strtoul(argv[4], NULL, 0));
    return 0;
}
