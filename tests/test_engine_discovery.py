# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's memory map gets its regions, or stays as the toolstack wrote it: never in between."""

from __future__ import annotations

import dataclasses
import errno

import pytest
from fakes.hypervisor import SimulatedXen
from fakes.start_info import memory_map_by_start_info, put, write_start_info
from fakes.world import world
from trio.testing import MockClock

from xshmd.engine.discovery import reserve_in_memory_map
from xshmd.machine import Arch, MemoryKind, MemoryRange
from xshmd.model import Guest, GuestState, RegionRequest, Role
from xshmd.policy.memory_map import ENTRY_BYTES, MapTable, write_entries
from xshmd.units import Gfn, bytes_of

RAM = MemoryRange(0, 0x8000000, MemoryKind.RAM)
SPECIAL = MemoryRange(0xFEFF8000, 0x8000, MemoryKind.RESERVED)
REGIONS = (
    MemoryRange(0x10_0000_0000, 0x4000, MemoryKind.RESERVED),
    MemoryRange(0x10_0000_8000, 0x1000, MemoryKind.RESERVED),
)
REQUESTS = tuple(
    RegionRequest(
        region_id=f"r{number}", first_gfn=Gfn(one.address >> 12), nr_frames=one.size_bytes >> 12,
        role=Role.OWNER,
    )
    for number, one in enumerate(REGIONS)
)  # fmt: skip

RESERVED = tuple((request.first_gfn, request.nr_frames) for request in REQUESTS)


@dataclasses.dataclass
class Built:
    """A guest as libxl leaves it (xg_dom_x86.c): start info, and behind it the map."""

    xen: SimulatedXen
    guest: Guest
    table: MapTable

    def put(self, address: int, data: bytes) -> None:
        put(self.xen, self.guest.domid, address, data)

    @property
    def told(self) -> tuple[MemoryRange, ...]:
        """The map by the start info."""
        return memory_map_by_start_info(self.xen, self.guest.domid)

    @property
    def answered(self) -> tuple[MemoryRange, ...]:
        """The map by the hypercall."""
        return self.xen.by_domid[self.guest.domid].memory_map

    def reserve(self) -> Guest:
        self.xen.log.clear()
        done = reserve_in_memory_map(self.xen, self.guest)
        assert not self.xen.open_maps
        return done

    def unchanged(self) -> None:
        assert self.reserve().reserved == ()
        assert self.answered == (() if self.xen.arch is Arch.ARM64 else (RAM, SPECIAL))


def build(arch: Arch = Arch.X86_64, *, map_at: int = 0x5878) -> Built:
    xen = SimulatedXen(arch, total_pages=1 << 14, dom0_pages=1 << 10)
    domain = xen.make_domain("11111111-2222-4333-8444-555555555555")
    xen.set_paging_pool_bytes(domain.domid, bytes_of(512))
    xen.set_max_pages(domain.domid, 16)
    xen.populate(domain.domid, Gfn(0), 16)
    xen.zero(domain.domid, Gfn(0), 16)
    guest = Guest(
        domid=domain.domid, uuid=domain.uuid, name="a", generation="g",
        state=GuestState.MAPPING, requests=REQUESTS,
    )  # fmt: skip
    if arch is Arch.X86_64:
        write_start_info(xen, domain.domid, [RAM, SPECIAL], map_at=map_at)
    return Built(xen, guest, MapTable(map_at, 2))


def test_both_maps_get_all_regions() -> None:
    built = build()
    assert built.reserve().reserved == RESERVED
    assert built.told == built.answered == (RAM, SPECIAL, *REGIONS)


def test_twice_is_once() -> None:
    built = build()
    for _ in range(2):
        built.reserve()
    assert built.told == built.answered == (RAM, SPECIAL, *REGIONS)


@pytest.mark.parametrize("cut_off_at", [1, 2])
def test_after_an_attempt_that_was_cut_off(cut_off_at: int) -> None:
    """The entries are there and do not count yet."""
    built = build()
    built.put(built.table.end, write_entries(REGIONS))
    if cut_off_at == 2:
        built.xen.set_memory_map(built.guest.domid, [RAM, SPECIAL, *REGIONS])
    built.reserve()
    assert built.told == built.answered == (RAM, SPECIAL, *REGIONS)


def test_a_map_that_begins_in_the_page_before() -> None:
    built = build(map_at=0x5FE8)
    assert built.reserve().reserved == RESERVED
    assert built.answered == (RAM, SPECIAL, *REGIONS)


def test_an_arm_guest_has_none() -> None:
    built = build(Arch.ARM64)
    built.unchanged()
    assert [call.kind for call in built.xen.log] == ["entry_register"]


def test_no_room_in_its_page() -> None:
    built = build(map_at=0x6000 - 3 * ENTRY_BYTES)
    built.unchanged()
    assert built.told == (RAM, SPECIAL)


def test_something_unknown_behind_the_map() -> None:
    built = build()
    built.put(built.table.end + ENTRY_BYTES, b"\1")
    built.unchanged()
    assert built.told == (RAM, SPECIAL)


@pytest.mark.parametrize("register", [0, 0x5008, 0x9999000, 1 << 32, (1 << 64) - 4096, 0x6000])
def test_a_register_that_leads_nowhere(register: int) -> None:
    built = build()
    built.xen.by_domid[built.guest.domid].entry_register = register
    built.unchanged()
    assert built.told == (RAM, SPECIAL)


def test_a_region_over_something_else() -> None:
    built = build()
    built.put(built.table.address, write_entries([MemoryRange(0, 1 << 40, MemoryKind.RAM)]))
    before = built.told
    built.unchanged()
    assert built.told == before != (RAM, SPECIAL)


def test_xen_refuses_the_map() -> None:
    built = build()
    built.xen.fail("set_memory_map", errno.ENOMEM)
    built.unchanged()
    assert built.told == (RAM, SPECIAL)


# -- through the whole engine ----------------------------------------------------------------------


@pytest.mark.parametrize("reserve", [True, False])
async def test_a_new_guests_map_says_where_its_region_is(
    reserve: bool, autojump_clock: MockClock
) -> None:
    async with world(arch=Arch.X86_64) as there:
        daemon = await there.start()
        request = there.request("r")
        region = MemoryRange(request.first_gfn << 12, request.size_bytes, MemoryKind.RESERVED)
        config = dataclasses.replace(there.config("a", request), reserve=reserve)
        there.finder.files["a"] = config
        made = await there.tools.create(config)
        told = memory_map_by_start_info(there.xen, made.domid)
        assert (region in told) is reserve
        assert told == there.xen.by_domid[made.domid].memory_map
        (guest,) = daemon.engine.snapshot().guests
        assert guest.reserved == (((request.first_gfn, request.nr_frames),) if reserve else ())
        node = there.server.read(f"/local/domain/{made.domid}/xshm/r") or ""
        assert node.endswith(f"memory_map={'reserved' if reserve else 'unchanged'} peer=0")
        await there.tools.end(made)
        await there.check_clean()


async def test_a_wish_to_leave_the_map_alone_outlives_reboot_and_restart(
    autojump_clock: MockClock,
) -> None:
    async with world(arch=Arch.X86_64) as there:
        daemon = await there.start()
        config = dataclasses.replace(there.config("a", there.request("r")), reserve=False)
        there.finder.files["a"] = config
        made = await there.tools.create(config)
        there.finder.files["a"] = dataclasses.replace(config, reserve=True)
        await daemon.kill()
        daemon = await there.start()
        made = await there.tools.reboot(made)
        (guest,) = daemon.engine.snapshot().guests
        assert (guest.reserve, guest.reserved) == (False, ())
        assert len(memory_map_by_start_info(there.xen, made.domid)) == 1
        await there.tools.end(made)
        await there.check_clean()
