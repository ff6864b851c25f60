# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interface's methods about lists and transfers, as a thin skin over ``share.scatter``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from xshmd.ranges import ByteRange
from xshmd.share.lists import Direction, PostedList
from xshmd.share.mediator import Mediator
from xshmd.share.scatter import DOM0, Scatter
from xshmd.varlink import wire
from xshmd.varlink.dispatch import InvalidParameter, Method, Stream
from xshmd.varlink.wire import Parameters

DEFAULT_WAIT_S: Final = 60
MAX_WAIT_S: Final = 3600


class ListMethods:
    """Answers them."""

    def __init__(self, scatter: Scatter, mediator: Mediator) -> None:
        self._scatter, self._mediator = scatter, mediator

    def methods(self) -> dict[str, Method | Stream]:
        """Return the method table, by the names of the interface definition."""
        return {
            "RegisterList": Method(run=self._register),
            "UnregisterList": Method(run=self._unregister),
            "AwaitList": Method(run=self._await, interruptible=True),
            "ListLists": Method(run=self._list),
            "OpenRequestPage": Method(run=self._open),
            "CloseRequestPage": Method(run=self._close),
            "Transfer": Method(run=self._transfer, max_call_bytes=wire.MAX_CALL_BYTES),
        }

    def counters(self) -> Mapping[str, int]:
        """Return how many lists wait, and what has been counted."""
        return {
            "lists_waiting": len(self._scatter.lists()),
            "request_pages": self._mediator.nr_pages,
            **self._scatter.counts,
        }

    async def _register(self, parameters: Parameters) -> Parameters:
        list_id = self._scatter.register(
            parameters["region"],
            _guest(parameters, "guest"),
            Direction(parameters["direction"]),
            _ranges(parameters),
            count_at=parameters["countOffsetBytes"],
        )
        return {"list": list_id}

    async def _unregister(self, parameters: Parameters) -> Parameters:
        self._scatter.unregister(parameters["list"])
        return {}

    async def _await(self, parameters: Parameters) -> Parameters:
        seconds = parameters["timeoutSeconds"]
        if seconds is None:
            seconds = DEFAULT_WAIT_S
        if not 0 <= seconds <= MAX_WAIT_S:
            raise InvalidParameter("timeoutSeconds")
        return {"byteCount": await self._scatter.wait(parameters["list"], float(seconds))}

    async def _list(self, _parameters: Parameters) -> Parameters:
        return {"lists": [_fields(posted) for posted in self._scatter.lists()]}

    async def _transfer(self, parameters: Parameters) -> Parameters:
        nr_bytes = await self._scatter.transfer(
            parameters["region"],
            _guest(parameters, "guest"),
            _guest(parameters, "peer"),
            Direction(parameters["direction"]),
            _ranges(parameters),
            list_id=parameters["list"],
        )
        return {"byteCount": nr_bytes}

    async def _open(self, parameters: Parameters) -> Parameters:
        await self._mediator.open(
            parameters["region"], _guest(parameters, "guest"), parameters["offsetBytes"]
        )
        return {}

    async def _close(self, parameters: Parameters) -> Parameters:
        member = self._scatter.member(parameters["region"], _guest(parameters, "guest"))
        self._mediator.close(parameters["region"], member.name)
        return {}


def _guest(parameters: Parameters, name: str) -> str:
    word: str | None = parameters[name]
    if word is None:
        return DOM0
    if word == DOM0:
        raise InvalidParameter(name)
    return word


def _ranges(parameters: Parameters) -> list[ByteRange]:
    return [ByteRange(each["offsetBytes"], each["byteCount"]) for each in parameters["ranges"]]


def _fields(posted: PostedList) -> dict[str, Any]:
    return {
        "list": posted.list_id,
        "region": posted.region_id,
        "guest": posted.part.guest or None,
        "direction": posted.direction.value,
        "byteCount": posted.nr_bytes,
    }
