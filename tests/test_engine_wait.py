# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting for a guest by its domid, as a hotplug script does, and what it may not do after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import pytest
import trio
from fakes.toolstack import XlFailed
from fakes.world import world
from trio.testing import MockClock

from xshmd.engine import saving
from xshmd.errors import NoSuchGuest, TimedOut, XshmError
from xshmd.ports import Store


async def test_a_guest_with_regions(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        made = await host.tools.create(host.config("a", host.request("r", 3)))
        guest = await daemon.engine.wait_guest(str(made.domid), 5)
        assert guest.name == "a"


async def test_a_guest_without_regions_is_not_waited_for(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        made = await host.tools.create(host.config("plain"))
        began = trio.current_time()
        with pytest.raises(NoSuchGuest, match="no shared memory"):
            await daemon.engine.wait_guest(str(made.domid), 30)
        assert trio.current_time() == began


@pytest.mark.parametrize("shares", [True, False])
async def test_asked_before_the_domain_is_seen(autojump_clock: MockClock, shares: bool) -> None:
    """Nothing is concluded from not having seen a domain yet."""
    async with world() as host:
        daemon = await host.start()
        outcomes: list[str] = []

        async def ask() -> None:
            try:
                outcomes.append((await daemon.engine.wait_guest("1", 60)).name)
            except NoSuchGuest:
                outcomes.append("none")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            requests = [host.request("r", 3)] if shares else []
            made = await host.tools.create(host.config("a", *requests))
        assert made.domid == 1
        assert outcomes == ["a" if shares else "none"]


async def test_a_guest_whose_name_is_another_ones_domid(autojump_clock: MockClock) -> None:
    """Names come first."""
    async with world() as host:
        daemon = await host.start()
        plain = await host.tools.create(host.config("plain"))
        config = host.config(str(plain.domid), host.request("r", 3))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(host.tools.create, config)
            await host.until(lambda: daemon.guest(config.name) is not None)
            guest = await daemon.engine.wait_guest(config.name, 30)
        assert guest.name == config.name


class Sluggish:
    """A store that takes its time to write down what the gate has found."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def write_many(self, items: Sequence[tuple[str, str]]) -> None:
        await trio.sleep(0.1)
        await self._store.write_many(items)


async def test_asked_while_the_gate_looks(autojump_clock: MockClock) -> None:
    """Between seeing a domain and writing it down, it is not yet known to be without regions."""
    async with world() as host:
        daemon = await host.start(
            wrap=lambda life: dataclasses.replace(life, store=cast(Store, Sluggish(life.store)))
        )
        answers: list[str] = []

        async def ask_again_and_again() -> None:
            while not answers:
                try:
                    answers.append((await daemon.engine.wait_guest("1", 0.01)).name)
                except TimedOut:
                    pass
                except NoSuchGuest:
                    answers.append("none")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_again_and_again)
            await host.tools.create(host.config("a", host.request("r", 3)))
        assert answers == ["a"]


async def test_a_refused_guest_ends_the_wait_with_the_reason(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        reasons: list[str] = []

        async def ask() -> None:
            with pytest.raises(XshmError) as caught:
                await daemon.engine.wait_guest("1", 60)
            reasons.append(caught.value.message)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            with pytest.raises(XlFailed):
                await host.tools.create(host.config("a", host.borrow("nobodys", 3)))
        assert "nobodys" in reasons[0]


async def test_a_domain_that_is_not_there(autojump_clock: MockClock) -> None:
    async with world() as host:
        daemon = await host.start()
        with pytest.raises(TimedOut):
            await daemon.engine.wait_guest("77", 5)


async def test_a_guest_with_regions_cannot_be_saved(autojump_clock: MockClock) -> None:
    """libxl reads a port from the node, as atoi() does; port 0 cannot be bound."""
    async with world() as host:
        await host.start()
        shared = await host.tools.create(host.config("a", host.request("r", 3)))
        plain = await host.tools.create(host.config("plain"))
        path, reason = saving.forbidden(shared.domid)
        assert not reason[:1].isdigit()
        assert host.dump()[path][0] == reason
        assert saving.forbidden(plain.domid)[0] not in host.dump()
