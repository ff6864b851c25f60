/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * A guest that nobody hears proves nothing. One call is one line, built whole
 * and then sent, always begun with the guest's name so that logs of several
 * guests can be told apart and a test can wait for an exact line.
 */
#include <stdarg.h>

#include "baremetal.h"

const char *say_name = "baremetal";

static char line[192];                  /* Xen cuts x86 guests' lines at 199 bytes */
static size_t length;

static void put(char c)
{
    if (length < sizeof(line) - 1)
        line[length++] = c;
}

static void put_text(const char *text)
{
    while (*text)
        put(*text++);
}

static void put_number(uint64_t value, unsigned int base)
{
    char digits[20];
    unsigned int n = 0;

    do {
        digits[n++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    while (n)
        put(digits[--n]);
}

void say(const char *format, ...)
{
    va_list args;

    length = 0;
    put_text(say_name);
    put_text(": ");
    va_start(args, format);
    for (; *format; format++) {
        if (*format != '%') {
            put(*format);
            continue;
        }
        switch (*++format) {
        case 's': put_text(va_arg(args, const char *)); break;
        case 'u': put_number(va_arg(args, uint64_t), 10); break;
        case 'x': put_text("0x"); put_number(va_arg(args, uint64_t), 16); break;
        }
    }
    va_end(args);
    line[length++] = '\n';
    for (size_t i = 0; i < length; i++)
        board_putc(line[i]);
}
