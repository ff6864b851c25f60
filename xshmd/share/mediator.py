# SPDX-License-Identifier: LGPL-2.1-or-later
"""Does for guests what they ask for in their request pages: lists and transfers of their own.

A guest has one page of its part of a region for that, once dom0 has opened it.  It can ask for
nothing that is not its own to ask, and costs dom0 a bounded part of its time however it asks.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import structlog
import trio

from xshmd.api import PartCopier
from xshmd.errors import (
    Conflict,
    NoSuchGuest,
    NoSuchList,
    NoSuchRegion,
    OutOfRange,
    QuotaExceeded,
    UsageError,
    XshmError,
)
from xshmd.ranges import ByteRange, Part, nr_bytes_of
from xshmd.share import request_page
from xshmd.share.lists import Direction
from xshmd.share.request_page import Operation, Request
from xshmd.share.scatter import Scatter
from xshmd.units import PAGE_SIZE

log = structlog.get_logger()

MAX_PAGES: Final = 64
"""Request pages that are open, at the most."""
MAX_REQUEST_BYTES: Final = 1 << 20
"""Bytes that a guest may have copied by one request: others wait for as long as that takes."""
LEAST_S: Final = 0.01
MOST_S: Final = 0.32
"""How often the pages are looked at: one request of each at a time, seldom if there are none and
nobody rings."""


@dataclasses.dataclass(slots=True)
class _Page:
    region_id: str
    guest: str
    generation: str
    offset_bytes: int
    answered: int = 0
    is_open: bool = False
    """Whether what stood in it before is gone: that was no request."""

    def part(self, at: int, nr_bytes: int) -> Part:
        """Return some bytes of the page."""
        here = ByteRange(self.offset_bytes + at, nr_bytes)
        return Part(guest=self.guest, generation=self.generation, ranges=(here,))


class Mediator:
    """The request pages of guests.

    Args:
        scatter: What does what they ask for.
        copier: The way into their pages.
    """

    def __init__(self, scatter: Scatter, copier: PartCopier) -> None:
        self._scatter, self._copier = scatter, copier
        self._pages: dict[tuple[str, str], _Page] = {}
        self._opened = trio.Event()
        self._rung = trio.Event()

    @property
    def nr_pages(self) -> int:
        """How many pages are open."""
        return len(self._pages)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer requests, for ever."""
        task_status.started()
        interval_s = LEAST_S
        while True:
            if not self._pages:
                self._opened = trio.Event()
                await self._opened.wait()
            pages = [page for page in self._pages.values() if page.is_open]
            asked = [await self._look(page) for page in pages]
            interval_s = LEAST_S if any(asked) else min(MOST_S, 2 * interval_s)
            await trio.sleep(LEAST_S)
            with trio.move_on_after(interval_s - LEAST_S):
                await self._rung.wait()
                interval_s = LEAST_S
            self._rung = trio.Event()

    def hasten(self, region_id: str) -> None:
        """Look at once: a guest that has this region has rung."""
        if any(page.region_id == region_id for page in self._pages.values()):
            self._rung.set()

    # -- opening and closing --------------------------------------------------------------------

    async def open(self, region_id: str, guest: str, offset_bytes: int) -> None:
        """Let a guest ask, in a page of its part of a region.  What is in the page is lost.

        Args:
            region_id: The region.
            guest: Name or domid of the guest.
            offset_bytes: Where in the guest's part the page begins.

        Raises:
            NoSuchRegion, NoSuchGuest: it is not there, or the guest has no part in it.
            OutOfRange: no page begins there, or not in the guest's part.
            Refused: the guest may only read.
            Conflict: it has a page in this region already.
            QuotaExceeded: there are too many pages.
        """
        if offset_bytes % PAGE_SIZE:
            raise OutOfRange(f"no page begins at {offset_bytes}", hint="say a multiple of 4096")
        member = self._scatter.member(region_id, guest)
        key = region_id, member.generation
        if key in self._pages:
            raise Conflict(
                f"guest {member.name} has a request page in region {region_id}",
                hint="close that one first",
            )
        if len(self._pages) >= MAX_PAGES:
            raise QuotaExceeded(f"{MAX_PAGES} request pages are open", limit=MAX_PAGES)
        page = _Page(region_id, member.name, member.generation, offset_bytes)
        self._pages[key] = page
        try:
            await self._write(page, len(request_page.MAGIC), request_page.EMPTY)
            await self._write(page, 0, request_page.MAGIC)
        except BaseException:
            self._pages.pop(key, None)
            raise
        page.is_open = True
        self._opened.set()

    def close(self, region_id: str, guest: str) -> None:
        """Answer a guest's requests no more.

        Raises:
            NoSuchGuest: it has no page there.
        """
        for key, page in self._pages.items():
            if page.region_id == region_id and page.guest == guest:
                del self._pages[key]
                return
        raise NoSuchGuest(f"guest {guest} has no request page in region {region_id}", guest=guest)

    # -- answering ------------------------------------------------------------------------------

    async def _look(self, page: _Page) -> bool:
        """Answer the newest request of a page; return whether there was one."""
        try:
            part = page.part(0, request_page.READ_BYTES)
            data = await self._copier.read_part(page.region_id, part)
            request = request_page.newest(data, page.answered)
            if request is None:
                return False
            status, result = await self._answer(page, request)
            page.answered = request.number
            for at, piece in request_page.answer(request.number, status, result):
                await self._write(page, at, piece)
            await self._copier.wake_part(page.region_id, part)
        except (NoSuchGuest, NoSuchRegion):
            self._pages.pop((page.region_id, page.generation), None)
            return False
        except XshmError as error:
            log.warning("request page not served", guest=page.guest, reason=error.one_line())
            return False
        return True

    async def _write(self, page: _Page, at: int, data: bytes) -> None:
        await self._copier.write_part(page.region_id, page.part(at, len(data)), data)

    async def _answer(self, page: _Page, request: Request) -> tuple[int, int]:
        """Do what is asked for; return its status and its result."""
        try:
            return 0, await self._do(page, request)
        except XshmError as error:
            log.debug(
                "request refused", guest=page.guest, region=page.region_id, reason=error.one_line()
            )
            return request_page.status_of(error), 0

    async def _do(self, page: _Page, request: Request) -> int:
        if nr_bytes_of(request.ranges) > MAX_REQUEST_BYTES:
            raise UsageError(f"guest {page.guest} asks for too many bytes at a time")
        region_id, who, ranges = page.region_id, page.generation, request.ranges
        match request.operation:
            case Operation.REGISTER_INPUT | Operation.REGISTER_OUTPUT:
                into = request.operation is Operation.REGISTER_INPUT
                return self._scatter.register(
                    region_id, who, Direction.INPUT if into else Direction.OUTPUT, ranges,
                    count_at=request.count_at,
                )  # fmt: skip
            case Operation.TRANSFER_OUTPUT | Operation.TRANSFER_INPUT:
                out = request.operation is Operation.TRANSFER_OUTPUT
                return await self._scatter.transfer(
                    region_id, who, None, Direction.OUTPUT if out else Direction.INPUT, ranges,
                    list_id=request.list_id or None,
                )  # fmt: skip
            case Operation.UNREGISTER:
                self._unregister(page, request.list_id)
                return 0
            case None:
                raise UsageError(f"guest {page.guest} asks for what there is not")

    def _unregister(self, page: _Page, list_id: int) -> None:
        for posted in self._scatter.lists():
            if (posted.list_id, posted.part.generation) == (list_id, page.generation):
                self._scatter.unregister(list_id)
                return
        raise NoSuchList(f"guest {page.guest} has posted no list {list_id}")
