# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a daemon knows: its regions, and how a program comes to have one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

from xshmd.client import lists
from xshmd.client.lease import Lease
from xshmd.client.lists import DOM0, PostedList, Ranges
from xshmd.client.mapping import Opener, open_xen
from xshmd.client.watches import Watch
from xshmd.errors import UsageError
from xshmd.model import Lifetime, Prot
from xshmd.varlink.client import DEFAULT_PATH, Client

DEFAULT_TIMEOUT_S: Final = 30.0


def connect(
    path: str = DEFAULT_PATH, *, timeout_s: float = DEFAULT_TIMEOUT_S, xen: Opener = open_xen
) -> Connection:
    """Return a connection to the daemon, which is made when it is first used.

    Args:
        path: The daemon's socket.
        timeout_s: How long any one question may take.
        xen: Opens what memory is mapped with; called at each mapping.
    """
    return Connection(path, timeout_s=timeout_s, xen=xen)


class Connection:
    """What a daemon knows.  Use it with ``with``, or close it.

    Synchronization: none; use one per thread.
    """

    def __init__(self, path: str, *, timeout_s: float, xen: Opener) -> None:
        self._path, self._timeout_s, self._xen = path, timeout_s, xen
        self._client = Client(path, timeout_s)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; leases have connections of their own, and go on."""
        self._client.close()

    def regions(self) -> tuple[Region, ...]:
        """Return every region there is, sorted by id.

        Raises:
            DaemonUnreachable: nobody answers.
        """
        reply = self._client.call("ListRegions")
        return tuple(Region(self, fields) for fields in reply["regions"])

    def region(self, region_id: str) -> Region:
        """Return one region.

        Raises:
            NoSuchRegion: there is none of this id.
            DaemonUnreachable: nobody answers.
        """
        return Region(self, self._client.call("ShowRegion", id=region_id)["region"])

    def lease(self, region_id: str, prot: Prot | str = Prot.RO) -> Lease:
        """Become a member of a region; see :meth:`Region.attach`."""
        return Lease(
            region_id, _prot(prot), path=self._path, timeout_s=self._timeout_s, xen=self._xen
        )

    def watch(self, region_id: str, offset_bytes: int, counter_offset_bytes: int | None) -> Watch:
        """Watch a byte of a region; see :meth:`Region.watch`."""
        return Watch(
            region_id, offset_bytes, counter_offset_bytes,
            path=self._path, timeout_s=self._timeout_s,
        )  # fmt: skip

    def trigger(self, region_id: str, offset_bytes: int) -> int:
        """Wake whoever watches a byte of a region; see :meth:`Region.trigger`."""
        reply = self._client.call("Trigger", id=region_id, offsetBytes=offset_bytes)
        return int(reply["woken"])

    def post_list(
        self, region_id: str, direction: str, ranges: Ranges, *, guest: str = DOM0,
        count_offset_bytes: int | None = None,
    ) -> PostedList:  # fmt: skip
        """Put up bytes of a guest to be filled or fetched; see :meth:`Region.post_list`."""
        return lists.post(
            self._client, self._timeout_s, region_id, direction, ranges, guest, count_offset_bytes
        )

    def transfer(
        self, region_id: str, direction: str, ranges: Ranges, *, guest: str = DOM0,
        peer: str = DOM0, posted: PostedList | None = None,
    ) -> int:  # fmt: skip
        """Move bytes by a list that is posted; see :meth:`Region.transfer`."""
        return lists.transfer(self._client, region_id, direction, ranges, guest, peer, posted)


class Region:
    """A region as it was when it was asked for."""

    def __init__(self, connection: Connection, fields: Mapping[str, Any]) -> None:
        self._connection = connection
        self.id: str = fields["id"]
        self.size_bytes: int = fields["sizeBytes"]
        self.lifetime = Lifetime(fields["lifetime"])
        self.owner: str = fields.get("owner") or ""
        """Name of the guest that owns it; empty: it is the system's."""
        self.members: tuple[str, ...] = tuple(one["guest"] for one in fields["members"])
        """Names of the guests that have it or are awaited."""
        self.processes: tuple[int, ...] = tuple(
            one["processId"] for one in fields.get("leases") or ()
        )
        """The processes of the control domain that have a lease of it."""

    def __repr__(self) -> str:
        return f"<Region {self.id}, {self.size_bytes} bytes>"

    def attach(self, prot: Prot | str = Prot.RO) -> Lease:
        """Become a member of the region in the control domain.

        Args:
            prot: ``ro`` or ``rw``.

        Raises:
            NoSuchRegion, Conflict, Refused: it is gone, or cannot be had this way or now.
            DaemonUnreachable: nobody answers.
        """
        return self._connection.lease(self.id, prot)

    def watch(self, offset_bytes: int, *, counter_offset_bytes: int | None = None) -> Watch:
        """Watch a byte of the region, which has to have doorbells.  Use it with ``with``.

        Args:
            offset_bytes: Which byte.
            counter_offset_bytes: An aligned 32-bit word of the region that each trigger
                decrements: the watch wakes when that becomes 0.  None: it wakes each time.

        Raises:
            UsageError: one of the two is not in the region.
            NoSuchRegion, Conflict, Refused: it is gone, or cannot be watched.
            DaemonUnreachable: nobody answers.
        """
        return self._connection.watch(self.id, offset_bytes, counter_offset_bytes)

    def trigger(self, offset_bytes: int) -> int:
        """Wake whoever watches a byte of the region, guests and programs; return how many were.

        Raises:
            UsageError, NoSuchRegion, Conflict, Refused, DaemonUnreachable: as :meth:`watch`.
        """
        return self._connection.trigger(self.id, offset_bytes)

    @contextlib.contextmanager
    def map(
        self, prot: Prot | str = Prot.RO, *, offset_bytes: int = 0, size_bytes: int | None = None
    ) -> Iterator[memoryview]:
        """Attach, and map the region or a part of it for the body; see :meth:`Lease.map`."""
        with (
            self.attach(prot) as lease,
            lease.map(offset_bytes=offset_bytes, size_bytes=size_bytes) as memory,
        ):
            yield memory

    def post_list(
        self, direction: str, ranges: Ranges, *, guest: str = DOM0,
        count_offset_bytes: int | None = None,
    ) -> PostedList:  # fmt: skip
        """Put up bytes of a guest's part of the region for a transfer to fill or to fetch.

        Args:
            direction: ``input`` if they are to be filled, ``output`` if they are to be fetched.
            ranges: Offset in the guest's part and number of bytes of each range.
            guest: Name or domain id of the guest; empty: dom0, which has all of the region.
            count_offset_bytes: Where in that part a 64-bit word gets the number of bytes.

        Raises:
            NoSuchRegion, NoSuchGuest, OutOfRange, UsageError, Conflict, Refused, QuotaExceeded:
                docs/scatter.md says when.
        """
        return self._connection.post_list(
            self.id, direction, ranges, guest=guest, count_offset_bytes=count_offset_bytes
        )

    def transfer(
        self, direction: str, ranges: Ranges, *, guest: str = DOM0, peer: str = DOM0,
        posted: PostedList | None = None,
    ) -> int:  # fmt: skip
        """Move bytes between a guest's part of the region and a list of its peer's.

        Args:
            direction: ``output`` into a list for input, ``input`` from one for output.
            ranges: Offset in the guest's part and number of bytes of each range.
            guest: Name or domain id of the guest; empty: dom0.
            peer: The same of the one whose list is used.
            posted: That list and no other; the oldest that fits if None.

        Returns:
            How many bytes were moved: those of the shorter of the two.

        Raises:
            NoSuchList, ListCancelled, NoSuchRegion, NoSuchGuest, OutOfRange, UsageError, Conflict,
                Refused: docs/scatter.md says when.
        """
        return self._connection.transfer(
            self.id, direction, ranges, guest=guest, peer=peer, posted=posted
        )


def _prot(prot: Prot | str) -> Prot:
    try:
        return Prot(prot)
    except ValueError:
        raise UsageError(f"there is no prot {prot!r}", hint="say ro or rw") from None
