# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interface ``io.xshmd.Regions`` as a thin skin over :class:`xshmd.api.RegionsApi`.

It turns records into replies and calls into records.  Nothing is decided here.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

import trio

from xshmd import __version__
from xshmd.api import RegionsApi
from xshmd.changes import AddRegion, AttachRegion, Change, DetachRegion, RemoveRegion
from xshmd.config.guest import guest_config
from xshmd.daemon.processes import ProcProcesses
from xshmd.daemon.replies import host_fields, status_fields
from xshmd.errors import ConfigUnreadable, NoSuchRegion
from xshmd.events import Event
from xshmd.machine import Arch
from xshmd.model import GuestConfig, Prot
from xshmd.units import human_size
from xshmd.varlink import caller, idl, records, wire
from xshmd.varlink.dispatch import (
    Dispatcher,
    Emit,
    Implementation,
    InvalidParameter,
    Method,
    Stream,
)
from xshmd.varlink.wire import Parameters

INTERFACE: Final = "io.xshmd.Regions"
DEFAULT_WAIT_S: Final = 60
MAX_WAIT_S: Final = 3600
MAX_MONITOR_S: Final = 86400


class MethodTable(Protocol):
    """Answers some methods of the interface."""

    def methods(self) -> dict[str, Method | Stream]: ...

    def counters(self) -> Mapping[str, int]:
        """Return what Status is to say besides the engine's counters, by name."""
        ...


def dispatcher(api: RegionsApi, *others: MethodTable) -> Dispatcher:
    """Return what answers the daemon's clients: about regions from ``api``, and about the rest."""
    methods = RegionsService(api, others).methods()
    for other in others:
        methods |= other.methods()
    return Dispatcher(
        [Implementation(interface=idl.load(INTERFACE), methods=methods)],
        vendor="xshmd",
        product="xshmd",
        version=__version__,
        url="",
    )


class RegionsService:
    """Answers every method about regions and guests from one ``RegionsApi``."""

    def __init__(self, api: RegionsApi, others: Sequence[MethodTable] = ()) -> None:
        self._api, self._others = api, others
        self._processes = ProcProcesses()
        self._reading = trio.CapacityLimiter(1)

    def methods(self) -> dict[str, Method | Stream]:
        """Return the method table, by the names of the interface definition."""
        return {
            "ListRegions": Method(run=self._list_regions),
            "ShowRegion": Method(run=self._show_region),
            "ListGuests": Method(run=self._list_guests),
            "DeclareGuest": Method(
                run=self._declare_guest, max_call_bytes=wire.MAX_LARGE_CALL_BYTES
            ),
            "WithdrawGuest": Method(run=self._withdraw_guest),
            "WaitGuest": Method(run=self._wait_guest, interruptible=True),
            "AddRegion": Method(run=self._add_region),
            "RemoveRegion": Method(run=self._remove_region),
            "Attach": Method(run=self._attach, max_call_bytes=wire.MAX_LARGE_CALL_BYTES),
            "Detach": Method(run=self._detach, max_call_bytes=wire.MAX_LARGE_CALL_BYTES),
            "Apply": Method(run=self._apply, max_call_bytes=wire.MAX_LARGE_CALL_BYTES),
            "Reload": Method(run=self._reload),
            "ReadRegion": Method(run=self._read_region, interruptible=True),
            "WriteRegion": Method(run=self._write_region, max_call_bytes=wire.MAX_LARGE_CALL_BYTES),
            "LeaseRegion": Stream(run=self._lease_region),
            "Trigger": Method(run=self._trigger),
            "Watch": Stream(run=self._watch),
            "Monitor": Stream(run=self._monitor),
            "Status": Method(run=self._status),
            "GetHost": Method(run=self._get_host),
            "Ping": Method(run=self._ping),
        }

    # -- what there is --------------------------------------------------------------------------

    async def _list_regions(self, _parameters: Parameters) -> Parameters:
        return {"regions": records.state_fields(self._api.snapshot())["regions"]}

    async def _show_region(self, parameters: Parameters) -> Parameters:
        region_id = parameters["id"]
        snapshot = self._api.snapshot()
        for region in snapshot.regions:
            if region.region_id == region_id:
                return {"region": records.region_fields(region, snapshot)}
        known = [region.region_id for region in snapshot.regions]
        raise NoSuchRegion(
            f"there is no region {region_id}",
            hint=_did_you_mean(region_id, known) or "xshmctl list shows those there are",
            id=region_id,
        )

    async def _list_guests(self, _parameters: Parameters) -> Parameters:
        return {"guests": records.state_fields(self._api.snapshot())["guests"]}

    async def _status(self, _parameters: Parameters) -> Parameters:
        counters = dict(self._api.statistics())
        for other in self._others:
            counters |= other.counters()
        status = status_fields(self._api.snapshot(), counters)
        return {"status": status}

    async def _monitor(self, parameters: Parameters, emit: Emit) -> Parameters:
        timeout_s = _seconds(parameters, "timeoutSeconds", MAX_MONITOR_S)
        deadline = math.inf if timeout_s is None else trio.current_time() + timeout_s
        resync: bool | None = None
        while True:
            async with self._api.monitor() as events:
                state = records.state_fields(self._api.snapshot())
                await emit({"state": state, "resync": resync})
                with contextlib.suppress(trio.EndOfChannel):
                    while (event := await _received(events, deadline)) is not None:
                        await emit({"event": records.event_fields(event)})
                    return {}
            resync = True

    # -- a guest that is about to be made -------------------------------------------------------

    async def _declare_guest(self, parameters: Parameters) -> Parameters:
        text, file = parameters["text"], parameters["file"]
        if len(text) > wire.MAX_CONFIG_BYTES:
            raise ConfigUnreadable(
                f"{file}: {human_size(len(text))} are too much for a guest's configuration",
                hint="is it another file that you meant?",
                file=file,
            )
        # What xl makes of a configuration that says no type depends on the architecture.
        arch = (await self._api.host()).arch
        # In a thread, one at a time: a megabyte of configuration must not keep everybody else
        # waiting, nor several of them take the memory that is needed to read one.
        config = await trio.to_thread.run_sync(_parsed, text, file, arch, limiter=self._reading)
        config = await self._api.declare(config)
        return {
            "name": config.name,
            "regions": [request.region_id for request in config.requests],
        }

    async def _withdraw_guest(self, parameters: Parameters) -> Parameters:
        await self._api.withdraw(parameters["name"])
        return {}

    async def _wait_guest(self, parameters: Parameters) -> Parameters:
        timeout_s = _seconds(parameters, "timeoutSeconds", MAX_WAIT_S)
        if timeout_s is None:
            timeout_s = DEFAULT_WAIT_S
        name = self._guest_name(parameters["name"])
        guest = await self._api.wait_guest(name, float(timeout_s))
        return {"guest": records.guest_fields(guest, self._api.snapshot())}

    def _guest_name(self, word: str) -> str:
        """Return the name of the guest that a name or a domid means; the word if none is known."""
        guests = self._api.snapshot().guests
        if any(guest.name == word for guest in guests):
            return word
        named = (guest.name for guest in guests if str(records.guest_domid(guest)) == word)
        return next(named, word)

    # -- changes --------------------------------------------------------------------------------

    async def _add_region(self, parameters: Parameters) -> Parameters:
        change = AddRegion(config=records.definition_from(parameters["region"]))
        return await self._changed([change], parameters)

    async def _remove_region(self, parameters: Parameters) -> Parameters:
        change = RemoveRegion(region_id=parameters["id"], force=bool(parameters["force"]))
        return await self._changed([change], parameters)

    async def _attach(self, parameters: Parameters) -> Parameters:
        guest = parameters["guest"]
        return await self._changed(
            [
                AttachRegion(guest=guest, request=records.entry_from(entry))
                for entry in parameters["entries"]
            ],
            parameters,
        )

    async def _detach(self, parameters: Parameters) -> Parameters:
        guest = parameters["guest"]
        return await self._changed(
            [DetachRegion(guest=guest, region_id=each) for each in parameters["regions"]],
            parameters,
        )

    async def _apply(self, parameters: Parameters) -> Parameters:
        changes = [records.change_from(change) for change in parameters["changes"]]
        return await self._changed(changes, parameters)

    async def _changed(self, changes: list[Change], parameters: Parameters) -> Parameters:
        steps = await self._api.apply(changes, dry_run=bool(parameters["dryRun"]))
        return records.steps_fields(steps)

    async def _reload(self, parameters: Parameters) -> Parameters:
        steps = await self._api.reload(dry_run=bool(parameters["dryRun"]))
        return records.steps_fields(steps)

    # -- a region's bytes -----------------------------------------------------------------------

    async def _read_region(self, parameters: Parameters) -> Parameters:
        data = await self._api.read_region(
            parameters["id"], parameters["offsetBytes"], parameters["byteCount"]
        )
        return {"data": base64.b64encode(data).decode("ascii")}

    async def _write_region(self, parameters: Parameters) -> Parameters:
        try:
            data = base64.b64decode(parameters["data"], validate=True)
        except (binascii.Error, ValueError):
            raise InvalidParameter("data") from None
        await self._api.write_region(
            parameters["id"], parameters["offsetBytes"], data, dry_run=bool(parameters["dryRun"])
        )
        return {}

    async def _lease_region(self, parameters: Parameters, emit: Emit) -> Parameters:
        peer = caller.current().peer
        process = self._processes.describe(peer.pid, peer.uid)
        prot = Prot(parameters["prot"] or Prot.RO)
        async with self._api.lease(parameters["id"], prot, process) as held:
            await emit({"mapping": self._mapping(parameters["id"])})
            await emit({"ending": await held.wait_ending()})
            await trio.sleep_forever()  # until the client has unmapped it and closes the connection

    def _mapping(self, region_id: str) -> Parameters:
        snapshot = self._api.snapshot()
        region = next(one for one in snapshot.regions if one.region_id == region_id)
        holder = next(one for one in snapshot.holders if one.uuid == region.holder_uuid)
        return records.mapping_fields(region, holder.domid)

    # -- peers ----------------------------------------------------------------------------------

    async def _trigger(self, parameters: Parameters) -> Parameters:
        return {"woken": await self._api.trigger(parameters["id"], parameters["offsetBytes"])}

    async def _watch(self, parameters: Parameters, emit: Emit) -> Parameters:
        async with self._api.watch(
            parameters["id"], parameters["offsetBytes"], parameters["counterOffsetBytes"]
        ) as triggers:
            await emit({"triggered": False})
            async for _ in triggers:
                await emit({"triggered": True})
        return {"triggered": True}

    # -- the machine ----------------------------------------------------------------------------

    async def _get_host(self, _parameters: Parameters) -> Parameters:
        return {"host": host_fields(await self._api.host())}

    async def _ping(self, _parameters: Parameters) -> Parameters:
        return {}


def _parsed(text: str, file: str, arch: Arch) -> GuestConfig:
    return guest_config(text, file=file, arch=arch)


async def _received(events: trio.MemoryReceiveChannel[Event], deadline: float) -> Event | None:
    """Return the next event, or None at the deadline; no reply is ever cut off by it."""
    with trio.CancelScope(deadline=deadline):
        return await events.receive()
    return None


def _seconds(parameters: Parameters, name: str, most: int) -> int | None:
    """Return a time that was given, checked, or None."""
    seconds: int | None = parameters[name]
    if seconds is not None and not 0 <= seconds <= most:
        raise InvalidParameter(name)
    return seconds


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else ""
