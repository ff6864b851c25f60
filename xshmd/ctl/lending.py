# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ``xshmctl vhost-user`` lends to a back-end, pinned for as long; and when that changes."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Final

from xshmd.client import Lease, connect
from xshmd.ctl import render
from xshmd.errors import Conflict, DaemonUnreachable, NoSuchRegion, Refused, XshmError
from xshmd.units import PAGE_SHIFT, PAGE_SIZE, DomId, Gfn
from xshmd.varlink.client import Client
from xshmd.vhost_user import offer, table
from xshmd.vhost_user.offer import Part, Target, Withheld
from xshmd.vhost_user.payloads import MemoryRegion
from xshmd.xen import device_maps
from xshmd.xen.windows import Window

AGAIN_S: Final = 1.0
"""When to try again to reach a daemon that is not there."""
GIVEN_UP_S: Final = 10.0
"""How long a region that was wanted back is left alone: longer than a removal may take."""
TRIES: Final = 5
"""How often what there is may change while it is being lent."""


class Lender:
    """Says what is to be lent, leases it, and makes sure that it is the holder's and nobody else's.

    A lease keeps a region from being freed under a back-end that has it mapped; when the region is
    wanted back, the back-end has to give it up first.  And as a domid may come to mean another
    domain, a frame of each part is mapped here before the daemon is asked whether the part is still
    there: while it is mapped, Xen gives the number to nobody else, and what the daemon then says
    holds for as long as the back-end has the part.

    Args:
        path: The daemon's socket.
        target: What is wanted.
    """

    def __init__(self, path: str, target: Target) -> None:
        self._path, self._target = path, target
        self._connection = connect(path)
        self._leases: dict[str, Lease] = {}
        self._pinned: dict[Part, tuple[int, Window]] = {}
        self._given_up: dict[Part, float] = {}
        """What was wanted back, and until when it is not asked for again."""
        self._told: set[Withheld] = set()

    def __enter__(self) -> Lender:
        return self

    def __exit__(self, *_: object) -> None:
        self.forget()

    def check(self) -> None:
        """Raise what is wrong with the target itself."""
        found, withheld = self._ask()
        if self._target.region and not found:
            if withheld:
                region_id, why = withheld[0].region_id, withheld[0].why
                raise Refused(f"region {region_id} cannot be offered: {why}")
            raise NoSuchRegion(
                f"there is no region {self._target.region}",
                hint="xshmctl list shows those there are",
                id=self._target.region,
            )

    def current(self, before: tuple[MemoryRegion, ...]) -> tuple[MemoryRegion, ...]:
        """Return what is to be lent now, leased and pinned; ``before`` if nobody can say.

        Raises:
            Refused: Some of it cannot be reached.
        """
        for lease in self._leases.values():
            # A daemon that went away leaves its leases readable until somebody has looked.
            with contextlib.suppress(DaemonUnreachable):
                lease.poll()
        try:
            for _ in range(TRIES):
                found, withheld = self._leased(*self._ask())
                failed = self._pin(found)
                if self._leased(*self._ask())[0] == found:
                    if failed is not None:
                        raise failed
                    self._tell(withheld)
                    return tuple(part.described for part in found)
        except DaemonUnreachable:
            # Regions do not depend on the daemon; when it is back, it says what changed.
            return before
        raise Conflict("the regions change faster than they can be lent", hint="try again")

    def filenos(self) -> list[int]:
        """Return descriptors of which one is readable when something lent is wanted back."""
        return [fd for lease in self._leases.values() if (fd := lease.fileno()) >= 0]

    def patience(self) -> float | None:
        """Return for how many seconds to wait before asking for what was given up; None: ever."""
        if not self._given_up:
            return None
        return max(0.0, min(self._given_up.values()) - time.monotonic())

    def open_fd(self, region: MemoryRegion) -> int:
        """Return a descriptor to map the region through, and nothing else."""
        return os.dup(
            next(fd for part, (fd, _) in self._pinned.items() if part.described == region)
        )

    def used_index(self, used_address: int) -> int:
        """Return the index of a queue's used ring, which is at this user address: how far it is.

        Raises:
            Refused: It is in nothing that is lent, or cannot be mapped.
        """
        for part, (fd, _) in self._pinned.items():
            region = part.described
            offset = used_address + 2 - region.user_address
            if not 0 <= offset < region.size_bytes:
                continue
            gfn = Gfn(table.first_frame(region) + (offset >> PAGE_SHIFT))
            with Window(PAGE_SIZE) as window:
                try:
                    device_maps.map_frames(window, fd, DomId(region.domid), gfn)
                except OSError as error:
                    raise Refused(
                        f"region {part.region_id} cannot be mapped by dom0: {error}"
                    ) from error
                return int.from_bytes(window.view(offset % PAGE_SIZE, 2), sys.byteorder)
        raise Refused(f"the used ring at {used_address:#x} is in no region that is lent")

    def keep(self, regions: Sequence[MemoryRegion]) -> None:
        """Let go of all but these: nobody has the rest mapped any more."""
        for part in tuple(self._pinned):
            if part.described not in regions:
                fd, anchor = self._pinned.pop(part)
                anchor.close()
                os.close(fd)
        for region_id in self._leases.keys() - {part.region_id for part in self._pinned}:
            self._leases.pop(region_id).close()

    def forget(self) -> None:
        """Let go of everything."""
        self.keep(())

    def _ask(self) -> tuple[tuple[Part, ...], tuple[Withheld, ...]]:
        with Client(self._path) as client:  # one that was idle for long is closed by the daemon
            regions = client.call("ListRegions")["regions"]
        return offer.parts(regions, self._target)

    def _leased(
        self, found: Sequence[Part], withheld: Sequence[Withheld]
    ) -> tuple[tuple[Part, ...], tuple[Withheld, ...]]:
        """Leave out what is wanted back, or cannot be leased; have a lease of the rest."""
        now = time.monotonic()
        self._given_up = {
            part: until for part, until in self._given_up.items() if part in found and until > now
        }
        refused: list[Withheld] = list(withheld)
        kept: list[Part] = []
        for part in found:
            if part in self._given_up:
                continue
            try:
                if part.region_id not in self._leases:
                    self._leases[part.region_id] = self._connection.lease(part.region_id, "rw")
                if self._leases[part.region_id].poll():
                    self._given_up[part] = now + GIVEN_UP_S
                    continue
            except DaemonUnreachable:
                raise
            except XshmError as error:
                refused.append(Withheld(part.region_id, error.message))
                continue
            kept.append(part)
        return tuple(kept), tuple(refused)

    def _pin(self, found: Sequence[Part]) -> Refused | None:
        for part in found:
            if part in self._pinned:
                continue
            domid = DomId(part.described.domid)
            try:
                fd = device_maps.open_restricted(domid)
            except OSError as error:
                return Refused(
                    f"memory of domains cannot be lent: {error}",
                    hint="be root in the control domain",
                )
            anchor = Window(PAGE_SIZE)
            try:
                first_gfn = Gfn(table.first_frame(part.described))
                device_maps.map_frames(anchor, fd, domid, first_gfn)
            except OSError as error:
                anchor.close()
                os.close(fd)
                return Refused(f"region {part.region_id} cannot be mapped by dom0: {error}")
            self._pinned[part] = (fd, anchor)
        return None

    def _tell(self, withheld: Sequence[Withheld]) -> None:
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
