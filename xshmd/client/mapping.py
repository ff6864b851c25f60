# SPDX-License-Identifier: LGPL-2.1-or-later
"""Maps a leased region into this process, and gives it out as bytes that cannot outlive it.

The seam for other ways to map: what serves a transport is a function in ``MAPPERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, Protocol

from xshmd.client.ranges import Part, Whereabouts
from xshmd.errors import Conflict, Refused
from xshmd.machine import DomainInfo
from xshmd.units import DomId, Gfn
from xshmd.xen.hypervisor import XenHypervisor


class Pages(Protocol):
    """Mapped frames; see :class:`xshmd.xen.hypervisor.MappedPages`."""

    def into_view(self, on_unmapped: Callable[[], None]) -> memoryview: ...

    def close(self) -> None: ...


class Xen(Protocol):
    """What is needed of Xen."""

    def map_pages(
        self, domid: DomId, first_gfn: Gfn, nr_frames: int, *, writable: bool
    ) -> Pages: ...

    def domain_info(self, domid: DomId) -> DomainInfo | None: ...

    def close(self) -> None: ...


Opener = Callable[[], Xen]
Mapper = Callable[[Opener, Whereabouts, Part, bool, Callable[[], None]], memoryview]


def open_xen() -> Xen:
    """Open Xen's libraries; XenUnavailable where there is none."""
    return XenHypervisor()


def map_frames(
    opener: Opener, where: Whereabouts, part: Part, writable: bool, on_unmapped: Callable[[], None]
) -> memoryview:
    """Map a holder's frames, and prove that they are that holder's.

    The mapping pins the domid, so a domain that has the holder's handle *after* it was made is the
    domain that was mapped (rule 2 of the design: never act on a remembered domid).

    Args:
        opener: Gives a connection to Xen, which lives as long as the memory.
        where: The region's memory.
        part: What to map of it.
        writable: Whether it may be written to; if not, a write ends the process.
        on_unmapped: Called once nothing is mapped any more, by whichever thread drops the last
            view.

    Raises:
        Conflict: the holder is not there any more.
        HypercallFailed, XenUnavailable: it cannot be mapped.
    """
    domid = DomId(where.holder_domid)
    xen = opener()
    try:
        pages = xen.map_pages(
            domid, Gfn(where.first_gfn + part.first_frame), part.nr_frames, writable=writable
        )
        info = xen.domain_info(domid)
        if info is None or info.uuid != where.holder_uuid or info.dying:
            pages.close()
            raise Conflict(
                f"domain {domid} is not the holder {where.holder_uuid} any more",
                hint="the region is lost, or was made anew: ask for it again",
                domid=domid,
            )
    except BaseException:
        xen.close()
        raise

    def unmapped() -> None:
        xen.close()
        on_unmapped()

    return pages.into_view(unmapped)[part.skip_bytes : part.skip_bytes + part.nr_bytes]


MAPPERS: Final[Mapping[str, Mapper]] = MappingProxyType(
    {"physmap": map_frames, "grant": map_frames}
)
"""By transport: who maps a region into guests is nothing to dom0, which may map any frame."""


def mapper_for(where: Whereabouts) -> Mapper:
    """Return what maps this region; Refused if nothing does."""
    mapper = MAPPERS.get(where.transport)
    if mapper is None:
        raise Refused(
            f"a region with transport={where.transport} cannot be mapped by this library",
            hint="read and write it with `xshmctl dump` and `xshmctl load`",
        )
    return mapper
