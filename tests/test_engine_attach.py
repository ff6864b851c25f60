# SPDX-License-Identifier: LGPL-2.1-or-later
"""The last checks before what cannot be undone: each alone, since others would hide its loss."""

from __future__ import annotations

import dataclasses
import errno

import pytest
import trio
from fakes.hypervisor import SimulatedXen
from fakes.machine import PLAIN_BAR
from fakes.toolstack import XlFailed
from fakes.world import world
from trio.testing import MockClock

from xshmd.engine.attach import Mapping, attach, check, detach, mappings
from xshmd.engine.holders import ANCHOR_GFN
from xshmd.errors import Conflict, DomainGone, HypercallFailed, OutOfMemory, PartialMap, Refused
from xshmd.machine import Arch
from xshmd.model import Backing, Guest, GuestState, Holder, Region, RegionRequest, RegionTerms, Role
from xshmd.policy.identity import new_holder_uuid
from xshmd.units import DomId, Gfn, Mfn, bytes_of

UUID = "11111111-2222-4333-8444-555555555555"
FIRST = Gfn(0x40200)
AT = Gfn(0x1000000)
REQUEST = RegionRequest(region_id="r", first_gfn=AT, nr_frames=4, role=Role.OWNER)


@dataclasses.dataclass
class Host:
    """A holder with four frames for a region, and a guest without."""

    xen: SimulatedXen
    holder: Holder
    guest: Guest
    region: Region

    def wanted(self) -> tuple[Mapping, ...]:
        return mappings(self.guest, {"r": self.region})

    def attach(self, *, again: bool = False) -> None:
        attach(self.xen, self.guest, self.holder, self.wanted(), again=again)

    def untouched(self) -> None:
        assert self.xen.by_domid[self.guest.domid].target is None
        assert self.xen.foreign_frames(self.guest.domid) == {}


@pytest.fixture(params=list(Arch), ids=str)
def host(request: pytest.FixtureRequest) -> Host:
    xen = SimulatedXen(request.param, total_pages=1 << 16, dom0_pages=1 << 12, gpaddr_bits=44)
    uuid = new_holder_uuid()
    holder = Holder(uuid=uuid, domid=xen.create_holder_domain(uuid), next_gfn=FIRST)
    xen.set_paging_pool_bytes(holder.domid, bytes_of(64))
    xen.set_max_pages(holder.domid, 4)
    xen.populate(holder.domid, FIRST, 4)
    xen.set_max_pages(holder.domid, 0)
    domain = xen.make_domain(UUID)
    guest = Guest(
        domid=domain.domid, uuid=UUID, name="a", generation="g", state=GuestState.ATTACHING,
        holder_uuid=uuid, requests=(REQUEST,),
    )  # fmt: skip
    region = Region(
        region_id="r", nr_frames=4, holder_uuid=uuid, holder_first_gfn=FIRST, owner="a", ready=True
    )
    return Host(xen, holder, guest, region)


def test_it_maps_all_of_it(host: Host) -> None:
    check(host.xen, host.guest, host.wanted())
    host.attach()
    assert set(host.xen.foreign_frames(host.guest.domid)) == set(range(AT, AT + 4))
    host.xen.check()


def test_no_memory_for_its_tables(host: Host) -> None:
    """What the host has not is said, and what it has is not taken: Xen stops in the middle."""
    pool_bytes = host.xen.paging_pool_bytes(host.guest.domid)
    other = host.xen.make_domain(new_holder_uuid()).domid
    before = host.xen.paging_pool_bytes(other)
    host.xen.set_paging_pool_bytes(other, before + bytes_of(host.xen.free_pages - 3))
    with pytest.raises(OutOfMemory, match=r"needs .* for its page tables and the host has 12 KiB"):
        host.attach()
    assert host.xen.paging_pool_bytes(host.guest.domid) == pool_bytes
    assert host.xen.free_pages == 3
    host.untouched()
    host.xen.set_paging_pool_bytes(other, before)
    host.attach()


def test_again_removes_first(host: Host) -> None:
    """Twice the same page at one frame is an error on x86 and a leak on Arm."""
    host.attach()
    host.attach(again=True)
    assert len(host.xen.foreign_frames(host.guest.domid)) == 4
    assert host.xen.leaked_references == 0
    host.xen.check()


@pytest.mark.parametrize("done", [0, 1, 3])
def test_again_after_half_of_it(host: Host, done: int) -> None:
    host.xen.set_paging_pool_bytes(host.guest.domid, bytes_of(64))
    host.xen.set_target(host.guest.domid, host.holder.domid)
    host.xen.map_foreign(host.guest.domid, AT, host.holder.domid, FIRST, done)
    host.attach(again=True)
    assert len(host.xen.foreign_frames(host.guest.domid)) == 4
    assert host.xen.leaked_references == 0


def test_a_target_that_is_set_already_is_an_error_the_first_time(host: Host) -> None:
    stranger = host.xen.make_domain(UUID)
    host.xen.set_target(host.guest.domid, stranger.domid)
    with pytest.raises(HypercallFailed) as caught:
        host.attach()
    assert (caught.value.call, caught.value.errno) == ("xc_domain_set_target", errno.EINVAL)
    with pytest.raises(PartialMap):
        host.attach(again=True)
    assert host.xen.foreign_frames(host.guest.domid) == {}


def test_a_guest_that_runs_is_not_touched(host: Host) -> None:
    host.xen.unpause(host.guest.domid)
    with pytest.raises(Conflict, match="unpaused"):
        host.attach()
    with pytest.raises(Conflict, match="unpaused"):
        check(host.xen, host.guest, host.wanted())
    host.untouched()


def test_another_domain_of_the_guests_number_is_not_touched(host: Host) -> None:
    host.xen.destroy(host.guest.domid)
    host.xen.next_domid = host.guest.domid
    other = host.xen.make_domain("99999999-2222-4333-8444-555555555555")
    assert other.domid == host.guest.domid
    with pytest.raises(DomainGone):
        host.attach()
    with pytest.raises(DomainGone):
        check(host.xen, host.guest, host.wanted())
    host.untouched()


def test_a_guest_that_is_dying_is_gone(host: Host) -> None:
    host.xen.set_max_pages(host.guest.domid, 1)
    host.xen.set_paging_pool_bytes(host.guest.domid, bytes_of(64))
    host.xen.populate(host.guest.domid, Gfn(0), 1)
    anchor = host.xen.map_pages(host.guest.domid, Gfn(0), 1, writable=False)
    host.xen.destroy(host.guest.domid)
    with pytest.raises(DomainGone):
        host.attach()
    anchor.close()


def test_another_domain_of_the_holders_number_is_never_a_target(host: Host) -> None:
    """It would hand the guest all the memory of whoever has that number now."""
    host.xen.destroy(host.holder.domid)
    host.xen.next_domid = host.holder.domid
    victim = host.xen.make_domain(UUID)
    assert victim.domid == host.holder.domid
    with pytest.raises(Conflict):
        host.attach()
    host.untouched()
    assert victim.targeted_by == 0


def test_a_holder_that_is_dying_is_never_a_target(host: Host) -> None:
    anchor = host.xen.map_pages(host.holder.domid, FIRST, 1, writable=False)
    host.xen.destroy(host.holder.domid)
    assert host.xen.by_domid[host.holder.domid].dying
    with pytest.raises(Conflict):
        host.attach()
    host.untouched()
    anchor.close()


def test_a_holder_that_goes_in_the_last_moment_is_not_the_guests_end(host: Host) -> None:
    gone = DomainGone("no such domain", call="xc_domain_set_target", errno=errno.ESRCH)
    host.xen.fail("set_target", gone)
    with pytest.raises(Conflict):
        host.attach()
    host.untouched()


def test_a_guest_that_goes_in_the_last_moment_is(host: Host) -> None:
    host.xen.before = lambda call: (
        host.xen._kill(host.xen.by_domid[host.guest.domid])
        if call.kind == "set_target" and host.guest.domid in host.xen.by_domid
        else None
    )
    with pytest.raises(DomainGone):
        host.attach()


@pytest.mark.parametrize("gfn", [AT, AT + 3])
def test_nothing_is_mapped_over_what_is_there(host: Host, gfn: int) -> None:
    host.xen.set_max_pages(host.guest.domid, 1)
    host.xen.set_paging_pool_bytes(host.guest.domid, bytes_of(64))
    host.xen.populate(host.guest.domid, Gfn(gfn), 1)
    with pytest.raises(Refused, match="memory"):
        check(host.xen, host.guest, host.wanted())


def test_pv_and_shadow_guests_are_refused(host: Host) -> None:
    domain = host.xen.by_domid[host.guest.domid]
    domain.hap = False
    with pytest.raises(Refused, match="hap=0"):
        check(host.xen, host.guest, host.wanted())
    domain.hvm = False
    with pytest.raises(Refused, match="PV"):
        check(host.xen, host.guest, host.wanted())


@pytest.mark.parametrize(("end", "fits"), [(1 << 32, True), ((1 << 32) + 1, False)])
def test_addresses_end_where_xen_says(host: Host, end: int, fits: bool) -> None:
    request = dataclasses.replace(REQUEST, first_gfn=Gfn(end - 4))
    host.guest = dataclasses.replace(host.guest, requests=(request,))
    if fits:
        check(host.xen, host.guest, host.wanted())
    else:
        with pytest.raises(Refused, match="44 address bits"):
            check(host.xen, host.guest, host.wanted())


@pytest.mark.parametrize(
    "change",
    [
        {"holder_uuid": new_holder_uuid()},
        {"ready": False},
        {"nr_frames": 3},
        {"region_id": "other"},
    ],
    ids=["in another holder", "not ready", "too small", "not there"],
)
def test_what_is_not_this_holders_is_not_mapped(host: Host, change: dict[str, object]) -> None:
    region = dataclasses.replace(host.region, **change)  # type: ignore[arg-type]
    with pytest.raises(Conflict):
        mappings(host.guest, {region.region_id: region})


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_failure_in_the_middle_leaves_nothing(host: Host, nth: int) -> None:
    requests = tuple(
        dataclasses.replace(REQUEST, first_gfn=Gfn(AT + 8 * i), nr_frames=1, offset_frames=i)
        for i in range(3)
    )
    host.guest = dataclasses.replace(host.guest, requests=requests)
    host.xen.fail("map_foreign", errno.EINVAL, nth=nth)
    with pytest.raises(HypercallFailed):
        host.attach()
    assert host.xen.foreign_frames(host.guest.domid) == {}
    host.xen.check()


# -- the same of holders --------------------------------------------------------------------------


# -- host memory -----------------------------------------------------------------------------------

BAR = PLAIN_BAR.first_mfn
BAR_AT = Gfn(AT + 4)


def of_host(region: Region, offset_frames: int = 2) -> tuple[Region, RegionRequest]:
    """A region of the machine's own memory, and what a borrower wants of it."""
    terms = RegionTerms(backing=Backing.HOST, host_first_mfn=BAR)
    bar = dataclasses.replace(region, region_id="bar", nr_frames=8, terms=terms, owner="")
    wish = RegionRequest(
        region_id="bar", first_gfn=BAR_AT, nr_frames=4, role=Role.BORROWER,
        offset_frames=offset_frames,
    )  # fmt: skip
    return bar, wish


def of_both(host: Host) -> tuple[Mapping, ...]:
    bar, wish = of_host(host.region)
    guest = dataclasses.replace(host.guest, requests=(REQUEST, wish))
    return mappings(guest, {"r": host.region, "bar": bar})


def direct(host: Host) -> dict[int, int]:
    return host.xen.by_domid[host.guest.domid].direct


def test_host_memory_beside_the_holders(host: Host) -> None:
    wanted = of_both(host)
    check(host.xen, host.guest, wanted)
    attach(host.xen, host.guest, host.holder, wanted, again=False)
    assert direct(host) == {BAR_AT + index: BAR + 2 + index for index in range(4)}
    assert set(host.xen.foreign_frames(host.guest.domid)) == set(range(AT, AT + 4))
    assert host.xen.by_domid[host.guest.domid].iomem == set(range(BAR + 2, BAR + 6))


def test_who_has_only_host_memory_gets_no_target(host: Host) -> None:
    attach(host.xen, host.guest, host.holder, of_both(host)[1:], again=False)
    assert len(direct(host)) == 4
    host.untouched()


@pytest.mark.parametrize("done", [0, 1, 4])
def test_again_after_half_of_the_host_memory(host: Host, done: int) -> None:
    host.xen.set_paging_pool_bytes(host.guest.domid, bytes_of(64))
    if done:
        host.xen.map_host_range(host.guest.domid, BAR_AT, Mfn(BAR + 2), done)
    attach(host.xen, host.guest, host.holder, of_both(host), again=True)
    assert len(direct(host)) == 4
    assert host.xen.crashed == []


def test_host_memory_that_cannot_be_mapped_takes_the_rest_with_it(host: Host) -> None:
    host.xen.fail("map_host_range", errno.ENOMEM)
    with pytest.raises(HypercallFailed):
        attach(host.xen, host.guest, host.holder, of_both(host), again=False)
    assert host.xen.foreign_frames(host.guest.domid) == {}
    backwards = of_both(host)[::-1]
    host.xen.fail("map_foreign", errno.ENOMEM)
    with pytest.raises(HypercallFailed):
        attach(host.xen, host.guest, host.holder, backwards, again=True)
    assert direct(host) == {}
    assert host.xen.by_domid[host.guest.domid].iomem == set()


def test_host_memory_that_dom0_uses_is_not_given(host: Host) -> None:
    used = dataclasses.replace(PLAIN_BAR, refusal="dom0's driver nvme uses it", hint="unbind it")
    host.xen.host_memory = (used,)
    with pytest.raises(Refused, match="dom0's driver nvme") as caught:
        check(host.xen, host.guest, of_both(host))
    assert caught.value.hint == "unbind it"


def test_only_the_part_that_is_wanted_must_be_free(host: Host) -> None:
    rest = dataclasses.replace(PLAIN_BAR, nr_frames=6)
    host.xen.host_memory = (rest,)
    check(host.xen, host.guest, of_both(host))
    bar, wish = of_host(host.region, offset_frames=4)
    guest = dataclasses.replace(host.guest, requests=(wish,))
    with pytest.raises(Refused, match="nothing there is known"):
        check(host.xen, guest, mappings(guest, {"bar": bar}))


def test_either_kind_is_detached(host: Host) -> None:
    wanted = of_both(host)
    attach(host.xen, host.guest, host.holder, wanted, again=False)
    bar, _ = of_host(host.region)
    requests = [one.request for one in wanted]
    detach(host.xen, host.guest, requests[1:], (host.region, bar))
    assert direct(host) == {}
    assert len(host.xen.foreign_frames(host.guest.domid)) == 4
    detach(host.xen, host.guest, requests[:1], ())
    assert host.xen.foreign_frames(host.guest.domid) == {}


# -- through the whole engine ----------------------------------------------------------------------


async def test_frames_whose_wiping_failed_are_given_back(autojump_clock: MockClock) -> None:
    async with world() as there:
        await there.start()
        a = await there.tools.create(there.config("a", there.request("r", 3)))
        (holder,) = there.holders()
        before = len(there.xen.by_domid[holder].pages)
        there.xen.fail("zero", errno.EBUSY)
        with pytest.raises(XlFailed):
            await there.tools.create(
                there.config("b", there.borrow("r"), there.request("s", 9, at=8))
            )
        await trio.sleep(10)
        assert len(there.xen.by_domid[holder].pages) == before
        await there.tools.end(a)
        await there.check_clean()


async def test_some_memory_is_left_to_the_host(autojump_clock: MockClock) -> None:
    async with world() as there:
        daemon = await there.start(free_memory_floor_bytes=bytes_of(there.xen.free_pages // 2))
        frames = there.xen.free_pages * 2 // 3
        with pytest.raises(XlFailed):
            await there.tools.create(there.config("a", there.request("r", frames)))
        with pytest.raises(OutOfMemory):
            await daemon.engine.wait_guest("a", 1)
        a = await there.tools.create(there.config("a", there.request("r", frames // 3)))
        await there.tools.end(a)
        await there.check_clean()


async def test_a_page_at_the_anchors_frame_is_no_proof(autojump_clock: MockClock) -> None:
    """The domain that has the holder's number now has memory at that frame as well."""
    async with world() as there:
        daemon = await there.start()
        a = await there.tools.create(there.config("a", there.request("r")))
        (holder,) = there.holders()
        await daemon.kill()
        await there.tools.destroy(a)
        there.xen.destroy(holder)
        for path in (f"/local/domain/{holder}", f"/libxl/{holder}"):
            there.server.remove(path)
        there.xen.next_domid = holder
        victim = await there.tools.create(there.config("victim"))
        assert victim.domid == holder
        there.xen.populate(DomId(victim.domid), ANCHOR_GFN, 1)
        daemon = await there.start()
        assert daemon.engine.snapshot().holders == ()
        b = await there.tools.create(there.config("b", there.request("q")))
        assert there.xen.by_domid[victim.domid].targeted_by == 0
        assert there.missing(b.domid, b.config) == ""
        assert there.running(victim)


async def test_holders_are_no_guests(autojump_clock: MockClock) -> None:
    async with world() as there:
        daemon = await there.start()
        a = await there.tools.create(there.config("a", there.request("r")))
        (holder,) = there.holders()
        await daemon.kill()
        await there.start()
        await trio.sleep(5)
        touched = {
            call.kind for call in there.xen.log if call.arguments and call.arguments[0] == holder
        }
        assert not touched & {"pause", "unpause", "destroy", "set_target", "map_foreign"}
        await there.tools.end(a)
        await there.check_clean()
