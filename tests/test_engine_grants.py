# SPDX-License-Identifier: LGPL-2.1-or-later
"""Regions that guests map themselves, from their first guest to their last, through the engine."""

from __future__ import annotations

import dataclasses
import errno

import pytest
from fakes.toolstack import XlFailed
from fakes.world import world
from granted import FRAMES, entries_of, lent, mapped, owned, readable
from trio.testing import MockClock

from xshmd.changes import AddRegion, AttachRegion, DetachRegion, RemoveRegion
from xshmd.errors import HypercallFailed, OutOfMemory, Refused
from xshmd.machine import Arch
from xshmd.model import (
    GuestType,
    Isolation,
    Process,
    Prot,
    RegionConfig,
    RegionTerms,
    Role,
    Transport,
)
from xshmd.policy.grants import MAX_RANGES, capacity


@pytest.mark.parametrize("arch", list(Arch), ids=str)
async def test_two_guests_share_what_they_map_themselves(
    arch: Arch, autojump_clock: MockClock
) -> None:
    async with world(arch) as there:
        await there.start()
        a = await there.tools.create(there.config("a", owned(there)))
        b = await there.tools.create(there.config("b", lent(there, frames=2, offset=1)))
        assert there.running(a)
        assert there.running(b)
        (whole,), (part,) = mapped(there, a), mapped(there, b)
        whole.write(4096 + 3, b"from a")
        assert part.read(3, 6) == b"from a"
        for made in (a, b):
            assert there.xen.by_domid[made.domid].target is None
            assert there.xen.foreign_frames(made.domid) == {}
            await there.tools.end(made)
        await there.check_clean()


async def test_what_a_guest_is_told_comes_after_what_it_was_told_before(
    autojump_clock: MockClock,
) -> None:
    async with world() as there:
        await there.start()
        a = await there.tools.create(there.config("a", owned(there)))
        (holder,) = there.holders()
        assert (there.server.read(f"/local/domain/{a.domid}/xshm/g") or "").endswith(
            "transport=grant offset=0x0 backing=holder cache=write-back memory_map=reserved "
            f"grants={holder}:8+{FRAMES} peer=0"
        )
        await there.tools.end(a)
        await there.check_clean()


async def test_prot_ro_is_enforced(autojump_clock: MockClock) -> None:
    async with world() as there:
        await there.start()
        a = await there.tools.create(there.config("a", owned(there)))
        b = await there.tools.create(there.config("b", readable(lent(there))))
        with pytest.raises(HypercallFailed):
            mapped(there, b, writable=True)
        (view,) = mapped(there, b, writable=False)
        (mine,) = mapped(there, a)
        mine.write(0, b"look")
        assert view.read(0, 4) == b"look"
        for made in (a, b):
            await there.tools.end(made)
        await there.check_clean()


async def test_nobody_else_maps_it(autojump_clock: MockClock) -> None:
    """Neither a stranger, nor a member of another region in the same holder."""
    async with world() as there:
        await there.start()
        a = await there.tools.create(there.config("a", owned(there)))
        b = await there.tools.create(there.config("b", owned(there, "h", 2)))
        stranger = await there.tools.create(there.config("c", file=False))
        (holder,) = there.holders()
        for made in (b, stranger):
            for _, first, count in there.grants_told(a.domid, "g"):
                with pytest.raises(HypercallFailed):
                    there.xen.guest_map_grants(made.domid, holder, first, count, writable=False)
        for made in (a, b, stranger):
            await there.tools.end(made)
        await there.check_clean()


async def test_a_guest_that_reboots_has_new_references(autojump_clock: MockClock) -> None:
    async with world() as there:
        await there.start()
        a = await there.tools.create(there.config("a", owned(there)))
        (before,) = mapped(there, a)
        before.write(0, b"stays")
        told = there.grants_told(a.domid, "g")
        await there.tools.end(a, 1)
        await there.until(lambda: not entries_of(there, a))
        again = await there.tools.create(a.config)
        assert again.domid != a.domid
        (now,) = mapped(there, again)
        assert now.read(0, 5) == b"stays"
        for holder, first, count in told:
            with pytest.raises(HypercallFailed):
                there.xen.guest_map_grants(a.domid, holder, first, count, writable=False)
        await there.tools.end(again)
        await there.check_clean()


async def test_a_domid_that_comes_again_has_nothing(autojump_clock: MockClock) -> None:
    """Its last bearer ended while no daemon ran."""
    async with world() as there:
        daemon = await there.start()
        a = await there.tools.create(there.config("a", owned(there)))
        b = await there.tools.create(there.config("b", lent(there)))
        told = there.grants_told(a.domid, "g")
        await daemon.kill()
        await there.tools.end(a)
        there.xen.next_domid = a.domid
        c = await there.tools.create(there.config("c", file=False))
        assert c.domid == a.domid
        await there.start()
        for holder, first, count in told:
            with pytest.raises(HypercallFailed):
                there.xen.guest_map_grants(c.domid, holder, first, count, writable=False)
        assert mapped(there, b)
        for made in (b, c):
            await there.tools.end(made)
        await there.check_clean()


async def test_it_is_given_to_and_taken_from_a_guest_that_runs(autojump_clock: MockClock) -> None:
    async with world() as there:
        daemon = await there.start()
        a = await there.tools.create(there.config("a", owned(there)))
        b = await there.tools.create(there.config("b", file=False))
        before = there.xen.counts.get("pause", 0)
        await daemon.engine.apply([AttachRegion(guest="b", request=lent(there))])
        (view,) = mapped(there, b)
        view.write(0, b"b was here")
        view.close()
        await daemon.engine.apply([DetachRegion(guest="b", region_id="g")])
        assert there.server.read(f"/local/domain/{b.domid}/xshm/g") is None
        assert entries_of(there, b) == []
        assert there.xen.counts.get("pause", 0) == before, "no guest had to stand still"
        (mine,) = mapped(there, a)
        assert mine.read(0, 10) == b"b was here"
        for made in (a, b):
            await there.tools.end(made)
        await there.check_clean()


async def test_what_is_still_mapped_is_known_and_given_to_nobody(
    autojump_clock: MockClock,
) -> None:
    async with world() as there:
        daemon = await there.start()
        a = await there.tools.create(there.config("a", owned(there)))
        b = await there.tools.create(there.config("b", file=False))
        attach = AttachRegion(guest="b", request=lent(there))
        await daemon.engine.apply([attach])
        ((holder, first, _),) = there.grants_told(b.domid, "g")
        view = there.xen.guest_map_grants(b.domid, holder, first + 1, 2, writable=True)
        await daemon.engine.apply([DetachRegion(guest="b", region_id="g")])
        with pytest.raises(HypercallFailed):
            there.xen.guest_map_grants(b.domid, holder, first, 1, writable=False)
        record = daemon.guest("b")
        assert record is not None
        assert [(one.first_ref, one.is_ended) for one in record.grants] == [(first, True)]
        await daemon.engine.apply([attach])
        assert there.grants_told(b.domid, "g") != [(holder, first, FRAMES)]
        await daemon.engine.apply([DetachRegion(guest="b", region_id="g")])
        view.close()
        await there.until(lambda: (daemon.guest("b") or record).grants == ())
        await daemon.engine.apply([attach])
        assert there.grants_told(b.domid, "g") == [(holder, first, FRAMES)]
        for made in (a, b):
            await there.tools.end(made)
        await there.check_clean()


async def test_a_region_that_is_still_mapped_may_go(autojump_clock: MockClock) -> None:
    """It is wiped, and what the guest keeps goes when it unmaps it."""
    async with world() as there:
        daemon = await there.start()
        a = await there.tools.create(there.config("a", owned(there)))
        (view,) = mapped(there, a)
        view.write(0, b"secret")
        await daemon.engine.apply([RemoveRegion(region_id="g", force=True)])
        assert view.read(0, 6) == bytes(6)
        assert daemon.engine.snapshot().regions == ()
        assert there.holders(), "its table has references that are in use"
        view.close()
        await there.until(lambda: not there.holders())
        await there.tools.end(a)
        await there.check_clean()


@pytest.mark.parametrize("arch", list(Arch), ids=str)
async def test_a_region_too_large_for_one_table_has_several_holders(
    arch: Arch, autojump_clock: MockClock
) -> None:
    async with world(arch) as there:
        daemon = await there.start()
        request = owned(there, frames=700)
        there.xen.command_line = "xsm=dummy gnttab_max_frames=2"
        a = await there.tools.create(there.config("a", request))
        b = await there.tools.create(there.config("b", readable(lent(there, frames=700))))
        holders = there.holders()
        assert len(holders) == 3
        assert all(there.xen.by_domid[one].max_grant_frames == 2 for one in holders)
        views = mapped(there, a)
        assert len(views) == 3
        await daemon.engine.write_region("g", 253 * 4096 + 4000, b"x" * 5000)
        there_too = b"".join(
            one.read(0, 4096 * count)
            for one, (_, _, count) in zip(views, there.grants_told(a.domid, "g"), strict=True)
        )
        assert there_too.index(b"x" * 5000) == 253 * 4096 + 4000
        assert await daemon.engine.read_region("g", 253 * 4096 + 3990, 20) == bytes(10) + b"x" * 10
        for made in (a, b):
            await there.tools.end(made)
        await there.check_clean()


async def test_small_regions_share_a_holder_until_it_is_full(autojump_clock: MockClock) -> None:
    async with world() as there:
        daemon = await there.start()
        there.xen.command_line = "gnttab_max_frames=2"
        terms = RegionTerms(transport=Transport.GRANT)
        each = capacity(2) // 4 // 3
        for number in range(4):
            config = RegionConfig(region_id=f"r{number}", nr_frames=each, terms=terms)
            await daemon.engine.apply([AddRegion(config=config)])
        assert len(there.holders()) == 2
        for number in range(4):
            await daemon.engine.apply([RemoveRegion(region_id=f"r{number}")])
        await there.check_clean()


async def test_more_members_than_the_table_has_room_for_are_refused(
    autojump_clock: MockClock,
) -> None:
    """Before anything is written; the others keep what they have."""
    async with world() as there:
        await there.start()
        frames = capacity(2) // 4
        request = owned(there, frames=frames)
        there.xen.command_line = "gnttab_max_frames=2"
        made = [await there.tools.create(there.config("a", request))]
        for name in "bcd":
            made.append(await there.tools.create(there.config(name, lent(there, frames=frames))))
        written = there.xen.counts["write_grants"]
        with pytest.raises(XlFailed):
            await there.tools.create(there.config("e", lent(there, frames=frames)))
        assert there.xen.counts["write_grants"] == written
        for one in made:
            assert mapped(there, one)
            await there.tools.end(one)
        await there.check_clean()


async def test_room_is_made_for_all_that_the_files_name(autojump_clock: MockClock) -> None:
    async with world() as there:
        await there.start()
        frames = capacity(2) // 6
        request = owned(there, frames=frames)
        there.xen.command_line = "gnttab_max_frames=2"
        configs = [there.config("a", request)]
        configs += [there.config(name, lent(there, frames=frames)) for name in "bcdef"]
        made = [await there.tools.create(config) for config in configs]
        assert len(there.holders()) == 1
        for one in made:
            assert mapped(there, one)
            await there.tools.end(one)
        await there.check_clean()


async def test_both_kinds_in_one_guest_do_not_meet(autojump_clock: MockClock) -> None:
    """Guests that share what they map themselves need not trust each other with the rest."""
    async with world() as there:
        daemon = await there.start()
        p = there.request("p", 3, at=64)
        q = there.request("q", 3, at=64)
        a = await there.tools.create(there.config("a", owned(there), p))
        b = await there.tools.create(there.config("b", lent(there), q))
        assert len(there.holders()) == 3
        assert len(there.pages(a.domid, p)) == len(there.pages(b.domid, q)) == 3
        targets = {there.xen.by_domid[one.domid].target for one in (a, b)}
        assert len(targets) == 2
        for target in targets:
            assert target is not None
            assert target.max_grant_frames == 1
            assert target.grants == {}
        assert len(daemon.engine.snapshot().regions) == 3
        for made in (a, b):
            await there.tools.end(made)
        await there.check_clean()


async def test_pv_guests_map_grants_too(autojump_clock: MockClock) -> None:
    async with world() as there:
        await there.start()
        config = there.config("a", owned(there), file=False)
        config = dataclasses.replace(config, guest_type=GuestType.PV, hap=False)
        there.finder.files["a"] = config
        a = await there.tools.create(config)
        assert mapped(there, a)
        await there.tools.end(a)
        await there.check_clean()


@pytest.mark.parametrize(
    ("arch", "command_line"),
    [(Arch.ARM64, ""), (Arch.ARM64, "xsm=silo"), (Arch.X86_64, "xsm=silo")],
)
async def test_silo_is_a_reason(arch: Arch, command_line: str, autojump_clock: MockClock) -> None:
    async with world(arch) as there:
        daemon = await there.start()
        request = owned(there)
        there.xen.command_line = command_line
        with pytest.raises(XlFailed):
            await there.tools.create(there.config("a", request))
        with pytest.raises(Refused, match=r"silo.*lets guests map grants of dom0 alone"):
            await daemon.engine.wait_guest("a", 1.0)
        assert there.holders() == []
        await there.check_clean()


async def test_what_cannot_be_granted_is_refused(autojump_clock: MockClock) -> None:
    async with world() as there:
        daemon = await there.start()
        for terms, words in (
            (
                RegionTerms(transport=Transport.GRANT, isolation=Isolation.SEALED),
                "isolation=sealed",
            ),
            (RegionTerms(isolation=Isolation.REGION), "isolation=region"),
        ):
            config = RegionConfig(region_id="r", nr_frames=1, terms=terms)
            with pytest.raises(Refused, match=words):
                await daemon.engine.apply([AddRegion(config=config)])
        terms = RegionTerms(transport=Transport.GRANT, isolation=Isolation.REGION)
        config = RegionConfig(region_id="r", nr_frames=1, terms=terms)
        await daemon.engine.apply([AddRegion(config=config)])
        await daemon.engine.apply([RemoveRegion(region_id="r")])
        await there.check_clean()


async def test_too_little_memory_is_known_before_anything_is_made(
    autojump_clock: MockClock,
) -> None:
    async with world() as there:
        daemon = await there.start()
        config = RegionConfig(
            region_id="r", nr_frames=there.free_pages - 5000,
            terms=RegionTerms(transport=Transport.GRANT),
        )  # fmt: skip
        with pytest.raises(OutOfMemory):
            await daemon.engine.apply([AddRegion(config=config)])
        plain = dataclasses.replace(config, terms=RegionTerms())
        await daemon.engine.apply([AddRegion(config=plain)], dry_run=True)
        assert there.holders() == []
        await there.check_clean()


async def test_an_entry_that_cannot_be_written_dooms_the_guest(autojump_clock: MockClock) -> None:
    async with world() as there:
        await there.start()
        a = await there.tools.create(there.config("a", owned(there)))
        there.xen.fail("write_grants", errno.ENOMEM)
        with pytest.raises(XlFailed):
            await there.tools.create(there.config("b", lent(there)))
        assert mapped(there, a)
        await there.tools.end(a)
        await there.check_clean()


async def test_a_holder_that_somebody_destroys_loses_its_regions_only(
    autojump_clock: MockClock,
) -> None:
    async with world() as there:
        daemon = await there.start()
        request = owned(there, frames=700)
        there.xen.command_line = "gnttab_max_frames=2"
        a = await there.tools.create(there.config("a", request))
        there.xen.destroy(there.holders()[1])
        there.server.write("/libxl/999", "")  # anything that makes it look
        there.server.remove("/libxl/999")
        b = await there.tools.create(there.config("b", there.request("p", 2)))
        await there.until(lambda: [r.region_id for r in daemon.engine.snapshot().regions] == ["p"])
        for made in (a, b):
            await there.tools.end(made)
        await there.check_clean()


async def test_a_daemon_that_starts_again_knows_what_is_given(autojump_clock: MockClock) -> None:
    async with world() as there:
        daemon = await there.start()
        a = await there.tools.create(there.config("a", owned(there)))
        await daemon.kill()
        await there.start()
        b = await there.tools.create(there.config("b", lent(there)))
        assert not set(there.grants_told(a.domid, "g")) & set(there.grants_told(b.domid, "g"))
        assert mapped(there, a)
        assert mapped(there, b)
        for made in (a, b):
            await there.tools.end(made)
        await there.check_clean()


async def test_a_borrower_may_come_first(autojump_clock: MockClock) -> None:
    async with world() as there:
        await there.start()
        there.config("a", owned(there))
        b = await there.tools.create(there.config("b", lent(there)))
        assert mapped(there, b)
        await there.tools.end(b)
        await there.check_clean()


async def test_roles_and_lifetimes_are_as_of_any_region(autojump_clock: MockClock) -> None:
    """Its owner's end takes it from the others."""
    async with world() as there:
        await there.start()
        request = owned(there)
        request = dataclasses.replace(request, terms=RegionTerms(transport=Transport.GRANT))
        a = await there.tools.create(there.config("a", request))
        b = await there.tools.create(there.config("b", lent(there)))
        assert request.role is Role.OWNER
        await there.tools.end(a)
        await there.until(lambda: not entries_of(there, b))
        await there.until(lambda: not there.holders())
        await there.tools.end(b)
        await there.check_clean()


async def test_a_region_too_large_for_any_number_of_tables(autojump_clock: MockClock) -> None:
    async with world() as there:
        daemon = await there.start()
        there.xen.command_line = "gnttab_max_frames=2"
        terms = RegionTerms(transport=Transport.GRANT)
        config = RegionConfig(region_id="r", nr_frames=MAX_RANGES * 254 + 1, terms=terms)
        for dry_run in (True, False):
            with pytest.raises(Refused, match="more than 64 holders"):
                await daemon.engine.apply([AddRegion(config=config)], dry_run=dry_run)
        assert there.holders() == []
        await there.check_clean()


async def test_what_a_guest_is_told_fits_in_its_node(autojump_clock: MockClock) -> None:
    async with world() as there:
        await there.start()
        request = owned(there, frames=MAX_RANGES * 254)
        there.xen.command_line = "gnttab_max_frames=2"
        a = await there.tools.create(there.config("a", request))
        assert len(there.grants_told(a.domid, "g")) == MAX_RANGES
        assert len(there.server.read(f"/local/domain/{a.domid}/xshm/g") or "") < 3900
        assert len(mapped(there, a)) == MAX_RANGES
        await there.tools.end(a)
        await there.check_clean()


async def test_dom0_has_it_as_it_has_any_region(autojump_clock: MockClock) -> None:
    """A process that leases it keeps it; one that is too large for one table it cannot have."""
    async with world() as there:
        daemon = await there.start()
        there.xen.command_line = "gnttab_max_frames=2"
        terms = RegionTerms(transport=Transport.GRANT, isolation=Isolation.REGION)
        for region_id, frames in (("g", 2), ("large", 700)):
            config = RegionConfig(region_id=region_id, nr_frames=frames, terms=terms)
            await daemon.engine.apply([AddRegion(config=config)])
        process = Process(pid=7, uid=0, started=1, name="p")
        with pytest.raises(Refused, match="in 3 holders"):
            async with daemon.engine.lease("large", Prot.RO, process):
                pass
        async with daemon.engine.lease("g", Prot.RO, process) as held:
            assert held.lease.region_id == "g"
        for region_id in ("g", "large"):
            await daemon.engine.apply([RemoveRegion(region_id=region_id)])
        await there.check_clean()


async def test_all_holders_of_a_region_go_with_it(autojump_clock: MockClock) -> None:
    """At once, and not when something else happens."""
    async with world() as there:
        daemon = await there.start()
        request = owned(there, frames=700)
        there.xen.command_line = "gnttab_max_frames=2"
        a = await there.tools.create(there.config("a", request))
        assert len(there.holders()) == 3
        record = daemon.guest("a")
        assert record is not None
        await daemon.engine._ledger.drop_guest(record.generation)
        await daemon.engine._ends.collect()
        assert daemon.engine.snapshot().regions == ()
        assert there.holders() == []
        await there.tools.end(a)
        await there.check_clean()


async def test_a_guest_of_grants_may_be_given_what_is_mapped_for_it(
    autojump_clock: MockClock,
) -> None:
    """It gets a target then, and has it for life."""
    async with world() as there:
        daemon = await there.start()
        p = there.request("p", 3, at=64)
        c = await there.tools.create(there.config("c", owned(there)))
        a = await there.tools.create(there.config("a", p))
        await daemon.engine.apply([AttachRegion(guest="c", request=there.borrow("p", 3, at=64))])
        assert there.pages(c.domid, p) == there.pages(a.domid, p)
        record = daemon.guest("c")
        assert record is not None
        assert record.holder_uuid == there.xen.by_domid[a.domid].target.uuid  # type: ignore[union-attr]
        n = RegionConfig(region_id="n", nr_frames=2)
        d = await there.tools.create(there.config("d", owned(there, "h")))
        await daemon.engine.apply(
            [AddRegion(config=n), AttachRegion(guest="d", request=there.borrow("n", 2, at=96))]
        )
        await daemon.engine.apply([DetachRegion(guest="c", region_id="p")])
        assert there.xen.foreign_frames(c.domid) == {}
        assert mapped(there, c)
        await daemon.engine.apply([RemoveRegion(region_id="n", force=True)])
        for made in (a, c, d):
            await there.tools.end(made)
        await there.check_clean()
