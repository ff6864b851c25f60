# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lists and transfers (docs/scatter.md) for programs that see to what guests exchange."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

from xshmd.varlink.client import Client

MAX_WAIT_S: Final = 3600
DOM0: Final = ""
"""The control domain among the guests: it has every region, and all of it."""

Ranges = Iterable[tuple[int, int]]
"""Offset in the guest's part of the region, and number of bytes, of each range."""


class PostedList:
    """Bytes of a guest that wait for a transfer; they stay posted when this is forgotten.

    Synchronization: as the connection that it was posted with.
    """

    def __init__(self, client: Client, timeout_s: float, list_id: int) -> None:
        self._client, self._timeout_s = client, timeout_s
        self.list_id = list_id

    def __repr__(self) -> str:
        return f"<PostedList {self.list_id}>"

    def wait(self, timeout_s: float = 60.0) -> int:
        """Return how many bytes were moved, once a transfer has used the list.

        Args:
            timeout_s: How long to wait, in whole seconds, an hour at the most; 0 only looks.

        Raises:
            TimedOut: none has used it yet.
            ListCancelled: it was unregistered, or its guest left the region.
            NoSuchList: it was used too long ago, or by another life of the daemon.
        """
        seconds = min(MAX_WAIT_S, max(0, math.ceil(timeout_s)))
        reply = self._client.call_within(
            seconds + self._timeout_s, "AwaitList", list=self.list_id, timeoutSeconds=seconds
        )
        return int(reply["byteCount"])

    def cancel(self) -> None:
        """Take the list back.

        Raises:
            NoSuchList: it is done, or was cancelled.
            Conflict: a transfer is at work on it.
        """
        self._client.call("UnregisterList", list=self.list_id)


def post(
    client: Client,
    timeout_s: float,
    region_id: str,
    direction: str,
    ranges: Ranges,
    guest: str,
    count_offset_bytes: int | None,
) -> PostedList:
    """Do as :meth:`xshmd.client.Region.post_list`."""
    reply = client.call(
        "RegisterList", region=region_id, guest=guest or None, direction=direction,
        ranges=_fields(ranges), countOffsetBytes=count_offset_bytes,
    )  # fmt: skip
    return PostedList(client, timeout_s, reply["list"])


def transfer(
    client: Client,
    region_id: str,
    direction: str,
    ranges: Ranges,
    guest: str,
    peer: str,
    posted: PostedList | None,
) -> int:
    """Do as :meth:`xshmd.client.Region.transfer`."""
    reply = client.call(
        "Transfer", region=region_id, guest=guest or None, peer=peer or None, direction=direction,
        ranges=_fields(ranges), list=posted.list_id if posted else None,
    )  # fmt: skip
    return int(reply["byteCount"])


def _fields(ranges: Ranges) -> list[dict[str, Any]]:
    return [{"offsetBytes": offset, "byteCount": number} for offset, number in ranges]
