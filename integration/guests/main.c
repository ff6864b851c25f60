/* SPDX-License-Identifier: BSD-2-Clause */
/*
 * The user xshmd exists for: a guest without an operating system, grants or
 * xenstore, that knows nothing but an address. It does the verbs its command
 * line names, one after the other, and says what it found; README.md lists
 * the words, region.h says what lies where. It writes to its regions only.
 */
#include "baremetal.h"
#include "bells.h"
#include "lists.h"
#include "region.h"

#define NR_REGIONS 4
#define MS 1000000u                     /* nanoseconds */

static struct region regions[NR_REGIONS];
static unsigned int nr_regions;
static uint32_t seed = 1;
uint32_t ticks = 1000, slot, peer_slot, message_bytes = 64;
static const char *verbs = "stay", *peer_name = "peer";

/* ---- ends ---- */

static _Noreturn void shut_down(enum shutdown_reason reason)
{
    struct { unsigned int reason; } arg = { reason };

    board_drain();
    board_sched_op(SCHEDOP_shutdown, &arg);
    board_idle();
}

_Noreturn void give_up(const char *what, const char *word)
{
    say("error: %s: %s", what, word);
    shut_down(SHUTDOWN_crash);
}

_Noreturn void guest_fault(uint64_t addr, uint64_t ip, uint64_t why)
{
    static bool again;

    if (!again) {                       /* a fault while saying so must not go round for ever */
        again = true;
        say("fault addr=%x ip=%x why=%x", addr, ip, why);
    }
    shut_down(SHUTDOWN_crash);
}

/* ---- words ---- */

static bool ends(char c)
{
    return c == '\0' || c == ' ' || c == ',' || c == ':' || c == '\n';
}

static bool same(const char *word, const char *name)
{
    while (*name && *word == *name)
        word++, name++;
    return *name == '\0' && ends(*word);
}

static const char *after(const char *word, const char *key)
{
    while (*key && *word == *key)
        word++, key++;
    return *key == '\0' ? word : NULL;
}

/* Decimal or 0x; leaves *at behind it. */
static uint64_t number(const char **at)
{
    const char *p = *at, *start = p;
    unsigned int base = 10, digit;
    uint64_t value = 0;

    if (p[0] == '0' && (p[1] == 'x' || p[1] == 'X'))
        base = 16, p += 2, start = p;
    for (;; p++) {
        if (*p >= '0' && *p <= '9')
            digit = *p - '0';
        else if ((*p | 0x20) >= 'a' && (*p | 0x20) <= 'f')
            digit = (*p | 0x20) - 'a' + 10;
        else
            break;
        if (digit >= base || value > (UINT64_MAX - digit) / base)
            give_up("bad number", *at);
        value = value * base + digit;
    }
    if (p == start || !ends(*p))
        give_up("bad number", *at);
    *at = p;
    return value;
}

static uint32_t small(const char *text, uint32_t most)
{
    const char *at = text;
    uint64_t value = number(&at);

    if (value > most)
        give_up("number too big", text);
    return (uint32_t)value;
}

/* The text of a value, copied out of the command line. */
static const char *copied(const char *text)
{
    static char room[96];
    static size_t used;
    char *copy = room + used;

    while (*text && *text != ' ' && used < sizeof(room) - 1)
        room[used++] = *text++;
    room[used] = '\0';
    if (used < sizeof(room) - 1)
        used++;
    return copy;
}

static void add_region(const char *text)
{
    const char *at = text;
    uint64_t start = number(&at), size = PAGE_SIZE;

    if (*at == ',') {
        at++;
        size = number(&at);
    }
    if (nr_regions == NR_REGIONS)
        give_up("too many regions", text);
    if (start % PAGE_SIZE || size % PAGE_SIZE || size == 0)
        give_up("not whole pages", text);
    if (start < (uintptr_t)image_end && start + size > (uintptr_t)image_start)
        give_up("the region is where this guest is", text);
    if (!map_identity(start, size))
        give_up("cannot be mapped", text);
    regions[nr_regions++] = (struct region){ start, size / PAGE_SIZE };
}

static void read_words(const char *cmdline)
{
    const char *word, *value;
    bool peer_given = false;

    for (word = cmdline; (value = after(word, " ")) || *word; ) {
        if (value) {
            word = value;
            continue;
        }
        if ((value = after(word, "name=")))
            say_name = copied(value);
        else if ((value = after(word, "peer=")))
            peer_name = copied(value);
        else if ((value = after(word, "shm=")))
            add_region(value);
        else if ((value = after(word, "do=")))
            verbs = value;
        else if ((value = after(word, "seed=")))
            seed = small(value, UINT32_MAX);
        else if ((value = after(word, "bytes=")))
            message_bytes = small(value, PAGE_SIZE);
        else if ((value = after(word, "ticks=")))
            ticks = small(value, UINT32_MAX);
        else if ((value = after(word, "slot=")))
            slot = small(value, NR_SLOTS - 1);
        else if ((value = after(word, "peer-slot=")))
            peer_slot = small(value, NR_SLOTS - 1), peer_given = true;
        while (*word && *word != ' ')
            word++;                     /* a word we do not know is somebody else's */
    }
    if (!peer_given)
        peer_slot = slot ^ 1;
}

/* ---- the region ---- */

static uint64_t *word_at(const struct region *r, uint64_t page, unsigned int offset)
{
    return (uint64_t *)(uintptr_t)(r->start + page * PAGE_SIZE + offset);
}

void sleep_ms(uint64_t ms)
{
    board_sleep_until_ns(board_now_ns() + ms * MS);
}

/*
 * The n-th wait between two looks at a word. The other guest may share our CPU
 * (and does, under emulation), so spinning alone would keep it from answering.
 */
static void wait_a_little(unsigned int n)
{
    if (n % 64 < 63)
        board_relax();
    else if (n < 4096)
        board_sched_op(SCHEDOP_yield, NULL);
    else
        sleep_ms(1);
}

/* ---- verbs ---- */

static void do_boots(const struct region *r)
{
    uint32_t *boots = &page0(r)->slot[slot].boots;
    uint32_t found = get(boots) + 1;

    set(boots, found);
    say("boots=%u", (uint64_t)found);
}

static void do_fill(const struct region *r)
{
    set(&page0(r)->filled, (uint64_t)0);
    for (uint64_t page = 0; page < r->nr_pages; page++) {
        set(word_at(r, page, TAG_FIRST), region_tag(page, seed));
        set(word_at(r, page, TAG_LAST), region_tag(page, seed));
    }
    set(&page0(r)->filled, FILLED | seed);
    say("filled pages=%u seed=%u", r->nr_pages, (uint64_t)seed);
}

static void do_check(const struct region *r)
{
    uint64_t bad = 0;

    for (uint64_t page = 0; page < r->nr_pages; page++) {
        uint64_t want = region_tag(page, seed);
        uint64_t first = get(word_at(r, page, TAG_FIRST)), last = get(word_at(r, page, TAG_LAST));

        if (first == want && last == want)
            continue;
        if (bad++ == 0)
            say("bad page=%u first=%x last=%x want=%x", page, first, last, want);
    }
    say("checked pages=%u bad=%u seed=%u", r->nr_pages, bad, (uint64_t)seed);
}

static void do_await_fill(const struct region *r)
{
    while (get(&page0(r)->filled) != (FILLED | seed))
        sleep_ms(10);
    say("fill seen seed=%u", (uint64_t)seed);
}

/*
 * ping adds one to what it finds in pong's word, pong copies that. Both only
 * look at the difference, so a counter left by an earlier run does no harm and
 * either side may start first.
 */
static void say_rounds(const char *side, uint32_t last, uint64_t began)
{
    say("%s rounds=%u last=%u us=%u", side, (uint64_t)ticks, (uint64_t)last,
        (board_now_ns() - began) / 1000);
}

static void do_ping(const struct region *r)
{
    uint32_t *mine = &page0(r)->slot[slot].ping, *theirs = &page0(r)->slot[peer_slot].ping;
    uint32_t next = get(theirs);
    uint64_t began = 0;

    for (uint32_t round = 0; round < ticks; round++) {
        set(mine, ++next);
        for (unsigned int n = 0; get(theirs) != next; n++)
            wait_a_little(n);
        if (round == 0)
            began = board_now_ns();     /* the first answer may wait for the other's boot */
    }
    say_rounds("ping", next, began);
}

static void do_pong(const struct region *r)
{
    uint32_t *mine = &page0(r)->slot[slot].ping, *theirs = &page0(r)->slot[peer_slot].ping;
    uint32_t next = get(mine);
    uint64_t began = 0;

    for (uint32_t round = 0; round < ticks; round++) {
        next++;
        for (unsigned int n = 0; get(theirs) != next; n++)
            wait_a_little(n);
        set(mine, next);
        if (round == 0)
            began = board_now_ns();
    }
    say_rounds("pong", next, began);
}

static _Noreturn void beat_and_watch(const struct region *r, bool beats, bool watches)
{
    uint32_t seen[NR_SLOTS];

    for (unsigned int k = 0; k < NR_SLOTS; k++)
        seen[k] = get(&page0(r)->slot[k].beat);
    for (unsigned int turn = 1;; turn++) {
        uint32_t *mine = &page0(r)->slot[slot].beat;

        sleep_ms(100);
        if (beats)
            set(mine, get(mine) + 1);
        for (unsigned int k = 0; watches && turn % 10 == 0 && k < NR_SLOTS; k++) {
            uint32_t beat = get(&page0(r)->slot[k].beat);

            if (k == slot || beat == seen[k])
                continue;
            seen[k] = beat;
            say("peer slot=%u beat=%u", (uint64_t)k, (uint64_t)beat);
        }
    }
}

static void do_beat(const struct region *r)
{
    beat_and_watch(r, true, false);
}

static void do_watch(const struct region *r)
{
    beat_and_watch(r, false, true);
}

static void do_beat_watch(const struct region *r)
{
    beat_and_watch(r, true, true);
}

static void do_talk(const struct region *r)
{
    for (;;) {
        uint32_t *mine = &page0(r)->slot[slot].talk;
        uint32_t count = get(mine) + 1;

        set(mine, count);
        say("wrote %u, sees %s's %u", (uint64_t)count, peer_name,
            (uint64_t)get(&page0(r)->slot[peer_slot].talk));
        sleep_ms(1000);
    }
}

/* FNV-1a over 64-bit words: whoever maps the same bytes gets the same number. */
static void do_hash(const struct region *r)
{
    uint64_t hash = 0xcbf29ce484222325u, words = r->nr_pages * (PAGE_SIZE / 8);

    for (uint64_t i = 0; i < words; i++)
        hash = (hash ^ *((volatile uint64_t *)(uintptr_t)r->start + i)) * 0x100000001b3u;
    say("hash=%x pages=%u", hash, r->nr_pages);
}

static void do_peek(const struct region *r)
{
    say("peek addr=%x word=%x", r->start, get(&page0(r)->free_word));
}

static void do_disk(const struct region *r)
{
    disk_write_and_read(r->start, ticks, seed);
}

/* ---- lists: the last page is the request page, all pages before it but the first are data ---- */

#define DATA(r) (((r)->nr_pages - 2) * PAGE_SIZE)

static struct lists_page *request_page(const struct region *r)
{
    struct lists_page *page = (struct lists_page *)word_at(r, r->nr_pages - 1, 0);

    if (r->nr_pages < 4)
        give_up("too small for lists", "the region");
    while (!lists_open(page))
        sleep_ms(10);
    return page;
}

static uint64_t ask(struct lists_page *page, enum lists_operation operation)
{
    page->operation = operation;
    page->list = 0;
    lists_ask(page);
    while (!lists_answered(page))
        sleep_ms(1);
    if (page->status && page->status != LISTS_NO_LIST)
        say("refused operation=%u status=%u", (uint64_t)operation, (uint64_t)page->status);
    return page->status ? 0 : page->result;
}

/* All of the data, from an odd place on and then what is before it; cut once more at another. */
static void name_data(const struct region *r, struct lists_page *page, uint64_t cut)
{
    const uint64_t from = 4099;

    page->range[0] = (struct lists_range){ PAGE_SIZE + from, cut - from };
    page->range[1] = (struct lists_range){ PAGE_SIZE + cut, DATA(r) - cut };
    page->range[2] = (struct lists_range){ PAGE_SIZE, from };
    page->nr_ranges = 3;
}

static void do_offer(const struct region *r)
{
    struct lists_page *page = request_page(r);
    uint64_t moved;

    for (uint64_t at = 1; at < r->nr_pages - 1; at++) {
        set(word_at(r, at, TAG_FIRST), region_tag(at, seed));
        set(word_at(r, at, TAG_LAST), region_tag(at, seed));
    }
    name_data(r, page, 5000);
    while (!(moved = ask(page, LISTS_TRANSFER_OUTPUT)))
        sleep_ms(10);                   /* nobody has posted a list yet */
    say("offered bytes=%u", moved);
}

static void do_accept(const struct region *r)
{
    struct lists_page *page = request_page(r);
    uint64_t *count = &page0(r)->free_word, bad = 0;

    set(count, (uint64_t)0);
    name_data(r, page, 4100);
    page->count_place = 1;              /* the region's first word */
    say("posted list=%u", ask(page, LISTS_REGISTER_INPUT));
    while (!get(count))
        sleep_ms(10);
    for (uint64_t at = 1; at < r->nr_pages - 1; at++) {
        uint64_t want = region_tag(at, seed);

        bad += get(word_at(r, at, TAG_FIRST)) != want || get(word_at(r, at, TAG_LAST)) != want;
    }
    say("accepted bytes=%u bad=%u", get(count), bad);
}

static void do_stay(const struct region *r)
{
    (void)r;
    board_idle();
}

static void do_poweroff(const struct region *r)
{
    (void)r;
    say("poweroff");
    shut_down(SHUTDOWN_poweroff);
}

static void do_reboot(const struct region *r)
{
    (void)r;
    say("reboot");
    shut_down(SHUTDOWN_reboot);
}

static void do_crash(const struct region *r)
{
    (void)r;
    say("crash");
    shut_down(SHUTDOWN_crash);
}

static void do_reboot_once(const struct region *r)
{
    if (get(&page0(r)->slot[slot].boots) == 1)
        do_reboot(r);
}

static const struct verb {
    const char *name;
    void (*run)(const struct region *);
    bool needs_region;
} known[] = {
    { "boots",       do_boots,       true },
    { "fill",        do_fill,        true },
    { "check",       do_check,       true },
    { "await-fill",  do_await_fill,  true },
    { "ping",        do_ping,        true },
    { "pong",        do_pong,        true },
    { "beat",        do_beat,        true },
    { "watch",       do_watch,       true },
    { "beat-watch",  do_beat_watch,  true },
    { "talk",        do_talk,        true },
    { "hash",        do_hash,        true },
    { "peek",        do_peek,        true },
    { "disk",        do_disk,        true },
    { "peers",       do_peers,       true },
    { "await-peer",  do_await_peer,  true },
    { "bell-ping",   do_bell_ping,   true },
    { "bell-pong",   do_bell_pong,   true },
    { "flood",       do_flood,       true },
    { "flooded",     do_flooded,     true },
    { "trigger",     do_trigger,     true },
    { "triggered",   do_triggered,   true },
    { "send",        do_send,        true },
    { "receive",     do_receive,     true },
    { "scribble",    do_scribble,    true },
    { "survive",     do_survive,     true },
    { "offer",       do_offer,       true },
    { "accept",      do_accept,      true },
    { "reboot-once", do_reboot_once, true },
    { "stay",        do_stay,        false },
    { "poweroff",    do_poweroff,    false },
    { "reboot",      do_reboot,      false },
    { "crash",       do_crash,       false },
};

static const struct verb *verb_named(const char *word)
{
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++)
        if (same(word, known[i].name))
            return &known[i];
    give_up("unknown verb", word);
}

static void run_verbs(const char *at)
{
    while (*at && *at != ' ') {
        const struct verb *verb = verb_named(at);
        uint64_t which = 0;

        while (!ends(*at))
            at++;
        if (*at == ':') {
            at++;
            which = number(&at);
        }
        if (verb->needs_region && which >= nr_regions)
            give_up("no such region for", verb->name);
        verb->run(which < nr_regions ? &regions[which] : NULL);
        if (*at == ',')
            at++;
    }
}

_Noreturn void guest_main(const char *cmdline)
{
    read_words(cmdline);
    if (nr_regions == 0)
        say("hello name=%s slot=%u", say_name, (uint64_t)slot);
    for (unsigned int i = 0; i < nr_regions; i++)
        say("hello name=%s slot=%u region=%u shm=%x size=%u", say_name, (uint64_t)slot,
            (uint64_t)i, regions[i].start, regions[i].nr_pages * PAGE_SIZE);
    run_verbs(verbs);
    say("done");
    board_idle();
}
