# SPDX-License-Identifier: LGPL-2.1-or-later
"""Three guests and what may happen to them, in any order, and what must be so after each of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Final

from crash import Lives
from fakes.toolstack import Made
from fakes.world import World
from granted import entries_of, lent, mapped, owned

from xshmd.changes import AddRegion, AttachRegion, DetachRegion, RemoveRegion
from xshmd.model import RegionConfig

WORD: Final = b"from a"
EXTRA: Final = "n"
"""The region that is given to guests that run."""


GRANTED: Final = "g"
"""The region that guests map themselves."""


def configure(host: World) -> None:
    """Have the guests' files: a and b share a region, each has one of its own; b and c map one."""
    host.config("a", host.request("r", 3), host.request("s", 5, at=16))
    host.config(
        "b",
        host.borrow("r", 2, at=64, offset=1),
        host.request("q", 2, at=32),
        lent(host, GRANTED, 4),
    )
    host.config("c", owned(host, GRANTED, 4))


@dataclasses.dataclass(slots=True)
class Play:
    """A host, and what must be so on it."""

    host: World
    lives: Lives
    made: dict[str, Made] = dataclasses.field(default_factory=dict)
    extra: set[str] | None = None
    """Who has the extra region; None while there is none."""
    had: set[str] = dataclasses.field(default_factory=set)
    """Who has, or ever had, an extra region in this life."""
    written: bool = False
    """Whether the region of a and b has the word in it that a wrote."""

    def operations(self) -> Iterator[tuple[str, Callable[[], Awaitable[None]]]]:
        """Everything that may happen next."""
        for name in "abc":
            if name not in self.made:
                yield f"create {name}", partial(self.create, name)
        for name in self.made:
            yield f"end {name}", partial(self.end, name)
            yield f"destroy {name}", partial(self.destroy, name)
            yield f"reboot {name}", partial(self.reboot, name)
        if self.extra is None:
            yield "add", self.add
            return
        yield "remove", self.remove
        for name in self.made:
            if name in self.extra:
                yield f"detach {name}", partial(self.detach, name)
            elif not self._would_join_groups(name):
                yield f"attach {name}", partial(self.attach, name)

    def _would_join_groups(self, name: str) -> bool:
        """Whether the guest is tied to other guests than those that have the extra region.

        Two share groups that live cannot be joined: that is refused, and no matter here.  A guest
        is tied for life, so one that ever had the region is left alone with whoever had it then.
        """
        assert self.extra is not None
        camps = [{"a", "b"}, {"c"}]
        return any(name not in camp and camp & (self.extra | self.had) for camp in camps)

    async def create(self, name: str) -> None:
        config = self.host.finder.files[name]
        assert not isinstance(config, Exception)
        self.made[name] = await self.host.tools.create(config)
        await self._up(name)
        if name == "a":
            request = config.requests[0]
            self.host.xen.guest_write(self.made[name].domid, request.first_gfn + 1, 8, WORD)
            self.written = True

    async def _up(self, name: str) -> None:
        made = self.made[name]
        await self.host.until(lambda: self.host.running(made), f"{name} running")

    async def end(self, name: str) -> None:
        await self.host.tools.end(self.made[name])
        self._gone(name)

    async def destroy(self, name: str) -> None:
        await self.host.tools.destroy(self.made[name])
        self._gone(name)

    def _gone(self, name: str) -> None:
        del self.made[name]
        self.had.discard(name)
        if self.extra is not None:
            self.extra.discard(name)
        if not self.made.keys() & {"a", "b"}:
            self.written = False

    async def reboot(self, name: str) -> None:
        self.made[name] = await self.host.tools.reboot(self.made[name])
        await self._up(name)

    async def add(self) -> None:
        await self.lives.apply(AddRegion(config=RegionConfig(region_id=EXTRA, nr_frames=2)))
        self.extra = set()

    async def remove(self) -> None:
        await self.lives.apply(RemoveRegion(region_id=EXTRA, force=True))
        self.extra = None

    async def attach(self, name: str) -> None:
        wanted = self.host.borrow(EXTRA, 2, at=128)
        await self.lives.apply(AttachRegion(guest=name, request=wanted))
        assert self.extra is not None
        self.extra.add(name)
        self.had.add(name)

    async def detach(self, name: str) -> None:
        await self.lives.apply(DetachRegion(guest=name, region_id=EXTRA))
        assert self.extra is not None
        self.extra.discard(name)

    # -- what must be so --------------------------------------------------------------------------

    async def verify(self) -> None:
        """Fail unless every guest runs, with all that it is to have and nothing else."""
        await self.lives.settled()
        for name, made in self.made.items():
            requests = list(made.config.requests)
            if self.extra and name in self.extra:
                requests.append(self.host.borrow(EXTRA, 2, at=128))
            assert self.host.missing(made.domid, made.config) == ""
            granted = [one for one in requests if one.region_id == GRANTED]
            assert bool(granted) == bool(entries_of(self.host, made)), f"{name}'s references"
            for mapping in mapped(self.host, made, GRANTED):
                mapping.close()
            wanted = {
                gfn
                for one in requests
                if one not in granted
                for gfn in range(one.first_gfn, one.end_gfn)
            }
            found = set(self.host.xen.foreign_frames(made.domid))
            assert found == wanted, f"{name} has {sorted(found ^ wanted)} wrong"
            assert self.host.running(made), f"{name} does not run"
            if self.written and name in "ab":
                gfn = made.config.requests[0].first_gfn + (name == "a")
                said = self.host.xen.guest_read(made.domid, gfn, 8, len(WORD))
                assert said == WORD, f"{name} reads {said!r}"

    async def finish(self) -> None:
        """End everything, and fail unless nothing is left."""
        for made in tuple(self.made.values()):
            await self.host.tools.end(made)
        if self.extra is not None:
            await self.lives.apply(RemoveRegion(region_id=EXTRA, force=True))
        await self.lives.settled()
        await self.host.check_clean()
