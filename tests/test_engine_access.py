# SPDX-License-Identifier: LGPL-2.1-or-later
"""A region's bytes from dom0: exactly those, as members see them, and never another's."""

from __future__ import annotations

import pytest
import structlog.testing
from fakes.world import world
from trio.testing import MockClock

from xshmd.api import MAX_ACCESS_BYTES
from xshmd.errors import NoSuchRegion, UsageError, XshmError
from xshmd.units import PAGE_SIZE, bytes_of

SIZE = bytes_of(40)


async def test_guests_see_what_was_written_and_it_reads_as_they_see_it(
    autojump_clock: MockClock,
) -> None:
    async with world() as host:
        daemon = await host.start()
        config = host.config("a", host.request("q", 3), host.request("r", 40, at=64))
        a = await host.tools.create(config)
        at = config.requests[1].first_gfn
        data = bytes(range(1, 256)) * 40
        await daemon.engine.write_region("r", PAGE_SIZE - 7, data)
        assert host.xen.guest_read(a.domid, at, PAGE_SIZE - 8, 8) == b"\0" + data[:7]
        last = PAGE_SIZE - 7 + len(data) - 1
        assert host.xen.guest_read(a.domid, at + last // PAGE_SIZE, last % PAGE_SIZE, 2) == (
            data[-1:] + b"\0"
        )
        assert await daemon.engine.read_region("r", PAGE_SIZE - 7, len(data)) == data
        host.xen.guest_write(a.domid, at, 5, b"seen")
        assert await daemon.engine.read_region("r", 5, 4) == b"seen"
        assert not any(await daemon.engine.read_region("q", 0, bytes_of(3)))
        await host.tools.destroy(a)
        await host.check_clean()


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (-1, 1),
        (0, 0),
        (SIZE, 1),
        (SIZE - 1, 2),
        (0, MAX_ACCESS_BYTES + 1),
        (1 << 62, 1),
    ],
)
async def test_what_is_beyond_the_region_is_out_of_reach(
    autojump_clock: MockClock, offset: int, length: int
) -> None:
    async with world() as host:
        daemon = await host.start()
        # Another region follows in the same holder: what is past the end would be its bytes.
        config = host.config("a", host.request("r", 40), host.request("s", 3, at=64))
        a = await host.tools.create(config)
        with pytest.raises(UsageError):
            await daemon.engine.read_region("r", offset, length)
        for dry_run in (True, False):
            with pytest.raises(UsageError):
                await daemon.engine.write_region("r", offset, b"x" * length, dry_run=dry_run)
        assert not any(await daemon.engine.read_region("r", SIZE - 1, 1))
        assert not any(await daemon.engine.read_region("s", 0, bytes_of(3)))
        await host.tools.destroy(a)
        await host.check_clean()


async def test_the_last_byte_is_in_reach(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(host.config("a", host.request("r", 40)))
        await daemon.engine.write_region("r", SIZE - 1, b"x")
        assert await daemon.engine.read_region("r", SIZE - 2, 2) == b"\0x"
        await host.tools.destroy(a)
        await host.check_clean()


async def test_a_write_that_is_only_tried_writes_nothing_and_is_not_logged(
    autojump_clock: MockClock,
) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(host.config("a", host.request("r", 40)))
        with structlog.testing.capture_logs() as logs:
            await daemon.engine.write_region("r", 0, b"x", dry_run=True)
        assert logs == []
        assert not any(await daemon.engine.read_region("r", 0, 1))
        await host.tools.destroy(a)
        await host.check_clean()


async def test_every_load_leaves_one_line(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(host.config("a", host.request("r", 40)))
        with structlog.testing.capture_logs() as logs:
            for offset in (0, 100, 200, 8192, 8292):
                await daemon.engine.write_region("r", offset, b"x" * 100)
        said = [(line["log_level"], line["offset_bytes"]) for line in logs]
        assert said == [
            ("info", 0), ("debug", 100), ("debug", 200), ("info", 8192), ("debug", 8292),
        ]  # fmt: skip
        assert {(line["event"], line["region"]) for line in logs} == {("region written", "r")}
        await host.tools.destroy(a)
        await host.check_clean()


async def test_a_region_that_is_not_there(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        with pytest.raises(NoSuchRegion):
            await daemon.engine.read_region("r", 0, 1)
        with pytest.raises(NoSuchRegion):
            await daemon.engine.write_region("r", 0, b"x")


async def test_a_holder_that_somebody_destroyed_is_not_mistaken_for_another(
    autojump_clock: MockClock,
) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(host.config("a", host.request("r", 40)))
        (holder,) = host.holders()
        host.xen.destroy(holder)
        with pytest.raises(XshmError):
            await daemon.engine.write_region("r", 0, b"x")
        await host.tools.destroy(a)
