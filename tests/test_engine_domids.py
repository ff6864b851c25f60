# SPDX-License-Identifier: LGPL-2.1-or-later
"""Domids and holders that are not what they were: a stranger's is never touched."""

from __future__ import annotations

import pytest
import trio
from fakes.toolstack import XlFailed
from fakes.world import world
from life import pair
from trio.testing import MockClock

from xshmd.machine import SHUTDOWN_REBOOT

# -- domids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_regions", [False, True])
async def test_a_domid_that_comes_again_is_a_new_guest(
    autojump_clock: MockClock, with_regions: bool
) -> None:
    async with world() as host:
        await host.start()
        regions = [host.request("old", at=32)] if with_regions else []
        first = await host.tools.create(host.config("first", *regions))
        await host.tools.end(first)
        await host.check_clean()
        host.xen.next_domid = first.domid
        config = host.config("a", host.request("r"))
        made = await host.tools.create(config)
        assert made.domid == first.domid
        assert host.missing(made.domid, config) == ""
        assert host.ran_wrongly == []


async def test_a_domid_that_comes_again_while_xenstored_is_away(
    autojump_clock: MockClock,
) -> None:
    """Nobody told us of the end; the domain of that number is another one by now."""
    async with world() as host:
        daemon = await host.start()
        first = await host.tools.create(host.config("first", host.request("r")))
        await host.tools.create(host.config("keeper"))
        host.server.stop()
        await host.tools.destroy(first)
        host.xen.next_domid = first.domid
        stranger = await host.tools.create(host.config("stranger"))
        assert stranger.domid == first.domid
        host.server.start()
        await host.until(lambda: daemon.engine.snapshot().guests == (), "the end to be seen")
        await host.until(lambda: daemon.engine.snapshot().regions == ())
        assert host.running(stranger)
        assert host.xen.foreign_frames(stranger.domid) == {}


async def test_a_reboot_into_the_same_domid(autojump_clock: MockClock) -> None:
    """Same number, same UUID: only that libxl's node went away tells it is another domain."""
    async with world() as host:
        await host.start()
        config = host.config("a", host.request("r"))
        made = await host.tools.create(config)
        host.xen.guest_write(made.domid, config.requests[0].first_gfn, 0, b"kept")
        for _ in range(3):
            host.xen.next_domid = made.domid
            again = await host.tools.reboot(made)
            assert again.domid == made.domid
            assert host.xen.guest_read(again.domid, config.requests[0].first_gfn, 0, 4) == b"kept"
            made = again
        assert host.ran_wrongly == []
        await host.tools.end(made)
        await host.check_clean()


async def test_a_domid_that_comes_again_while_nobody_looked(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start(reboot_grace_s=5.0)
        first = await host.tools.create(host.config("first", host.request("old", at=32)))
        await daemon.kill()
        await host.tools.end(first)
        host.xen.next_domid = first.domid
        made = await host.tools.create(host.config("a"))
        assert made.domid == first.domid
        await host.start(reboot_grace_s=5.0)
        await trio.sleep(30)
        assert host.xen.foreign_frames(made.domid) == {}
        assert host.holders() == []
        await host.tools.end(made)
        await host.check_clean()


async def test_a_holders_domid_that_is_another_domains(autojump_clock: MockClock) -> None:
    """Never act on a remembered domid: a wrong target would hand out another VM's memory."""
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(host.config("a", host.request("r")))
        (holder,) = host.holders()
        await daemon.kill()
        await host.tools.end(a, SHUTDOWN_REBOOT)
        host.xen.destroy(holder)
        assert holder not in host.xen.by_domid
        for path in (f"/local/domain/{holder}", f"/libxl/{holder}"):
            host.server.remove(path)
        host.xen.next_domid = holder
        victim = await host.tools.create(host.config("victim"))
        assert victim.domid == holder
        daemon = await host.start()
        b = await host.tools.create(host.config("b", host.borrow("r")))
        assert host.xen.by_domid[victim.domid].targeted_by == 0
        assert host.missing(b.domid, b.config) == ""
        assert host.server.read(f"/local/domain/{victim.domid}/name") == "victim"


# -- holders --------------------------------------------------------------------------------------


async def test_a_holder_destroyed_by_somebody_else(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        one, other = await pair(host)
        a = await host.tools.create(one)
        (holder,) = host.holders()
        host.xen.guest_write(a.domid, one.requests[0].first_gfn, 0, b"mine")
        host.xen.destroy(holder)
        # Nothing tells of it: the next thing that happens does.
        with pytest.raises(XlFailed):
            await host.tools.create(other)
        await host.until(lambda: daemon.engine.snapshot().holders == ())
        assert host.xen.guest_read(a.domid, one.requests[0].first_gfn, 0, 4) == b"mine"
        assert host.running(a)
        await host.tools.end(a)
        await host.check_clean()
        a = await host.tools.create(one)
        await host.tools.end(a)
        await host.check_clean()


async def test_a_holder_destroyed_while_nobody_looked(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(host.config("a", host.request("r")))
        (holder,) = host.holders()
        await daemon.kill()
        host.xen.destroy(holder)
        daemon = await host.start()
        assert daemon.engine.snapshot().holders == ()
        assert host.running(a)
        await host.tools.end(a)
        await host.check_clean()


async def test_holders_answer_xl_shutdown(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        a = await host.tools.create(host.config("a", host.request("r")))
        (holder,) = host.holders()
        for _ in range(2):
            path = f"/local/domain/{holder}/control/shutdown"
            host.server.write(path, "poweroff")
            await host.until(lambda path=path: host.server.read(path) == "")  # type: ignore[misc]
            assert host.server.read(f"/libxl/{holder}/type") == "pvh"
            await daemon.kill()
            daemon = await host.start()
        info = host.xen.domain_info(holder)
        assert info is not None
        assert info.shut_down
        b = await host.tools.create(host.config("b", host.borrow("r")))
        assert host.missing(b.domid, b.config) == ""
        await host.tools.end(a)
        await host.tools.end(b)
        await host.check_clean()


async def test_holders_are_never_unpaused_or_introduced(autojump_clock: MockClock) -> None:
    async with world() as host:
        await host.start()
        await host.tools.create(host.config("a", host.request("r")))
        (holder,) = host.holders()
        assert holder not in host.server.introduced
        assert host.xen.by_domid[holder].pauses == 1
        assert host.xen.by_domid[holder].max_pages == 0


async def test_a_strangers_holder_is_left_alone(autojump_clock: MockClock) -> None:
    """One of ours without a record: its guests may still have its memory."""
    async with world() as host:
        from xshmd.policy.identity import new_holder_uuid

        lost = host.xen.make_domain(new_holder_uuid())
        host.server.write(f"/libxl/{lost.domid}/type", "pvh")
        await host.start()
        a = await host.tools.create(host.config("a", host.request("r")))
        await host.tools.end(a)
        assert host.xen.by_domid[lost.domid] is lost
        assert not lost.dying
        touched = {call.kind for call in host.xen.log if lost.domid in call.arguments[:1]}
        assert touched <= {"domain_info"}
