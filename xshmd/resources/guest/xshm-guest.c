/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * A Linux guest maps the regions it was granted with nothing but this program
 * and two devices: /dev/xen/xenbus, by which it reads what it has, and
 * /dev/xen/gntdev, by which it maps that. Regions that are in its physical
 * address space already (transport=physmap) are listed too, and need no mapping.
 *
 *     cc -O2 -static -o xshm-guest xshm-guest.c
 *
 *     xshm-guest list             the regions, one a line, as xshmd says them
 *     xshm-guest map [-r] ID      map one, obey lines on standard input until it ends
 *     xshm-guest dump ID          its bytes to standard output
 *
 * The lines `map` obeys: `get OFFSET` and `put OFFSET VALUE`, of 64-bit words.
 * -r maps for reading only, which is all that prot=ro allows. `put` then tries
 * all the same, past the guest's own page tables, and says what comes of it.
 *
 * Exit status: 0 ok, 1 failed, 2 usage, 4 no such region, 5 refused by Xen.
 */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096u
#define MAX_RANGES 512          /* more do not fit into a xenstore node */
#define PAYLOAD_MAX 4096u       /* XENSTORE_PAYLOAD_MAX */
/* The most references in one request that every gntdev takes (its parameter `limit`). */
#define BATCH 16384u
#define STORE_S 2               /* a store that takes longer is not allowed to end */

enum { OK = 0, FAILED = 1, USAGE = 2, NO_SUCH = 4, REFUSED = 5 };

/* ---- xenstore: xen/include/public/io/xs_wire.h ------------------------------------------- */

enum { XS_DIRECTORY = 1, XS_READ = 2, XS_ERROR = 16 };

struct xs_header {
    uint32_t type, request, transaction, length;
};

static int all(int fd, char *data, size_t size, int writing)
{
    while (size) {
        ssize_t done = writing ? write(fd, data, size) : read(fd, data, size);

        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0) {
            if (!done)
                errno = EPIPE;
            return -1;
        }
        data += done;
        size -= (size_t)done;
    }
    return 0;
}

/* Asks for a path relative to the guest's own directory; returns the answer's length, or -1. */
static long ask(int xenbus, uint32_t type, const char *path, char answer[PAYLOAD_MAX + 1])
{
    struct xs_header header = { type, 1, 0, (uint32_t)strlen(path) + 1 };
    char request[sizeof(header) + PAYLOAD_MAX];

    if (header.length > PAYLOAD_MAX) {
        errno = ENAMETOOLONG;
        return -1;
    }
    memcpy(request, &header, sizeof(header));
    memcpy(request + sizeof(header), path, header.length);
    if (all(xenbus, request, sizeof(header) + header.length, 1) ||
        all(xenbus, (char *)&header, sizeof(header), 0))
        return -1;
    if (header.length > PAYLOAD_MAX) {
        errno = EPROTO;
        return -1;
    }
    if (all(xenbus, answer, header.length, 0))
        return -1;
    answer[header.length] = 0;
    if (header.type == XS_ERROR) {
        errno = strcmp(answer, "ENOENT") ? EACCES : ENOENT;
        return -1;
    }
    return (long)header.length;
}

static int open_device(const char *path, const char *module)
{
    int fd = open(path, O_RDWR | O_CLOEXEC);

    if (fd < 0) {
        fprintf(stderr, "xshm-guest: %s: %s\n", path, strerror(errno));
        if (errno == ENOENT)
            fprintf(stderr, "hint: modprobe %s\n", module);
        exit(FAILED);
    }
    return fd;
}

/* The value of KEY=VALUE among the words of a region's node; NULL if it is not there. */
static const char *value_of(const char *words, const char *key)
{
    size_t length = strlen(key);

    while (words) {
        words += strspn(words, " ");
        if (!strncmp(words, key, length) && words[length] == '=')
            return words + length + 1;
        words = strchr(words, ' ');
    }
    return NULL;
}

static int is_word(const char *value, const char *word)
{
    size_t length = strlen(word);

    return value && !strncmp(value, word, length) && (!value[length] || value[length] == ' ');
}

static void read_region(const char *id, char words[PAYLOAD_MAX + 1])
{
    char path[256];
    int xenbus = open_device("/dev/xen/xenbus", "xenfs");

    snprintf(path, sizeof(path), "xshm/%s", id);
    if (ask(xenbus, XS_READ, path, words) < 0) {
        if (errno == ENOENT) {
            fprintf(stderr, "xshm-guest: there is no region %s\n"
                    "hint: xshm-guest list names those there are\n", id);
            exit(NO_SUCH);
        }
        fprintf(stderr, "xshm-guest: %s in xenstore: %s\n", path, strerror(errno));
        exit(FAILED);
    }
    close(xenbus);
}

static int list(void)
{
    char ids[PAYLOAD_MAX + 1], words[PAYLOAD_MAX + 1];
    int xenbus = open_device("/dev/xen/xenbus", "xenfs");
    long length = ask(xenbus, XS_DIRECTORY, "xshm", ids);

    if (length < 0 && errno != ENOENT) {
        fprintf(stderr, "xshm-guest: xshm in xenstore: %s\n", strerror(errno));
        return FAILED;
    }
    close(xenbus);
    for (const char *id = ids; length > 0 && id < ids + length; id += strlen(id) + 1) {
        read_region(id, words);
        printf("%s %s\n", id, words);
    }
    return OK;
}

/* ---- grants: the ioctls of include/uapi/xen/gntdev.h ------------------------------------- */

struct grant_ref {
    uint32_t domid, ref;
};

struct map_grant_ref {
    uint32_t count, pad;
    uint64_t index;             /* set by the kernel: where to mmap() */
    struct grant_ref refs[];
};

#define IOCTL_GNTDEV_MAP_GRANT_REF _IOC(_IOC_NONE, 'G', 0, 24)

struct range {
    uint32_t domid, first, count;
};

/* Reads the node's word grants=HOLDER:FIRST+COUNT,...; returns how many ranges it has. */
static size_t ranges_of(const char *text, struct range *ranges, uint64_t *nr_pages)
{
    size_t nr = 0;
    int used;

    *nr_pages = 0;
    for (; nr < MAX_RANGES; nr++, text += used + 1) {
        struct range *range = &ranges[nr];

        used = 0;
        if (sscanf(text, "%u:%u+%u%n", &range->domid, &range->first, &range->count, &used) != 3 ||
            !used || !range->count)
            return 0;
        *nr_pages += range->count;
        if (text[used] != ',')
            return nr + 1;
    }
    return 0;
}

/* Maps a range of references at AT, which is reserved; exits if Xen or the kernel refuses. */
static void map_range(int gntdev, char *at, const struct range *range, int prot)
{
    for (uint32_t done = 0; done < range->count;) {
        uint32_t count = range->count - done < BATCH ? range->count - done : BATCH;
        struct map_grant_ref *map = calloc(1, sizeof(*map) + count * sizeof(map->refs[0]));

        if (!map) {
            fprintf(stderr, "xshm-guest: %s\n", strerror(errno));
            exit(FAILED);
        }
        map->count = count;
        for (uint32_t i = 0; i < count; i++) {
            map->refs[i].domid = range->domid;
            map->refs[i].ref = range->first + done + i;
        }
        if (ioctl(gntdev, IOCTL_GNTDEV_MAP_GRANT_REF, map)) {
            fprintf(stderr, "xshm-guest: %u references at a time: %s\n", count, strerror(errno));
            exit(FAILED);
        }
        /* The kernel asks Xen here, and knows from PROT_WRITE what to ask for. */
        if (mmap(at + (size_t)done * PAGE, (size_t)count * PAGE, prot, MAP_SHARED | MAP_FIXED,
                 gntdev, (off_t)map->index) == MAP_FAILED) {
            fprintf(stderr, "xshm-guest: Xen refuses references %u to %u of domain %u%s: %s\n",
                    range->first + done, range->first + done + count - 1, range->domid,
                    prot & PROT_WRITE ? " to be written" : "", strerror(errno));
            exit(REFUSED);
        }
        free(map);
        done += count;
    }
}

static volatile unsigned char *map_region(const char *id, int prot, uint64_t *size)
{
    char words[PAYLOAD_MAX + 1];
    static struct range ranges[MAX_RANGES];
    const char *grants;
    uint64_t nr_pages;
    size_t nr, i;
    char *at;
    int gntdev;

    read_region(id, words);
    grants = value_of(words, "grants");
    nr = grants ? ranges_of(grants, ranges, &nr_pages) : 0;
    if (!nr) {
        fprintf(stderr, "xshm-guest: region %s is not one to be mapped by grants: %s\n", id,
                words);
        if (is_word(value_of(words, "transport"), "physmap"))
            fprintf(stderr, "hint: it is in this guest's physical memory, where begin= says\n");
        exit(FAILED);
    }
    *size = nr_pages * PAGE;
    gntdev = open_device("/dev/xen/gntdev", "xen-gntdev");
    at = mmap(NULL, *size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) {
        fprintf(stderr, "xshm-guest: %s\n", strerror(errno));
        exit(FAILED);
    }
    for (i = 0, nr_pages = 0; i < nr; nr_pages += ranges[i++].count)
        map_range(gntdev, at + nr_pages * PAGE, &ranges[i], prot);
    return (volatile unsigned char *)at;
}

/* ---- what is done with it ----------------------------------------------------------------- */

static sigjmp_buf refused;

static void fault(int number)
{
    siglongjmp(refused, number);
}

/*
 * Writes a word, and returns NULL, or what Xen's refusal comes to: x86 drops the store (hvm.c,
 * hvm_hap_nested_page_fault(): p2m_is_discard_write()), and Arm has it tried again for ever
 * (traps.c, do_trap_stage2_abort_guest(): FSC_FLT_PERM).
 */
static const char *put(volatile unsigned char *word, uint64_t value, int prot)
{
    char *page = (char *)((uintptr_t)word & ~(uintptr_t)(PAGE - 1));
    struct sigaction action = { .sa_handler = fault };
    int number;

    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGALRM, &action, NULL);
    if (!(prot & PROT_WRITE) && mprotect(page, PAGE, PROT_READ | PROT_WRITE))
        return strerror(errno);
    number = sigsetjmp(refused, 1);
    if (!number) {
        alarm(STORE_S);
        *(volatile uint64_t *)word = value;
    }
    alarm(0);
    if (!(prot & PROT_WRITE))
        mprotect(page, PAGE, prot);
    if (number == SIGALRM)
        return "the store never ends";
    if (number)
        return strsignal(number);
    return *(volatile uint64_t *)word == value ? NULL : "the store was dropped";
}

static int map(const char *id, int prot)
{
    uint64_t size;
    volatile unsigned char *region = map_region(id, prot, &size);
    char line[256];

    printf("mapped %s %s %llu\n", id, prot & PROT_WRITE ? "rw" : "ro", (unsigned long long)size);
    fflush(stdout);
    while (fgets(line, sizeof(line), stdin)) {
        long long offset = -1, value = 0;
        int words = sscanf(line, "put %lli %lli", &offset, &value);
        const char *why;

        if (words < 2)
            words = sscanf(line, "get %lli", &offset);
        if (words < 1 || offset < 0 || offset % 8 || (uint64_t)offset >= size)
            printf("error: get OFFSET | put OFFSET VALUE, of 64-bit words below %llu\n",
                   (unsigned long long)size);
        else if (words == 1)
            printf("got %#llx\n",
                   (unsigned long long)*(volatile uint64_t *)(region + offset));
        else if ((why = put(region + offset, (uint64_t)value, prot)))
            printf("refused: %s\n", why);
        else
            printf("put %#llx\n", (unsigned long long)value);
        fflush(stdout);
    }
    return OK;
}

static int dump(const char *id)
{
    uint64_t size;
    volatile unsigned char *region = map_region(id, PROT_READ, &size);

    if (all(STDOUT_FILENO, (char *)region, size, 1)) {
        fprintf(stderr, "xshm-guest: standard output: %s\n", strerror(errno));
        return FAILED;
    }
    return OK;
}

int main(int argc, char **argv)
{
    int reading = argc > 2 && !strcmp(argv[1], "map") && !strcmp(argv[2], "-r");

    if (argc == 2 && !strcmp(argv[1], "list"))
        return list();
    if (argc == 3 + reading && !strcmp(argv[1], "map"))
        return map(argv[2 + reading], reading ? PROT_READ : PROT_READ | PROT_WRITE);
    if (argc == 3 && !strcmp(argv[1], "dump"))
        return dump(argv[2]);
    fprintf(stderr, "usage: xshm-guest list | map [-r] ID | dump ID\n");
    return USAGE;
}
