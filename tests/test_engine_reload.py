# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files of ours that have changed: running guests are made as they say, or nothing is done."""

from __future__ import annotations

import dataclasses

import pytest
import trio
from fakes.world import Daemon, World, world
from hot_changes import add, attach, frames, guest, picture, span
from trio.testing import MockClock

from xshmd.errors import ConfigError, Conflict, XshmError
from xshmd.model import (
    Lifetime,
    RegionConfig,
    RegionRequest,
)

# -- reload ---------------------------------------------------------------------------------------


async def declared(host: World, name: str, *requests: RegionRequest) -> None:
    """Have a file of ours say this of a guest."""
    host.config(name, *(in_file(request, name) for request in requests))
    host.finder.declared.add(name)


def in_file(request: RegionRequest, name: str) -> RegionRequest:
    place = dataclasses.replace(request.place, file=f"/etc/xshmd/guests.d/{name}.toml")
    return dataclasses.replace(request, place=place)


def kinds(daemon: Daemon) -> list[tuple[str, Lifetime]]:
    return [(one.region_id, one.lifetime) for one in daemon.engine.snapshot().regions]


async def test_a_reload_makes_guests_as_their_files_say(autojump_clock: MockClock) -> None:
    async with world() as host:
        await declared(host, "a", host.borrow("n", 2))
        host.finder.defined.append(RegionConfig(region_id="n", nr_frames=2))
        daemon = await host.start()
        a = await host.tools.create(host.finder.files["a"])  # type: ignore[arg-type]
        assert await daemon.engine.reload() == ()
        host.finder.defined.append(RegionConfig(region_id="m", nr_frames=4))
        more = host.borrow("m", 4, at=64)
        await declared(host, "a", host.borrow("n", 2), more)
        dry = await daemon.engine.reload(dry_run=True)
        assert [step.verb for step in dry] == ["create", "attach"]
        assert frames(host, a) == span(host.borrow("n", 2))
        assert await daemon.engine.reload() == dry
        assert frames(host, a) == span(host.borrow("n", 2)) | span(more)
        await declared(host, "a", more)
        host.finder.defined.pop(0)
        steps = await daemon.engine.reload()
        assert [(step.verb, step.region) for step in steps] == [("detach", "n"), ("remove", "n")]
        assert frames(host, a) == span(more)
        assert kinds(daemon) == [("m", Lifetime.SYSTEM)]
        # Defined no more, but in use: it stays for as long as it is.
        host.finder.defined.clear()
        (step,) = await daemon.engine.reload()
        assert "stays until its members end" in step.text
        assert kinds(daemon) == [("m", Lifetime.MEMBERS)]
        await host.tools.end(a)
        await host.check_clean()


async def test_a_reload_gives_a_running_guest_its_first_region(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(host.config("a"))
        await declared(host, "a", host.request("r", 3, lifetime=None))
        (create, give) = await daemon.engine.reload()
        assert (create.verb, give.verb, give.domid) == ("create", "attach", a.domid)
        assert frames(host, a) == span(host.request("r", 3))
        assert await daemon.engine.reload() == ()
        await host.tools.end(a)
        await host.check_clean()


async def test_a_guest_whose_memory_is_being_made_cannot_join(autojump_clock: MockClock) -> None:
    """It has no regions, so the gate let it go at once, and libxl is still at work on it."""
    async with world() as host:
        daemon = await host.start()
        refusals: list[XshmError] = []

        async def ask() -> None:
            with pytest.raises(Conflict, match="is being created") as caught:
                await daemon.engine.apply([add("n"), attach("a", host.borrow("n"))])
            refusals.append(caught.value)

        async with trio.open_nursery() as nursery:
            host.tools.at_step = lambda step, domid: (
                nursery.start_soon(ask) if step in ("pool", "memory") else None
            )
            a = await host.tools.create(host.config("a"))
        assert len(refusals) == 2
        await daemon.engine.apply([add("n"), attach("a", host.borrow("n"))])
        assert frames(host, a) == span(host.borrow("n"))


async def test_a_reload_leaves_alone_what_no_file_of_ours_said(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        xl = await host.tools.create(host.config("xl", host.request("r", 3)))
        await daemon.engine.apply([add("n", 2), attach("xl", host.borrow("n", 2, at=64))])
        host.finder.files.clear()
        assert await daemon.engine.reload() == ()
        assert len(frames(host, xl)) == 5
        assert [one[0] for one in kinds(daemon)] == ["n", "r"]


async def test_a_file_that_is_gone_withdraws(autojump_clock: MockClock) -> None:
    async with world() as host:
        await declared(host, "a", host.request("r", 3))
        daemon = await host.start()
        a = await host.tools.create(host.finder.files["a"])  # type: ignore[arg-type]
        del host.finder.files["a"]
        steps = await daemon.engine.reload()
        assert [(step.verb, step.region) for step in steps] == [("detach", "r")]
        assert frames(host, a) == set()
        await host.tools.end(a)
        await host.check_clean()


async def test_a_reload_with_a_wrong_file_does_nothing(autojump_clock: MockClock) -> None:
    async with world() as host:
        await declared(host, "a", host.request("r", 3))
        daemon = await host.start()
        a = await host.tools.create(host.finder.files["a"])  # type: ignore[arg-type]
        await declared(host, "a", host.request("r", 3), host.request("s", 3, at=64))
        host.finder.files["b"] = ConfigError("b.toml: nonsense", hint="mend it")
        before = picture(host)
        with pytest.raises(ConfigError, match="nonsense"):
            await daemon.engine.reload()
        assert picture(host) == before
        del host.finder.files["b"]
        await daemon.engine.reload()
        assert len(frames(host, a)) == 6
        assert daemon.engine.statistics()["reloads"] == 1


async def test_a_reload_cannot_change_a_size_in_use(autojump_clock: MockClock) -> None:
    async with world() as host:
        host.finder.defined.append(RegionConfig(region_id="n", nr_frames=4))
        daemon = await host.start()
        a = await guest(host, "a", host.borrow("n", 3))
        host.finder.defined[0] = RegionConfig(region_id="n", nr_frames=8)
        with pytest.raises(Conflict, match="has members"):
            await daemon.engine.reload()
        await host.tools.end(a)
        await host.until(lambda: daemon.engine.snapshot().guests == ())
        await daemon.engine.reload()
        await host.check_clean()
