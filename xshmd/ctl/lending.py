# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ``xshmctl vhost-user`` lends to a back-end, pinned for as long; and when that changes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from typing import Final

from xshmd.ctl import render
from xshmd.errors import Conflict, DaemonUnreachable, NoSuchRegion, Refused, XshmError
from xshmd.units import PAGE_SIZE, DomId, Gfn
from xshmd.varlink.client import Client
from xshmd.vhost_user import offer, table
from xshmd.vhost_user.offer import Part, Target
from xshmd.vhost_user.wire import MemoryRegion
from xshmd.xen import device_maps
from xshmd.xen.windows import Window

AGAIN_S: Final = 1.0
"""When to try again to reach a daemon that is not there."""
TRIES: Final = 5
"""How often what there is may change while it is being lent."""


class Lender:
    """Says what is to be lent, and makes sure that it is the holder's and nobody else's.

    A domid may come to mean another domain.  So a frame of each region is mapped here before the
    daemon is asked whether the region is still there: while it is mapped, Xen gives the number to
    nobody else, and what the daemon then says holds for as long as the back-end has the region.
    """

    def __init__(self, client: Client, target: Target) -> None:
        self._client, self._target = client, target
        self._pinned: dict[MemoryRegion, tuple[int, Window]] = {}
        self._told: set[offer.Withheld] = set()

    def __enter__(self) -> Lender:
        return self

    def __exit__(self, *_: object) -> None:
        self.forget()

    def check(self) -> None:
        """Raise what is wrong with the target itself."""
        found, withheld = self._ask()
        if self._target.region and not found:
            if withheld:
                raise Refused(
                    f"region {withheld[0].region_id} cannot be offered: {withheld[0].why}"
                )
            raise NoSuchRegion(
                f"there is no region {self._target.region}",
                hint="xshmctl list shows those there are",
                id=self._target.region,
            )

    def current(self, before: tuple[MemoryRegion, ...]) -> tuple[MemoryRegion, ...]:
        """Return what is to be lent now, pinned; ``before`` if nobody can say.

        Raises:
            Refused: Some of it cannot be reached.
        """
        try:
            for _ in range(TRIES):
                found, withheld = self._ask()
                failed = self._pin(found)
                if self._ask()[0] == found:
                    if failed is not None:
                        raise failed
                    self._tell(withheld)
                    return tuple(part.described for part in found)
        except DaemonUnreachable:
            # Regions do not depend on the daemon; when it is back, it says what changed.
            return before
        raise Conflict("the regions change faster than they can be lent", hint="try again")

    def open_fd(self, region: MemoryRegion) -> int:
        """Return a descriptor to map the region through, and nothing else."""
        return os.dup(self._pinned[region][0])

    def keep(self, regions: Sequence[MemoryRegion]) -> None:
        """Let go of all but these."""
        for region in tuple(self._pinned):
            if region not in regions:
                fd, anchor = self._pinned.pop(region)
                anchor.close()
                os.close(fd)

    def forget(self) -> None:
        """Let go of everything."""
        self.keep(())

    def _ask(self) -> tuple[tuple[Part, ...], tuple[offer.Withheld, ...]]:
        return offer.parts(self._client.call("ListRegions")["regions"], self._target)

    def _pin(self, found: Sequence[Part]) -> Refused | None:
        for part in found:
            region = part.described
            if region in self._pinned:
                continue
            domid = DomId(region.domid)
            try:
                fd = device_maps.open_restricted(domid)
            except OSError as error:
                return Refused(
                    f"memory of domains cannot be lent: {error}",
                    hint="be root in the control domain",
                )
            anchor = Window(PAGE_SIZE)
            try:
                device_maps.map_frames(anchor, fd, domid, Gfn(table.first_frame(region)))
            except OSError as error:
                anchor.close()
                os.close(fd)
                return Refused(f"region {part.region_id} cannot be mapped by dom0: {error}")
            self._pinned[region] = (fd, anchor)
        return None

    def _tell(self, withheld: Sequence[offer.Withheld]) -> None:
        for each in withheld:
            if each not in self._told:
                render.say(f"region {each.region_id} is not offered: {each.why}")
        self._told = set(withheld)


class Watch:
    """Becomes readable whenever something happens to regions, or may have."""

    def __init__(self, path: str) -> None:
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._client = Client(path)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            # It may be just about to connect, and then waits for what will not come.
            self._client.close()
            self._thread.join(0.05)
        os.close(self._read)
        os.close(self._write)

    def fileno(self) -> int:
        return self._read

    def clear(self) -> None:
        """Forget what happened so far."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._read, 4096):
                pass

    def _run(self) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(XshmError):
                for _ in self._client.stream("Monitor"):
                    with contextlib.suppress(BlockingIOError):
                        os.write(self._write, b"!")
            self._stopped.wait(AGAIN_S)
