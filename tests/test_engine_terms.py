# SPDX-License-Identifier: LGPL-2.1-or-later
"""A region that exists keeps its terms, whatever its owner or a file says by now."""

from __future__ import annotations

import dataclasses

import pytest
from fakes.toolstack import XlFailed
from fakes.world import world
from trio.testing import MockClock

from xshmd.changes import AttachRegion
from xshmd.errors import Conflict, XshmError
from xshmd.model import Lifetime, Prot, ProtEnforcement, RegionConfig, RegionRequest, RegionTerms

READ_ONLY = RegionTerms(prot=Prot.RO, prot_enforcement=ProtEnforcement.ADVISORY)


def _read_only(request: RegionRequest) -> RegionRequest:
    terms = dataclasses.replace(READ_ONLY, lifetime=request.terms.lifetime)
    return dataclasses.replace(request, prot=Prot.RO, terms=terms)


@pytest.mark.parametrize("change", ["prot", "lifetime", "size"])
async def test_an_owner_comes_back_with_others(change: str, autojump_clock: MockClock) -> None:
    """It is refused with both in words, its borrower keeps the memory; as it was it may come."""
    async with world() as host:
        daemon = await host.start()
        usual = host.config("a", host.request("r", 3))
        first = await host.tools.create(usual)
        borrower = await host.tools.create(host.config("b", host.borrow("r", 2)))
        await host.until(lambda: host.running(borrower))
        pages = host.pages(borrower.domid, borrower.config.requests[0])
        await host.tools.destroy(first)
        other, said, kept = {
            "prot": (_read_only(host.request("r", 3)), "prot=ro", "prot=rw"),
            "lifetime": (host.request("r", 3, lifetime=None), "lifetime=owner", "lifetime=members"),
            "size": (host.request("r", 4), "16 KiB", "12 KiB"),
        }[change]
        with pytest.raises(XlFailed):
            await host.tools.create(host.config("a", other))
        with pytest.raises(XshmError) as refusal:
            await daemon.engine.wait_guest("a", 1)
        assert isinstance(refusal.value, Conflict)
        assert said in refusal.value.message
        assert f"exists with {kept}" in refusal.value.message
        assert "of its guests so that it is made anew" in refusal.value.one_line()
        again = await host.tools.create(host.config("a", host.request("r", 3)))
        await host.until(lambda: host.running(again))
        assert host.pages(again.domid, again.config.requests[0])[:2] == pages
        for guest in (again, borrower):
            await host.tools.destroy(guest)
        await host.check_clean()


async def test_a_file_says_other_terms_than_members_have(autojump_clock: MockClock) -> None:
    async with world() as host:
        plain = RegionConfig(region_id="n", nr_frames=2)
        host.finder.defined = [plain]
        daemon = await host.start()
        made = await host.tools.create(host.config("a"))
        await host.until(lambda: host.running(made))
        await daemon.engine.apply([AttachRegion(guest="a", request=host.borrow("n", 2))])
        host.finder.defined = [dataclasses.replace(plain, terms=READ_ONLY)]
        with pytest.raises(Conflict, match=r"exists with prot=rw and .* has members: a") as refusal:
            await daemon.engine.reload()
        assert refusal.value.hint.startswith("say prot=rw")
        # The lifetime alone may change, for those who have it as well.
        longer = RegionTerms(lifetime=Lifetime.MEMBERS)
        host.finder.defined = [dataclasses.replace(plain, terms=longer)]
        await daemon.engine.reload()
        (region,) = daemon.engine.snapshot().regions
        assert region.lifetime is Lifetime.MEMBERS
        await host.tools.destroy(made)
        await host.check_clean()


async def test_a_file_says_other_terms_of_what_nobody_has(autojump_clock: MockClock) -> None:
    """Nobody has it by the old ones: it is made anew for the next who wants it."""
    async with world() as host:
        plain = RegionConfig(region_id="n", nr_frames=2)
        host.finder.defined = [plain]
        daemon = await host.start()
        made = await host.tools.create(host.config("a", host.borrow("n", 2)))
        await host.until(lambda: host.running(made))
        await host.tools.destroy(made)
        await host.until(lambda: daemon.guest("a") is None)
        host.finder.defined = [dataclasses.replace(plain, terms=READ_ONLY)]
        steps = await daemon.engine.reload()
        assert [(step.verb, step.region) for step in steps] == [("remove", "n")]
        await host.check_clean()
