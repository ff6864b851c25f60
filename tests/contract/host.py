# SPDX-License-Identifier: LGPL-2.1-or-later
"""Scratch domains for a case, and the proof that it left nothing behind.

Only the port is used, so that it is the same on the model and on real Xen.
"""

from __future__ import annotations

import dataclasses
import errno
import time
import uuid as uuid_module
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from xshmd.errors import DomainGone, HypercallFailed, OutOfMemory, XshmError
from xshmd.machine import Arch, DomainInfo
from xshmd.policy.host_ranges import why_not_shareable
from xshmd.ports import Hypervisor
from xshmd.units import DOMID_FIRST_RESERVED, PAGE_SIZE, SUPERPAGE_FRAMES, DomId, Gfn, Mfn, bytes_of

HOLDER_GFN = Gfn(0x40000)
"""Where the cases put a holder's pages: 1 GiB, 2 MiB aligned."""
GUEST_GFN = Gfn(0x80000)
"""Where the cases map them."""
SETTLE_S = 5.0
"""How long Xen may take to finish a domain off (RCU, and its idle loop)."""
ENOUGH_POOL_FRAMES = 512
FEW_FRAMES = 1024
POOL_EXHAUSTED = (errno.ENOMEM, errno.ENOENT)
"""What a map says that gets no table: on Arm ENOENT (arch/arm/mmu/p2m.c __p2m_set_entry())."""
HOST_POOL_EXHAUSTED = (errno.ENOENT, errno.EINVAL)
"""The same of host memory: on x86 libxenctrl's undoing leaves its own errno behind."""


class Wrong(AssertionError):
    """Xen, or the model, is not what the case says."""


def expect(condition: bool, what: str) -> None:
    """Fail the case unless ``condition``; works under ``python -O``, and needs no pytest."""
    if not condition:
        raise Wrong(what)


def equal(found: object, wanted: object, what: str) -> None:
    """Fail the case unless the two are equal."""
    expect(found == wanted, f"{what}: {found!r} instead of {wanted!r}")


@dataclasses.dataclass(slots=True)
class Caught:
    """What a block raised."""

    error: XshmError | None = None

    @property
    def errno(self) -> int:
        return self.error.errno if isinstance(self.error, HypercallFailed) else 0


@contextmanager
def raises(kind: type[XshmError], code: int | tuple[int, ...] = ()) -> Iterator[Caught]:
    """Fail the case unless the block raises this error, with one of these errnos."""
    caught = Caught()
    try:
        yield caught
    except kind as error:
        caught.error = error
    except XshmError as error:
        raise Wrong(f"{type(error).__name__} ({error}) instead of {kind.__name__}") from error
    else:
        raise Wrong(f"no error instead of {kind.__name__}")
    codes = (code,) if isinstance(code, int) else code
    if codes:
        names = " or ".join(errno.errorcode[one] for one in codes)
        expect(
            caught.errno in codes,
            f"{kind.__name__} with {errno.errorcode.get(caught.errno, caught.errno)}, not {names}",
        )


class FreeMemory:
    """How many pages are free when nothing is on its way back any more.

    Xen takes the last of a domain away from RCU callbacks, one after the other.  Each waits for
    every processor, and on x86 one that idles without C-states does not tell RCU so
    (``default_idle()`` does not call ``rcu_idle_enter()``): it takes part when its next timer wakes
    it, which is ``time_calibration()``, once a second.  So no case waits for its domains to be gone
    but for what it says itself, and what was free before one is free again before the next that
    counts.

    Args:
        xen: Whose memory.
        quiet_s: For how long it must not change to be believed.
    """

    def __init__(self, xen: Hypervisor, quiet_s: float = 0.0) -> None:
        self._xen = xen
        self._quiet_s = quiet_s
        self._level = -1

    def now(self) -> int:
        """Return how many pages are free at this moment."""
        return self._xen.host_info().free_pages

    def settled(self) -> int:
        """Return how many are free while there is no scratch domain."""
        found, since = self.now(), time.monotonic()
        while found != self._level and time.monotonic() - since < self._quiet_s:
            time.sleep(0.02)
            now = self.now()
            if now != found:
                found, since = now, time.monotonic()
        self._level = found
        return found


class ContractHost:
    """Makes scratch domains, and destroys them when left.

    Args:
        xen: What the contract is about.
        memory: The machine's; the same for all cases of a run.
    """

    def __init__(self, xen: Hypervisor, memory: FreeMemory | None = None) -> None:
        self.xen = xen
        self._memory = memory or FreeMemory(xen)
        host = xen.host_info()
        self.arch: Arch = host.arch
        self.version = host.xen_version
        self._made: list[DomId] = []
        self._settled = False

    def __enter__(self) -> ContractHost:
        return self

    def __exit__(self, *_: object) -> None:
        for domid in reversed(self._made):
            self.destroy(domid)

    # -- making ---------------------------------------------------------------------------------

    def fresh_uuid(self) -> str:
        return str(uuid_module.uuid4())

    def bare(self, uuid: str = "", *, nr_grant_frames: int = 1) -> DomId:
        """Return a domain as the recipe makes it: no memory, nothing added."""
        domid = self.xen.create_holder_domain(
            uuid or self.fresh_uuid(), nr_grant_frames=nr_grant_frames
        )
        self._made.append(domid)
        return domid

    def domain(self, pool_frames: int = ENOUGH_POOL_FRAMES, *, nr_grant_frames: int = 1) -> DomId:
        """Return a domain with a paging pool of this size and no memory."""
        domid = self.bare(nr_grant_frames=nr_grant_frames)
        self.xen.set_paging_pool_bytes(domid, bytes_of(pool_frames))
        return domid

    def hog(self, nr_left: int) -> None:
        """Leave the machine about so many free pages, no fewer."""
        domid = self.domain(4096)
        wanted = (self.free_pages() - nr_left) // SUPERPAGE_FRAMES * SUPERPAGE_FRAMES
        self.xen.set_max_pages(domid, wanted)
        with suppress(OutOfMemory):
            self.xen.populate(domid, Gfn(0), wanted)

    @property
    def levels(self) -> int:
        """Tables on the way to a frame, below the root that every domain has from the start."""
        return 3

    def tables(self, domid: DomId) -> int:
        """Return how many pages of its pool a domain uses; it has no others afterwards."""
        self.starve(domid)
        return self.xen.paging_pool_bytes(domid) // PAGE_SIZE

    def starve(self, domid: DomId) -> None:
        """Leave the domain no page in its paging pool but those in use already."""
        with suppress(HypercallFailed):  # ENOMEM: "failed to free enough", once all are freed
            self.xen.set_paging_pool_bytes(domid, 0)

    def holder(self, nr_frames: int = 4, *, nr_grant_frames: int = 1) -> DomId:
        """Return a domain with pages at ``HOLDER_GFN``, and no right to more.

        They are zeroed if they are few: of thousands that takes an emulated machine long.
        """
        domid = self.domain(nr_grant_frames=nr_grant_frames)
        self.xen.set_max_pages(domid, nr_frames)
        self.xen.populate(domid, HOLDER_GFN, nr_frames)
        if nr_frames <= FEW_FRAMES:
            self.xen.zero(domid, HOLDER_GFN, nr_frames)
        self.xen.set_max_pages(domid, 0)
        return domid

    def pair(self, nr_frames: int = 4, *, nr_grant_frames: int = 1) -> tuple[DomId, DomId]:
        """Return a holder with pages and a guest whose target it is."""
        holder, guest = self.holder(nr_frames, nr_grant_frames=nr_grant_frames), self.domain()
        self.xen.set_target(guest, holder)
        return holder, guest

    def mapped(self, nr_frames: int = 4, *, nr_grant_frames: int = 1) -> tuple[DomId, DomId]:
        """Return a pair with all of the holder's pages mapped at ``GUEST_GFN``."""
        holder, guest = self.pair(nr_frames, nr_grant_frames=nr_grant_frames)
        self.xen.map_foreign(guest, GUEST_GFN, holder, HOLDER_GFN, nr_frames)
        return holder, guest

    def destroy(self, domid: DomId) -> None:
        """Destroy a scratch domain if it is still there."""
        with suppress(DomainGone):
            self.xen.destroy(domid)

    def unused_domid(self) -> DomId:
        """Return a domid that nothing has; new domains get theirs from below."""
        domid = DomId(DOMID_FIRST_RESERVED - 1)
        while self.xen.domain_info(domid) is not None:
            domid = DomId(domid - 1)
        return domid

    def host_memory(self, nr_frames: int = 1) -> Mfn:
        """Return the first of so many machine frames that may be given to guests."""
        ranges = self.xen.host_ranges()
        # A device's memory: nobody knows what firmware does with what it has reserved.
        for one in ranges:
            free = not any(why_not_shareable(ranges, one.first_mfn, nr_frames))
            if "PCI" in one.name and free:
                return one.first_mfn
        known = "; ".join(f"{one.name}: {one.refusal}" for one in ranges)
        raise Wrong(f"this machine has no host memory to share: {known}")

    # -- looking --------------------------------------------------------------------------------

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for Xen to come to something; the model is there at once."""
        deadline = time.monotonic() + SETTLE_S
        while not condition():
            if time.monotonic() > deadline:
                raise Wrong(f"timed out after {SETTLE_S:g} s: {what}")
            time.sleep(0.02)

    def info(self, domid: DomId) -> DomainInfo:
        found = self.xen.domain_info(domid)
        if found is None:
            raise Wrong(f"domain {domid} is gone")
        return found

    def gone(self, domid: DomId) -> None:
        """Fail unless the domain goes away completely."""
        self.wait(lambda: self.xen.domain_info(domid) is None, f"domain {domid} to go")

    def tot_pages(self, domid: DomId) -> int:
        return self.info(domid).tot_pages

    def free_pages(self) -> int:
        """Return how many pages are free, which counts only after :meth:`settle`."""
        return self._memory.now()

    def settle(self) -> int:
        """Let what earlier cases used come back: the first thing a case that counts pages does."""
        if self._made:
            raise Wrong("the case has begun: what its own domains take is not to be waited for")
        self._settled = True
        return self._memory.settled()

    def wait_free(self, nr_pages: int, what: str) -> None:
        """Fail unless so many pages, no more and no fewer, come to be free."""
        with suppress(Wrong):
            self.wait(lambda: self.free_pages() == nr_pages, what)
        equal(self.free_pages(), nr_pages, what)

    def read(self, domid: DomId, gfn: int, nr_bytes: int, offset_bytes: int = 0) -> bytes:
        mapping = self.xen.map_pages(domid, Gfn(gfn), 1, writable=False)
        try:
            return mapping.read(offset_bytes, nr_bytes)
        finally:
            mapping.close()

    def write(self, domid: DomId, gfn: int, data: bytes, offset_bytes: int = 0) -> None:
        mapping = self.xen.map_pages(domid, Gfn(gfn), 1, writable=True)
        try:
            mapping.write(offset_bytes, data)
        finally:
            mapping.close()

    @contextmanager
    def page_exact(self) -> Iterator[None]:
        """Fail unless free memory comes back to what it was, to the page."""
        before = self.free_pages() if self._settled else self.settle()
        yield
        self.wait_free(before, "free pages afterwards")
