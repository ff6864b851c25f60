# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cases.  Each makes what it needs and leaves nothing; their order is of no matter."""

from __future__ import annotations

import errno
from collections.abc import Callable

from xshmd.errors import DomainGone, HypercallFailed, OutOfMemory, PartialMap, XshmError
from xshmd.model import (
    SHUTDOWN_CRASH,
    SHUTDOWN_POWEROFF,
    SHUTDOWN_REBOOT,
    Arch,
    MemoryKind,
    MemoryRange,
)
from xshmd.ports import Hypervisor
from xshmd.units import PAGE_SIZE, SUPERPAGE_FRAMES, DomId, Gfn, Mfn, bytes_of

from .host import (
    GUEST_GFN,
    HOLDER_GFN,
    HOST_POOL_EXHAUSTED,
    POOL_EXHAUSTED,
    ContractHost,
    equal,
    expect,
    raises,
)

Case = Callable[[Hypervisor, ContractHost], None]
CASES: list[tuple[str, Case]] = []


def case(function: Case) -> Case:
    """Add a case under its function's name."""
    CASES.append((function.__name__, function))
    return function


# -- the host, and what a fresh domain is like -----------------------------------------------------


@case
def host_info_adds_up(xen: Hypervisor, make: ContractHost) -> None:
    host = xen.host_info()
    expect(host.xen_version >= (4, 17), f"Xen {host.xen_version}")
    expect(0 < host.free_pages < host.total_pages, "free and total pages")
    expect(host.has_hvm and host.has_hap, "HVM and HAP")


@case
def dom0_is_listed_first(xen: Hypervisor, make: ContractHost) -> None:
    domains = xen.domains()
    equal(domains[0].domid, 0, "first domid")
    expect(not domains[0].paused and domains[0].cpu_time_ns > 0, "dom0 runs")
    equal([d.domid for d in domains], sorted(d.domid for d in domains), "order")


@case
def recipe_is_paused_and_has_vcpu_0(xen: Hypervisor, make: ContractHost) -> None:
    info = make.info(make.bare())
    expect(info.paused, "paused")
    equal(info.max_vcpu_id, 0, "max_vcpu_id")
    equal(info.cpu_time_ns, 0, "cpu time")
    expect(not info.shut_down and not info.dying, "alive")


@case
def recipe_is_hvm_and_hap(xen: Hypervisor, make: ContractHost) -> None:
    info = make.info(make.bare())
    expect(info.hvm and info.hap, "hvm and hap")
    expect(36 <= info.gpaddr_bits <= 52, f"gpaddr_bits {info.gpaddr_bits}")


@case
def recipe_owns_no_page_and_may_own_none(xen: Hypervisor, make: ContractHost) -> None:
    info = make.info(make.bare())
    equal(info.tot_pages, 0, "tot_pages")
    equal(info.max_pages, 0, "max_pages")


@case
def recipe_has_the_uuid_it_was_given(xen: Hypervisor, make: ContractHost) -> None:
    uuid = make.fresh_uuid()
    equal(make.info(make.bare(uuid)).uuid, uuid, "uuid")


@case
def two_domains_may_have_the_same_uuid(xen: Hypervisor, make: ContractHost) -> None:
    uuid = make.fresh_uuid()
    one, other = make.bare(uuid), make.bare(uuid)
    expect(one != other, "two domids")
    equal(make.info(one).uuid, make.info(other).uuid, "uuid")


@case
def domids_are_not_given_again_at_once(xen: Hypervisor, make: ContractHost) -> None:
    first = make.bare()
    make.destroy(first)
    make.gone(first)
    expect(make.bare() != first, "the same domid again")


@case
def domain_info_of_nobody_is_none(xen: Hypervisor, make: ContractHost) -> None:
    equal(xen.domain_info(make.unused_domid()), None, "info")


@case
def domain_info_is_exact_where_a_later_domain_exists(xen: Hypervisor, make: ContractHost) -> None:
    first, second = make.bare(), make.bare()
    make.destroy(first)
    make.gone(first)
    equal(xen.domain_info(first), None, "info of the hole")
    equal(make.info(second).domid, second, "domid after the hole")


@case
def domains_lists_each_scratch_domain_once(xen: Hypervisor, make: ContractHost) -> None:
    made = {make.bare() for _ in range(5)}
    listed = [info.domid for info in xen.domains() if info.domid in made]
    equal(sorted(listed), sorted(made), "listed")


@case
def more_domains_than_one_call_lists(xen: Hypervisor, make: ContractHost) -> None:
    before = len(xen.domains())
    for _ in range(66):
        make.bare()
    equal(len(xen.domains()), before + 66, "number of domains")


@case
def creation_and_destruction_are_page_exact(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact():
        domid = make.bare()
        make.destroy(domid)
        make.gone(domid)


@case
def reserved_domids_never_reach_xen(xen: Hypervisor, make: ContractHost) -> None:
    for domid in (0x7FF0, 0x7FF2, 0x7FF4, -1):
        try:
            xen.pause(DomId(domid))
        except ValueError:
            continue
        expect(False, f"domid {domid:#x} was let through")


# -- unknown domains -------------------------------------------------------------------------------


def _gone_calls(xen: Hypervisor, domid: DomId, mfn: Mfn) -> dict[str, Callable[[], object]]:
    return {
        "destroy": lambda: xen.destroy(domid),
        "pause": lambda: xen.pause(domid),
        "unpause": lambda: xen.unpause(domid),
        "shut_down": lambda: xen.shut_down(domid, SHUTDOWN_POWEROFF),
        "set_max_pages": lambda: xen.set_max_pages(domid, 1),
        "paging_pool_bytes": lambda: xen.paging_pool_bytes(domid),
        "set_paging_pool_bytes": lambda: xen.set_paging_pool_bytes(domid, PAGE_SIZE),
        "unmap": lambda: xen.unmap(domid, GUEST_GFN, 1),
        "map_foreign": lambda: xen.map_foreign(domid, GUEST_GFN, DomId(1), HOLDER_GFN, 1),
        "map_host_range": lambda: xen.map_host_range(domid, GUEST_GFN, mfn, 1),
        "unmap_host_range": lambda: xen.unmap_host_range(domid, GUEST_GFN, mfn, 1),
    }


def _unknown(name: str) -> None:
    def run(xen: Hypervisor, make: ContractHost) -> None:
        with raises(DomainGone, errno.ESRCH):
            _gone_calls(xen, make.unused_domid(), make.host_memory())[name]()

    run.__name__ = f"{name}_of_nobody_is_domain_gone"
    case(run)


for _name in (
    "destroy", "pause", "unpause", "shut_down", "set_max_pages", "paging_pool_bytes",
    "set_paging_pool_bytes", "unmap", "map_foreign", "map_host_range", "unmap_host_range",
):  # fmt: skip
    _unknown(_name)


@case
def set_target_from_nobody_is_domain_gone(xen: Hypervisor, make: ContractHost) -> None:
    nobody, holder = make.unused_domid(), make.bare()
    with raises(DomainGone, errno.ESRCH):
        xen.set_target(nobody, holder)


@case
def set_target_to_nobody_is_domain_gone(xen: Hypervisor, make: ContractHost) -> None:
    nobody, guest = make.unused_domid(), make.bare()
    with raises(DomainGone, errno.ESRCH):
        xen.set_target(guest, nobody)


@case
def populate_of_nobody_fails(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact(), raises(XshmError):
        xen.populate(make.unused_domid(), HOLDER_GFN, 2)


@case
def map_pages_of_nobody_fails(xen: Hypervisor, make: ContractHost) -> None:
    with raises(HypercallFailed):
        xen.map_pages(make.unused_domid(), HOLDER_GFN, 1, writable=False)


# -- a domain's own pages --------------------------------------------------------------------------


@case
def populate_counts_exactly(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.domain()
    xen.set_max_pages(domid, 7)
    xen.populate(domid, HOLDER_GFN, 7)
    equal(make.tot_pages(domid), 7, "tot_pages")
    equal(make.info(domid).max_pages, 7, "max_pages")


@case
def populate_one_too_many_does_nothing(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.domain()
    xen.set_max_pages(domid, 7)
    with raises(OutOfMemory):
        xen.populate(domid, HOLDER_GFN, 8)
    equal(make.tot_pages(domid), 0, "tot_pages")
    equal(xen.populated_frames(domid, [Gfn(HOLDER_GFN + i) for i in range(8)]), (), "frames")


@case
def populate_with_max_pages_0_does_nothing(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.domain()
    with raises(OutOfMemory):
        xen.populate(domid, HOLDER_GFN, 1)
    equal(make.tot_pages(domid), 0, "tot_pages")


@case
def max_pages_may_be_set_below_what_is_there(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(4)
    equal(make.info(domid).max_pages, 0, "max_pages")
    equal(make.tot_pages(domid), 4, "tot_pages")
    with raises(OutOfMemory):
        xen.populate(domid, Gfn(HOLDER_GFN + 100), 1)
    equal(make.tot_pages(domid), 4, "tot_pages after the refusal")


@case
def populate_superpages_and_frames(xen: Hypervisor, make: ContractHost) -> None:
    domid, nr = make.domain(), 2 * SUPERPAGE_FRAMES + 3
    first = Gfn(HOLDER_GFN + SUPERPAGE_FRAMES - 1)
    xen.set_max_pages(domid, nr)
    xen.populate(domid, first, nr)
    equal(make.tot_pages(domid), nr, "tot_pages")
    ends = [Gfn(first - 1), first, Gfn(first + nr - 1), Gfn(first + nr)]
    equal(xen.populated_frames(domid, ends), (first, Gfn(first + nr - 1)), "ends")


@case
def populate_takes_from_free_memory_exactly(xen: Hypervisor, make: ContractHost) -> None:
    domid, nr = make.domain(), SUPERPAGE_FRAMES + 1
    before = make.free_pages()
    xen.set_max_pages(domid, nr)
    xen.populate(domid, HOLDER_GFN, nr)
    equal(before - make.free_pages(), nr, "free pages taken")


@case
def populate_more_than_the_host_has_gives_it_all_back(xen: Hypervisor, make: ContractHost) -> None:
    domid, left = make.domain(), 3 * SUPERPAGE_FRAMES + 7
    hog = make.domain()  # a pool is the quickest way to take all but a little
    xen.set_paging_pool_bytes(hog, bytes_of(make.free_pages() - left))
    before = make.free_pages()
    xen.set_max_pages(domid, 2 * before)
    with raises(OutOfMemory):
        xen.populate(domid, HOLDER_GFN, before + SUPERPAGE_FRAMES)
    equal(make.tot_pages(domid), 0, "tot_pages")
    equal(make.free_pages(), before, "free pages")


@case
def populate_without_a_pool_fails_and_destroy_gives_all_back(
    xen: Hypervisor, make: ContractHost
) -> None:
    with make.page_exact():
        domid = make.bare()
        make.starve(domid)
        xen.set_max_pages(domid, 2)
        with raises(OutOfMemory):
            xen.populate(domid, Gfn(HOLDER_GFN + 1), 2)
        make.destroy(domid)
        make.gone(domid)


@case
def depopulate_frees_exactly(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(6)
    before = make.free_pages()
    equal(xen.depopulate(domid, Gfn(HOLDER_GFN + 1), 3), 3, "freed")
    equal(make.tot_pages(domid), 3, "tot_pages")
    equal(make.free_pages() - before, 3, "free pages")
    left = xen.populated_frames(domid, [Gfn(HOLDER_GFN + i) for i in range(6)])
    equal(left, (HOLDER_GFN, Gfn(HOLDER_GFN + 4), Gfn(HOLDER_GFN + 5)), "left")


@case
def depopulate_steps_over_holes(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(6)
    xen.depopulate(domid, Gfn(HOLDER_GFN + 2), 1)
    xen.depopulate(domid, Gfn(HOLDER_GFN + 4), 1)
    equal(xen.depopulate(domid, Gfn(HOLDER_GFN - 2), 10), 4, "freed")
    equal(make.tot_pages(domid), 0, "tot_pages")


@case
def depopulate_of_nothing_is_nothing(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.domain()
    equal(xen.depopulate(domid, HOLDER_GFN, 3), 0, "freed")


@case
def depopulate_inside_a_superpage(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(2 * SUPERPAGE_FRAMES)
    middle = Gfn(HOLDER_GFN + SUPERPAGE_FRAMES - 1)
    equal(xen.depopulate(domid, middle, 2), 2, "freed")
    equal(make.tot_pages(domid), 2 * SUPERPAGE_FRAMES - 2, "tot_pages")
    equal(xen.populated_frames(domid, [middle, Gfn(middle + 1)]), (), "frames")


@case
def a_frame_can_be_populated_again(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(2)
    xen.depopulate(domid, HOLDER_GFN, 2)
    xen.set_max_pages(domid, 2)
    xen.populate(domid, HOLDER_GFN, 2)
    equal(make.tot_pages(domid), 2, "tot_pages")


@case
def a_page_that_dom0_maps_is_freed_when_it_lets_go(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(2)
    mapping = xen.map_pages(domid, HOLDER_GFN, 1, writable=False)
    xen.depopulate(domid, HOLDER_GFN, 2)
    equal(make.tot_pages(domid), 1, "tot_pages while mapped")
    mapping.close()
    make.wait(lambda: make.tot_pages(domid) == 0, "the page to be freed")


# -- contents --------------------------------------------------------------------------------------


@case
def zero_really_zeroes(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.domain()
    xen.set_max_pages(domid, 3)
    xen.populate(domid, HOLDER_GFN, 3)
    for index in range(3):
        make.write(domid, HOLDER_GFN + index, b"\xee" * PAGE_SIZE)
    xen.zero(domid, HOLDER_GFN, 3)
    for index in range(3):
        equal(make.read(domid, HOLDER_GFN + index, PAGE_SIZE), bytes(PAGE_SIZE), "contents")


@case
def zero_touches_nothing_else(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(3)
    for index in range(3):
        make.write(domid, HOLDER_GFN + index, b"keep")
    xen.zero(domid, Gfn(HOLDER_GFN + 1), 1)
    found = [make.read(domid, HOLDER_GFN + index, 4) for index in range(3)]
    equal(found, [b"keep", bytes(4), b"keep"], "contents")


@case
def zero_of_many_windows(xen: Hypervisor, make: ContractHost) -> None:
    nr = 8200
    domid = make.holder(nr)
    for index in (0, 4095, 4096, 8191, 8192, nr - 1):
        make.write(domid, HOLDER_GFN + index, b"x")
    xen.zero(domid, HOLDER_GFN, nr)
    for index in (0, 4095, 4096, 8191, 8192, nr - 1):
        equal(make.read(domid, HOLDER_GFN + index, 1), b"\0", f"frame {index}")


@case
def zero_of_a_hole_fails(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(2)
    with raises(HypercallFailed):
        xen.zero(domid, HOLDER_GFN, 3)


@case
def what_is_written_is_read_across_pages(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(2)
    mapping = xen.map_pages(domid, HOLDER_GFN, 2, writable=True)
    mapping.write(PAGE_SIZE - 3, b"abcdef")
    equal(mapping.read(PAGE_SIZE - 3, 6), b"abcdef", "through the mapping")
    mapping.close()
    equal(make.read(domid, HOLDER_GFN + 1, 3), b"def", "second page")


@case
def two_mappings_are_the_same_memory(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(1)
    one = xen.map_pages(domid, HOLDER_GFN, 1, writable=True)
    other = xen.map_pages(domid, HOLDER_GFN, 1, writable=False)
    one.write(8, b"seen")
    equal(other.read(8, 4), b"seen", "contents")
    one.close()
    equal(other.read(8, 4), b"seen", "contents after the other was closed")
    other.close()
    other.close()


@case
def a_mapping_has_bounds(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(1)
    mapping = xen.map_pages(domid, HOLDER_GFN, 1, writable=True)
    for offset, count in ((PAGE_SIZE, 1), (-1, 1), (PAGE_SIZE - 1, 2)):
        try:
            mapping.read(offset, count)
        except ValueError:
            continue
        expect(False, f"{count} bytes at {offset} were read")
    mapping.close()
    try:
        mapping.read(0, 1)
    except ValueError:
        return
    expect(False, "a closed mapping was read")


@case
def map_pages_over_a_hole_fails(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(4)
    xen.depopulate(domid, Gfn(HOLDER_GFN + 2), 1)
    with raises(HypercallFailed, errno.EINVAL):
        xen.map_pages(domid, HOLDER_GFN, 4, writable=False)
    # and what was mapped of it is let go
    xen.depopulate(domid, HOLDER_GFN, 4)
    make.wait(lambda: make.tot_pages(domid) == 0, "the pages to be freed")


@case
def populated_frames_tells_which(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(3)
    xen.depopulate(domid, Gfn(HOLDER_GFN + 1), 1)
    asked = [Gfn(HOLDER_GFN + i) for i in (2, 1, 0, 3)]
    equal(xen.populated_frames(domid, asked), (asked[0], asked[2]), "present")


@case
def populated_frames_of_an_empty_domain(xen: Hypervisor, make: ContractHost) -> None:
    equal(xen.populated_frames(make.bare(), [HOLDER_GFN, Gfn(0)]), (), "present")


# -- pauses ----------------------------------------------------------------------------------------


@case
def pauses_nest(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.bare()
    xen.pause(domid)
    xen.unpause(domid)
    expect(make.info(domid).paused, "still paused by its creation")


@case
def there_are_255_pauses_and_no_more(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.bare()
    for _ in range(254):
        xen.pause(domid)
    with raises(HypercallFailed, errno.EOVERFLOW):
        xen.pause(domid)
    for _ in range(254):
        xen.unpause(domid)
    expect(make.info(domid).paused, "still paused by its creation")


@case
def dom0_cannot_pause_or_destroy_itself(xen: Hypervisor, make: ContractHost) -> None:
    with raises(HypercallFailed, errno.EINVAL):
        xen.pause(DomId(0))
    with raises(HypercallFailed, errno.EINVAL):
        xen.destroy(DomId(0))


@case
def a_domain_that_has_shut_down_may_be_unpaused(xen: Hypervisor, make: ContractHost) -> None:
    # It has no vCPU that is up, so this runs nothing; the count is what is looked at.
    domid = make.bare()
    xen.shut_down(domid, SHUTDOWN_POWEROFF)
    xen.unpause(domid)
    expect(not make.info(domid).paused, "not paused")
    with raises(HypercallFailed, errno.EINVAL):
        xen.unpause(domid)
    xen.pause(domid)
    expect(make.info(domid).paused, "paused")


@case
def the_first_shutdown_reason_counts(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.bare()
    xen.shut_down(domid, SHUTDOWN_REBOOT)
    info = make.info(domid)
    expect(info.shut_down and not info.dying, "shut down and alive")
    equal(info.shutdown_reason, SHUTDOWN_REBOOT, "reason")
    xen.shut_down(domid, SHUTDOWN_CRASH)
    equal(make.info(domid).shutdown_reason, SHUTDOWN_REBOOT, "reason afterwards")


@case
def shutting_down_keeps_the_pages(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(4)
    xen.shut_down(holder, SHUTDOWN_POWEROFF)
    xen.shut_down(guest, SHUTDOWN_POWEROFF)
    equal(make.tot_pages(holder), 4, "tot_pages")
    equal(xen.unmap(guest, GUEST_GFN, 4), 4, "still mapped")


# -- the paging pool -------------------------------------------------------------------------------


@case
def the_pool_is_what_was_set(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.bare()
    for nr_frames in (300, 301, 64):
        xen.set_paging_pool_bytes(domid, bytes_of(nr_frames))
        equal(xen.paging_pool_bytes(domid), bytes_of(nr_frames), "pool")


@case
def the_first_pool_is_the_architectures(xen: Hypervisor, make: ContractHost) -> None:
    first = xen.paging_pool_bytes(make.bare())
    if make.arch is Arch.X86_64:
        equal(first, bytes_of(256), "pool")
    elif make.version >= (4, 18):
        equal(first, 0, "pool")


@case
def the_pool_comes_from_free_memory(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.domain(100)
    before = make.free_pages()
    xen.set_paging_pool_bytes(domid, bytes_of(150))
    equal(before - make.free_pages(), 50, "taken")
    xen.set_paging_pool_bytes(domid, bytes_of(100))
    equal(make.free_pages(), before, "given back")


@case
def the_pool_is_whole_frames(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.domain(100)
    with raises(HypercallFailed, errno.EINVAL):
        xen.set_paging_pool_bytes(domid, bytes_of(100) + 1)
    equal(xen.paging_pool_bytes(domid), bytes_of(100), "pool")


@case
def a_pool_larger_than_the_host_is_refused(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.domain(100)
    with raises(HypercallFailed, errno.ENOMEM):
        xen.set_paging_pool_bytes(domid, bytes_of(make.free_pages() + 20000))
    xen.set_paging_pool_bytes(domid, bytes_of(100))


@case
def a_pool_cannot_be_less_than_what_is_in_use(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.holder(2)
    with raises(HypercallFailed, errno.ENOMEM):
        xen.set_paging_pool_bytes(domid, 0)
    expect(0 < xen.paging_pool_bytes(domid) < bytes_of(64), "what is in use stays")
    equal(xen.populated_frames(domid, [HOLDER_GFN]), (HOLDER_GFN,), "and so do the frames")


@case
def mapping_without_a_pool_fails_and_undoes(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.holder(2), make.bare()
    xen.set_target(guest, holder)
    make.starve(guest)
    with raises(PartialMap, POOL_EXHAUSTED):
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 2)
    equal(xen.unmap(guest, GUEST_GFN, 2), 0, "mapped")


@case
def a_pool_that_ends_in_the_middle_undoes_all(xen: Hypervisor, make: ContractHost) -> None:
    nr = 24 * SUPERPAGE_FRAMES
    holder, guest = make.holder(nr), make.bare()
    xen.set_target(guest, holder)
    make.starve(guest)
    xen.set_paging_pool_bytes(guest, xen.paging_pool_bytes(guest) + bytes_of(10))
    with raises(PartialMap, POOL_EXHAUSTED) as caught:
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, nr)
    assert caught.error is not None
    first_bad = caught.error.facts["first_gfn"]
    assert isinstance(first_bad, int)
    expect(GUEST_GFN < first_bad < GUEST_GFN + nr, f"first bad frame {first_bad:#x}")
    equal(first_bad % SUPERPAGE_FRAMES, 0, "it fails where a table is needed")
    equal(xen.unmap(guest, GUEST_GFN, nr), 0, "mapped")
    xen.set_paging_pool_bytes(guest, bytes_of(64))
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, nr)
    equal(xen.unmap(guest, GUEST_GFN, nr), nr, "mapped with a larger pool")


# -- the target ------------------------------------------------------------------------------------


@case
def mapping_without_a_target_is_eperm(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.holder(2), make.domain()
    with raises(PartialMap, errno.EPERM):
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 2)
    equal(xen.unmap(guest, GUEST_GFN, 2), 0, "mapped")


@case
def mapping_with_another_target_is_eperm(xen: Hypervisor, make: ContractHost) -> None:
    holder, other, guest = make.holder(2), make.holder(2), make.domain()
    xen.set_target(guest, other)
    with raises(PartialMap, errno.EPERM):
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 2)


@case
def the_target_is_not_mutual(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(2)
    xen.set_max_pages(guest, 1)
    xen.populate(guest, Gfn(16), 1)
    with raises(PartialMap, errno.EPERM):
        xen.map_foreign(holder, Gfn(HOLDER_GFN + 64), guest, Gfn(16), 1)


@case
def the_target_is_set_once(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair()
    with raises(HypercallFailed, errno.EINVAL):
        xen.set_target(guest, holder)
    with raises(HypercallFailed, errno.EINVAL):
        xen.set_target(guest, make.bare())
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 4)


@case
def nobody_is_his_own_target(xen: Hypervisor, make: ContractHost) -> None:
    domid = make.bare()
    with raises(HypercallFailed, errno.EINVAL):
        xen.set_target(domid, domid)


@case
def many_guests_have_one_target(xen: Hypervisor, make: ContractHost) -> None:
    holder = make.holder(1)
    guests = [make.domain(64) for _ in range(4)]
    for guest in guests:
        xen.set_target(guest, holder)
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 1)
    equal(make.tot_pages(holder), 1, "tot_pages")
    equal([xen.unmap(guest, GUEST_GFN, 1) for guest in guests], [1] * 4, "mapped")


@case
def a_targeted_holder_stays_until_its_guest_is_gone(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact():
        holder, guest = make.pair(2)
        make.destroy(holder)
        info = make.info(holder)
        expect(info.dying, "dying")
        equal(info.tot_pages, 0, "tot_pages")
        make.destroy(guest)
        make.gone(guest)
        make.gone(holder)


# -- mapping ---------------------------------------------------------------------------------------


@case
def mapping_and_unmapping_counts(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(5)
    equal(make.tot_pages(guest), 0, "the guest owns none of them")
    equal(make.tot_pages(holder), 5, "the holder owns all")
    equal(xen.unmap(guest, Gfn(GUEST_GFN - 1), 7), 5, "removed")
    equal(xen.unmap(guest, Gfn(GUEST_GFN - 1), 7), 0, "removed again")


@case
def unmapping_what_is_absent_is_nothing(xen: Hypervisor, make: ContractHost) -> None:
    equal(xen.unmap(make.domain(), GUEST_GFN, 1000), 0, "removed")


@case
def unmapping_with_holes(xen: Hypervisor, make: ContractHost) -> None:
    _, guest = make.mapped(8)
    equal(xen.unmap(guest, Gfn(GUEST_GFN + 3), 2), 2, "removed in the middle")
    equal(xen.unmap(guest, GUEST_GFN, 8), 6, "removed around it")


@case
def a_mapping_of_a_hole_is_einval_and_undone(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(9)
    xen.depopulate(holder, Gfn(HOLDER_GFN + 4), 1)
    with raises(PartialMap, errno.EINVAL) as caught:
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 9)
    assert caught.error is not None
    equal(caught.error.facts["first_gfn"], GUEST_GFN + 4, "first bad frame")
    equal(xen.unmap(guest, GUEST_GFN, 9), 0, "mapped")
    xen.depopulate(holder, HOLDER_GFN, 9)
    equal(make.tot_pages(holder), 0, "no reference is left")


@case
def a_failed_mapping_leaves_its_neighbours(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(4)
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 1)
    xen.map_foreign(guest, Gfn(GUEST_GFN + 5), holder, HOLDER_GFN, 1)
    with raises(PartialMap):
        xen.map_foreign(guest, Gfn(GUEST_GFN + 1), holder, Gfn(HOLDER_GFN + 1), 4)
    equal(xen.unmap(guest, GUEST_GFN, 6), 2, "left")


@case
def a_mapping_whose_first_or_last_entry_is_bad(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(4)
    for start, bad in ((HOLDER_GFN - 1, GUEST_GFN), (HOLDER_GFN + 1, GUEST_GFN + 3)):
        with raises(PartialMap, errno.EINVAL) as caught:
            xen.map_foreign(guest, GUEST_GFN, holder, Gfn(start), 4)
        assert caught.error is not None
        equal(caught.error.facts["first_gfn"], bad, "first bad frame")
        equal(xen.unmap(guest, GUEST_GFN, 4), 0, "mapped")


@case
def a_failure_past_the_first_batch_undoes_every_batch(xen: Hypervisor, make: ContractHost) -> None:
    nr = 16384 + 600
    holder, guest = make.pair(nr)
    xen.depopulate(holder, Gfn(HOLDER_GFN + nr - 10), 1)
    with raises(PartialMap, errno.EINVAL) as caught:
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, nr)
    assert caught.error is not None
    equal(caught.error.facts["first_gfn"], GUEST_GFN + nr - 10, "first bad frame")
    equal(xen.unmap(guest, GUEST_GFN, nr), 0, "mapped")


@case
def more_frames_than_a_16_bit_count(xen: Hypervisor, make: ContractHost) -> None:
    nr = 65536 + 3
    holder, guest = make.pair(nr)
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, nr)
    equal(xen.unmap(guest, GUEST_GFN, nr), nr, "removed")
    equal(make.tot_pages(holder), nr, "tot_pages")


@case
def mapping_no_frames_is_nothing(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(1)
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 0)
    equal(xen.unmap(guest, GUEST_GFN, 1), 0, "mapped")


@case
def mapping_of_oneself_is_einval(xen: Hypervisor, make: ContractHost) -> None:
    holder = make.holder(1)
    with raises(PartialMap, errno.EINVAL):
        xen.map_foreign(holder, GUEST_GFN, holder, HOLDER_GFN, 1)


@case
def mapping_of_dom0_is_eperm(xen: Hypervisor, make: ContractHost) -> None:
    with raises(PartialMap, errno.EPERM):
        xen.map_foreign(make.domain(), GUEST_GFN, DomId(0), HOLDER_GFN, 1)


@case
def mapping_from_nobody_fails(xen: Hypervisor, make: ContractHost) -> None:
    nobody, guest = make.unused_domid(), make.domain()
    with raises(PartialMap, errno.ESRCH):  # the guest is there: not DomainGone
        xen.map_foreign(guest, GUEST_GFN, nobody, HOLDER_GFN, 1)
    equal(xen.unmap(guest, GUEST_GFN, 1), 0, "mapped")


@case
def the_same_page_at_two_frames(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(1)
    for offset in (0, 1, 700):
        xen.map_foreign(guest, Gfn(GUEST_GFN + offset), holder, HOLDER_GFN, 1)
    xen.depopulate(holder, HOLDER_GFN, 1)
    equal(make.tot_pages(holder), 1, "tot_pages while mapped")
    equal(xen.unmap(guest, GUEST_GFN, 701), 3, "removed")
    equal(make.tot_pages(holder), 0, "tot_pages afterwards")


@case
def a_foreign_page_cannot_be_mapped_on(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(1)
    third = make.domain()
    xen.set_target(third, guest)
    with raises(PartialMap, errno.EINVAL):
        xen.map_foreign(third, GUEST_GFN, guest, GUEST_GFN, 1)
    expect(make.info(holder).tot_pages == 1, "tot_pages")


@case
def another_page_over_a_foreign_one(xen: Hypervisor, make: ContractHost) -> None:
    """x86 refuses (ENXIO) and leaves it; Arm replaces, and drops the old page's reference."""
    holder, guest = make.pair(2)
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 1)
    if make.arch is Arch.X86_64:
        with raises(PartialMap, errno.ENXIO):
            xen.map_foreign(guest, GUEST_GFN, holder, Gfn(HOLDER_GFN + 1), 1)
        still_mapped = HOLDER_GFN
    else:
        xen.map_foreign(guest, GUEST_GFN, holder, Gfn(HOLDER_GFN + 1), 1)
        still_mapped = Gfn(HOLDER_GFN + 1)
    xen.depopulate(holder, HOLDER_GFN, 2)
    equal(make.tot_pages(holder), 1, "one of the two is still referred to")
    equal(xen.populated_frames(holder, [still_mapped]), (), "though the holder has it no more")
    equal(xen.unmap(guest, GUEST_GFN, 1), 1, "removed")
    equal(make.tot_pages(holder), 0, "tot_pages")


@case
def remove_then_add_is_safe_everywhere(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(3)
    for _ in range(3):
        equal(xen.unmap(guest, GUEST_GFN, 3), 3, "removed")
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 3)
    xen.unmap(guest, GUEST_GFN, 3)
    xen.depopulate(holder, HOLDER_GFN, 3)
    equal(make.tot_pages(holder), 0, "no reference is left")


@case
def mapping_over_a_guests_ram(xen: Hypervisor, make: ContractHost) -> None:
    """x86 frees the page; Arm keeps it for the guest's life, out of reach."""
    holder, guest = make.pair(1)
    xen.set_max_pages(guest, 2)
    xen.populate(guest, GUEST_GFN, 2)
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 1)
    equal(make.tot_pages(guest), 1 if make.arch is Arch.X86_64 else 2, "the guest's tot_pages")
    equal(xen.unmap(guest, GUEST_GFN, 1), 1, "removed")


@case
def unmapping_ram_does_not_free_it(xen: Hypervisor, make: ContractHost) -> None:
    holder = make.holder(3)
    equal(xen.unmap(holder, HOLDER_GFN, 2), 2, "removed")
    equal(make.tot_pages(holder), 3, "tot_pages")
    left = xen.populated_frames(holder, [Gfn(HOLDER_GFN + i) for i in range(3)])
    equal(left, (Gfn(HOLDER_GFN + 2),), "left")


@case
def dom0_sees_a_guests_foreign_frames_on_x86_only(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(2)
    make.write(holder, HOLDER_GFN + 1, b"shared")
    asked = [GUEST_GFN, Gfn(GUEST_GFN + 1), Gfn(GUEST_GFN + 2)]
    if make.arch is Arch.X86_64:
        equal(xen.populated_frames(guest, asked), (asked[0], asked[1]), "present")
        equal(make.read(guest, GUEST_GFN + 1, 6), b"shared", "through the guest's frame")
        make.write(guest, GUEST_GFN, b"back")
        equal(make.read(holder, HOLDER_GFN, 4), b"back", "through the holder's frame")
    else:
        equal(xen.populated_frames(guest, asked), (), "present")
        with raises(HypercallFailed, errno.EINVAL):
            make.read(guest, GUEST_GFN, 1)


@case
def zero_before_the_map_is_what_the_guest_sees(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.pair(1)
    make.write(holder, HOLDER_GFN, b"old" * 100)
    xen.zero(holder, HOLDER_GFN, 1)
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 1)
    at = guest if make.arch is Arch.X86_64 else holder
    gfn = GUEST_GFN if make.arch is Arch.X86_64 else HOLDER_GFN
    equal(make.read(at, gfn, PAGE_SIZE), bytes(PAGE_SIZE), "contents")


# -- the seal --------------------------------------------------------------------------------------


@case
def a_sealed_holder_can_be_mapped_by_nobody(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(2)
    late = make.domain()
    xen.set_target(late, holder)
    equal(xen.depopulate(holder, HOLDER_GFN, 2), 2, "taken out of the holder")
    with raises(PartialMap, errno.EINVAL):
        xen.map_foreign(late, GUEST_GFN, holder, HOLDER_GFN, 2)
    equal(make.tot_pages(holder), 2, "the guest keeps them")
    equal(xen.unmap(guest, GUEST_GFN, 2), 2, "removed")
    equal(make.tot_pages(holder), 0, "tot_pages")


@case
def pages_kept_by_a_member_count_against_the_limit(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(2)
    xen.depopulate(holder, HOLDER_GFN, 2)
    xen.set_max_pages(holder, 2)
    with raises(OutOfMemory):
        xen.populate(holder, Gfn(HOLDER_GFN + 8), 2)
    xen.set_max_pages(holder, 4)
    xen.populate(holder, Gfn(HOLDER_GFN + 8), 2)
    equal(make.tot_pages(holder), 4, "tot_pages")
    xen.unmap(guest, GUEST_GFN, 2)
    equal(make.tot_pages(holder), 2, "tot_pages")


# -- ends ------------------------------------------------------------------------------------------


@case
def destroying_the_guest_first_drops_its_references(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact():
        holder, guest = make.mapped(4)
        make.destroy(guest)
        make.gone(guest)
        equal(make.tot_pages(holder), 4, "tot_pages")
        equal(xen.depopulate(holder, HOLDER_GFN, 4), 4, "freed")
        equal(make.tot_pages(holder), 0, "no reference is left")
        make.destroy(holder)
        make.gone(holder)


@case
def destroying_the_holder_first_keeps_it_as_a_zombie(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact():
        holder, guest = make.mapped(4)
        make.destroy(holder)
        info = make.info(holder)
        expect(info.dying, "dying")
        equal(info.tot_pages, 4, "its pages live on")
        equal(xen.unmap(guest, GUEST_GFN, 4), 4, "the guest still has them")
        equal(make.tot_pages(holder), 0, "freed with their last reference")
        make.destroy(guest)
        make.gone(holder)


@case
def destroying_both_in_any_order_gives_all_back(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact():
        for holder_first in (True, False):
            holder, guest = make.mapped(600)
            for domid in (holder, guest) if holder_first else (guest, holder):
                make.destroy(domid)
            make.gone(holder)
            make.gone(guest)


@case
def a_zombie_can_be_destroyed_again_without_harm(xen: Hypervisor, make: ContractHost) -> None:
    holder, _ = make.mapped(2)
    make.destroy(holder)
    xen.destroy(holder)
    equal(make.tot_pages(holder), 2, "tot_pages")


@case
def a_zombie_gives_nothing_more(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(2)
    make.destroy(holder)
    with raises(PartialMap):
        xen.map_foreign(guest, Gfn(GUEST_GFN + 16), holder, HOLDER_GFN, 1)
    equal(xen.populated_frames(holder, [HOLDER_GFN]), (), "frames")
    xen.set_max_pages(holder, 100)
    with raises(OutOfMemory):
        xen.populate(holder, Gfn(HOLDER_GFN + 64), 1)
    equal(xen.unmap(guest, GUEST_GFN, 17), 2, "removed")


@case
def a_mapping_of_dom0_keeps_the_domid(xen: Hypervisor, make: ContractHost) -> None:
    """The anchor: while dom0 has one of its pages, the domid is nobody else's."""
    uuid = make.fresh_uuid()
    domid = make.bare(uuid)
    xen.set_paging_pool_bytes(domid, bytes_of(64))
    xen.set_max_pages(domid, 1)
    xen.populate(domid, HOLDER_GFN, 1)
    anchor = xen.map_pages(domid, HOLDER_GFN, 1, writable=True)
    make.destroy(domid)
    info = make.info(domid)
    expect(info.dying and info.uuid == uuid, "a zombie of the same uuid")
    anchor.write(0, b"still there")
    equal(anchor.read(0, 11), b"still there", "contents")
    anchor.close()
    make.gone(domid)


@case
def destroying_the_target_of_a_zombie_guest(xen: Hypervisor, make: ContractHost) -> None:
    """A guest whose own page dom0 holds is a zombie, and keeps its target."""
    with make.page_exact():
        holder, guest = make.mapped(1)
        xen.set_max_pages(guest, 1)
        xen.populate(guest, Gfn(16), 1)
        anchor = xen.map_pages(guest, Gfn(16), 1, writable=False)
        make.destroy(guest)
        expect(make.info(guest).dying, "the guest is a zombie")
        equal(xen.depopulate(holder, HOLDER_GFN, 1), 1, "freed")
        equal(make.tot_pages(holder), 0, "its foreign references are gone all the same")
        make.destroy(holder)
        expect(make.info(holder).dying, "the holder is one too")
        anchor.close()
        make.gone(guest)
        make.gone(holder)


# -- the machine's own frames ----------------------------------------------------------------------

NOT_DOM0S = {Arch.X86_64: Mfn(0xFEE00), Arch.ARM64: Mfn(0x48000)}
"""The local APIC; RAM."""


@case
def host_ranges_are_in_order_and_some_may_be_shared(xen: Hypervisor, make: ContractHost) -> None:
    ranges = xen.host_ranges()
    expect(all(one.nr_frames > 0 and one.name for one in ranges), "empty or nameless ranges")
    firsts = [one.first_mfn for one in ranges]
    equal(firsts, sorted(firsts), "order")
    expect(any(one.refusal for one in ranges), "something that is refused")
    make.host_memory()


@case
def a_host_range_costs_the_guest_no_memory(xen: Hypervisor, make: ContractHost) -> None:
    guest, mfn = make.domain(), make.host_memory(16)
    with make.page_exact():
        xen.map_host_range(guest, GUEST_GFN, mfn, 16)
        equal(make.tot_pages(guest), 0, "tot_pages")
        xen.unmap_host_range(guest, GUEST_GFN, mfn, 16)


@case
def a_host_range_is_no_page_that_dom0_maps_or_removes(xen: Hypervisor, make: ContractHost) -> None:
    guest, mfn = make.domain(), make.host_memory(4)
    xen.map_host_range(guest, GUEST_GFN, mfn, 4)
    equal(xen.populated_frames(guest, [GUEST_GFN, Gfn(GUEST_GFN + 3)]), (), "frames dom0 can map")
    equal(xen.unmap(guest, GUEST_GFN, 4), 0, "frames removed as pages")


@case
def a_host_range_may_be_mapped_again(xen: Hypervisor, make: ContractHost) -> None:
    guest, mfn = make.domain(), make.host_memory(4)
    for _ in range(2):
        xen.map_host_range(guest, GUEST_GFN, mfn, 4)
    xen.unmap_host_range(guest, GUEST_GFN, mfn, 4)
    xen.map_host_range(guest, GUEST_GFN, mfn, 4)
    expect(not make.info(guest).shut_down, "the guest was crashed")


@case
def removing_a_host_range_frees_its_place(xen: Hypervisor, make: ContractHost) -> None:
    """x86 crashes a guest for a page put over one: that it lives proves that they were gone."""
    holder, guest = make.pair(4)
    mfn = make.host_memory(2 * SUPERPAGE_FRAMES)
    first = Gfn(GUEST_GFN - 3)
    xen.map_host_range(guest, first, mfn, SUPERPAGE_FRAMES + 7)
    xen.unmap_host_range(guest, first, mfn, SUPERPAGE_FRAMES + 7)
    xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 4)
    make.write(holder, HOLDER_GFN, b"under it")
    equal(xen.unmap(guest, GUEST_GFN, 4), 4, "pages there now")
    expect(not make.info(guest).shut_down, "the guest was crashed")


@case
def removing_half_of_what_is_there(xen: Hypervisor, make: ContractHost) -> None:
    """What is not there any more does not keep the rest from being removed."""
    holder, guest = make.pair(4)
    mfn = make.host_memory(8)
    xen.map_host_range(guest, GUEST_GFN, mfn, 8)
    for index in (0, 3):
        xen.unmap_host_range(guest, Gfn(GUEST_GFN + index), Mfn(mfn + index), 1)
    for _ in range(2):
        xen.unmap_host_range(guest, GUEST_GFN, mfn, 8)
    xen.map_foreign(guest, Gfn(GUEST_GFN + 1), holder, HOLDER_GFN, 4)
    expect(not make.info(guest).shut_down, "the guest was crashed")


@case
def superpages_of_host_memory(xen: Hypervisor, make: ContractHost) -> None:
    """They are removed piece by piece and as a whole."""
    holder, guest = make.pair(4)
    mfn = make.host_memory(2 * SUPERPAGE_FRAMES)
    for piece in (1, 2 * SUPERPAGE_FRAMES):
        xen.map_host_range(guest, GUEST_GFN, mfn, 2 * SUPERPAGE_FRAMES)
        xen.unmap_host_range(guest, GUEST_GFN, mfn, piece)
        xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, 1)
        xen.unmap(guest, GUEST_GFN, 1)
        xen.unmap_host_range(guest, GUEST_GFN, mfn, 2 * SUPERPAGE_FRAMES)
    expect(not make.info(guest).shut_down, "the guest was crashed")


@case
def a_host_range_beside_pages_of_a_holder(xen: Hypervisor, make: ContractHost) -> None:
    holder, guest = make.mapped(4)
    xen.map_host_range(guest, Gfn(GUEST_GFN + 4), make.host_memory(4), 4)
    equal(xen.unmap(guest, GUEST_GFN, 8), 4, "pages removed")
    equal(make.tot_pages(holder), 4, "the holder's pages")


@case
def two_guests_may_have_one_host_range(xen: Hypervisor, make: ContractHost) -> None:
    one, other, mfn = make.domain(), make.domain(), make.host_memory(4)
    xen.map_host_range(one, GUEST_GFN, mfn, 4)
    xen.map_host_range(other, Gfn(GUEST_GFN + 9), mfn, 4)
    xen.unmap_host_range(one, GUEST_GFN, mfn, 4)
    xen.unmap_host_range(other, Gfn(GUEST_GFN + 9), mfn, 4)


@case
def what_dom0_may_not_have_it_cannot_give_away(xen: Hypervisor, make: ContractHost) -> None:
    guest = make.domain()
    for mfn in (NOT_DOM0S[make.arch], Mfn((1 << 40) - 1)):
        with make.page_exact(), raises(HypercallFailed, errno.EPERM):
            xen.map_host_range(guest, GUEST_GFN, mfn, 1)


@case
def a_host_range_without_a_pool_is_not_mapped(xen: Hypervisor, make: ContractHost) -> None:
    guest, mfn = make.bare(), make.host_memory(4)
    make.starve(guest)
    with make.page_exact(), raises(HypercallFailed, HOST_POOL_EXHAUSTED):
        xen.map_host_range(guest, GUEST_GFN, mfn, 4)
    xen.set_paging_pool_bytes(guest, bytes_of(512))
    xen.map_host_range(guest, GUEST_GFN, mfn, 4)


@case
def destroying_a_guest_with_a_host_range_is_page_exact(xen: Hypervisor, make: ContractHost) -> None:
    with make.page_exact():
        guest = make.domain()
        xen.map_host_range(guest, GUEST_GFN, make.host_memory(600), 600)
        make.destroy(guest)
        make.gone(guest)


# -- what an x86 guest is told of its memory -------------------------------------------------------


@case
def a_vcpu_that_is_not_to_run_has_no_entry_register(xen: Hypervisor, make: ContractHost) -> None:
    equal(xen.entry_register(make.bare()), None, "rbx of a vCPU that is down")


@case
def only_x86_has_memory_maps(xen: Hypervisor, make: ContractHost) -> None:
    guest, ranges = make.bare(), [MemoryRange(0, 1 << 20, MemoryKind.RAM)]
    if make.arch is Arch.ARM64:
        with raises(HypercallFailed, errno.ENOSYS):
            xen.set_memory_map(guest, ranges)
        return
    xen.set_memory_map(guest, ranges)
    xen.set_memory_map(guest, ranges * 128)
    with raises(HypercallFailed, errno.EINVAL):
        xen.set_memory_map(guest, ranges * 129)
    with raises(DomainGone, errno.ESRCH):
        xen.set_memory_map(make.unused_domid(), ranges)
