# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where guests map their regions themselves Xen copies, by references that nobody else has."""

from __future__ import annotations

from fakes.world import Daemon, World, world
from granted import entries_of, lent, mapped, owned
from trio.testing import MockClock

from xshmd.changes import DetachRegion
from xshmd.ranges import ByteRange, Part
from xshmd.units import DOMID_0, PAGE_SIZE


def part(daemon: Daemon, name: str, *ranges: tuple[int, int]) -> Part:
    guest = daemon.guest(name)
    generation = guest.generation if guest else ""
    return Part(guest=name, generation=generation, ranges=tuple(ByteRange(*one) for one in ranges))


def dom0s_entries(there: World) -> int:
    return sum(
        entry.valid and entry.domid == DOMID_0
        for holder in there.holders()
        for entry in there.xen.by_domid[holder].grants.values()
    )


async def test_xen_copies_between_guests_that_map_themselves(autojump_clock: MockClock) -> None:
    async with world() as there:
        daemon = await there.start()
        a = await there.tools.create(there.config("a", owned(there)))
        b = await there.tools.create(there.config("b", lent(there, frames=2, offset=1)))
        (whole,), (its,) = mapped(there, a), mapped(there, b)
        before = entries_of(there, a), entries_of(there, b)
        whole.write(PAGE_SIZE - 4, b"over a border")
        moved = await daemon.engine.copy_parts(
            "g",
            part(daemon, "a", (PAGE_SIZE - 4, 13)),
            part(daemon, "b", (PAGE_SIZE + 40, 5), (PAGE_SIZE - 10, 6), (PAGE_SIZE + 60, 9)),
            count_at=part(daemon, "b", (PAGE_SIZE + 80, 8)),
        )
        assert moved == 13
        assert its.read(PAGE_SIZE + 40, 5) == b"over "
        assert its.read(PAGE_SIZE - 10, 6) == b"a bord"
        assert its.read(PAGE_SIZE + 60, 9) == b"er" + bytes(7)
        assert its.read(PAGE_SIZE + 80, 8) == (13).to_bytes(8, "little")
        assert there.xen.counts["copy_granted"] == 1
        assert "copy_ranges" not in there.xen.counts
        assert dom0s_entries(there) == 0
        assert (entries_of(there, a), entries_of(there, b)) == before
        for made in (a, b):
            await there.tools.end(made)
        await there.check_clean()


async def test_references_that_a_guest_still_has_mapped_are_not_taken(
    autojump_clock: MockClock,
) -> None:
    async with world() as there:
        daemon = await there.start()
        a = await there.tools.create(there.config("a", owned(there)))
        b = await there.tools.create(there.config("b", lent(there)))
        (its,) = mapped(there, b)
        await daemon.engine.apply([DetachRegion(guest="b", region_id="g")])
        source, target = part(daemon, "a", (0, 8)), part(daemon, "", (PAGE_SIZE, 8))
        its.write(0, b"seen yet")
        assert await daemon.engine.copy_parts("g", source, target) == 8
        assert its.read(PAGE_SIZE, 8) == b"seen yet"
        assert there.xen.counts["copy_granted"] == 1
        for made in (a, b):
            await there.tools.end(made)
        await there.check_clean()


async def test_dom0_copies_where_a_table_is_full(autojump_clock: MockClock) -> None:
    async with world() as there:
        daemon = await there.start()
        request = owned(there, frames=250)
        there.xen.command_line = "xsm=dummy gnttab_max_frames=2"
        made = [await there.tools.create(there.config("a", request))]
        for name in ("b", "c", "d"):
            made.append(await there.tools.create(there.config(name, lent(there, frames=250))))
        for nr_frames, way in ((8, "copy_granted"), (9, "copy_ranges")):
            nr_bytes = nr_frames * PAGE_SIZE
            source = part(daemon, "a", (0, nr_bytes))
            target = part(daemon, "b", (PAGE_SIZE * 100, nr_bytes))
            assert await daemon.engine.copy_parts("g", source, target) == nr_bytes
            assert there.xen.counts[way] == 1
        for one in made:
            await there.tools.end(one)
        await there.check_clean()
