# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interface ``io.xshmd.Regions`` as a thin skin over :class:`xshmd.ports.RegionsApi`.

It turns records into replies and calls into records.  Nothing is decided here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

import trio

from xshmd import __version__
from xshmd.config.guest import guest_config
from xshmd.errors import NoSuchRegion
from xshmd.model import (
    Arch,
    Guest,
    GuestConfig,
    GuestState,
    HostInfo,
    Region,
    RegionRequest,
    Snapshot,
)
from xshmd.policy.host import Finding, findings
from xshmd.ports import RegionsApi
from xshmd.units import PAGE_SIZE, DomId
from xshmd.varlink import idl, wire
from xshmd.varlink.dispatch import Dispatcher, Implementation, InvalidParameter, Method
from xshmd.varlink.wire import Parameters

INTERFACE: Final = "io.xshmd.Regions"
DEFAULT_WAIT_S: Final = 60
MAX_WAIT_S: Final = 3600


def dispatcher(api: RegionsApi) -> Dispatcher:
    """Return what answers the daemon's clients."""
    service = RegionsService(api)
    return Dispatcher(
        [Implementation(interface=idl.load(INTERFACE), methods=service.methods())],
        vendor="xshmd",
        product="xshmd",
        version=__version__,
        url="",
    )


class RegionsService:
    """Answers every method of the interface from one ``RegionsApi``."""

    def __init__(self, api: RegionsApi) -> None:
        self._api = api

    def methods(self) -> dict[str, Method]:
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
            "GetHost": Method(run=self._get_host),
            "Ping": Method(run=self._ping),
        }

    async def _list_regions(self, _parameters: Parameters) -> Parameters:
        snapshot = self._api.snapshot()
        regions = sorted(snapshot.regions, key=lambda region: region.region_id)
        return {"regions": [region_fields(region, snapshot) for region in regions]}

    async def _show_region(self, parameters: Parameters) -> Parameters:
        region_id = parameters["id"]
        snapshot = self._api.snapshot()
        for region in snapshot.regions:
            if region.region_id == region_id:
                return {"region": region_fields(region, snapshot)}
        known = [region.region_id for region in snapshot.regions]
        raise NoSuchRegion(
            f"there is no region {region_id}",
            hint=_did_you_mean(region_id, known) or "xshmctl list shows those there are",
            id=region_id,
        )

    async def _list_guests(self, _parameters: Parameters) -> Parameters:
        snapshot = self._api.snapshot()
        guests = sorted(snapshot.guests, key=lambda guest: (guest.name, guest.domid))
        return {"guests": [guest_fields(guest, snapshot) for guest in guests]}

    async def _declare_guest(self, parameters: Parameters) -> Parameters:
        # What xl makes of a configuration that says no type depends on the architecture.
        arch = (await self._api.host()).arch
        # In a thread: a megabyte of configuration must not keep everybody else waiting.
        config = await trio.to_thread.run_sync(
            _parsed, parameters["text"], parameters["file"], arch
        )
        await self._api.declare(config)
        return {
            "name": config.name,
            "regions": [request.region_id for request in config.requests],
        }

    async def _withdraw_guest(self, parameters: Parameters) -> Parameters:
        await self._api.withdraw(parameters["name"])
        return {}

    async def _wait_guest(self, parameters: Parameters) -> Parameters:
        timeout_s = parameters["timeoutSeconds"]
        if timeout_s is None:
            timeout_s = DEFAULT_WAIT_S
        if not 0 <= timeout_s <= MAX_WAIT_S:
            raise InvalidParameter("timeoutSeconds")
        guest = await self._api.wait_guest(parameters["name"], float(timeout_s))
        return {"guest": guest_fields(guest, self._api.snapshot())}

    async def _get_host(self, _parameters: Parameters) -> Parameters:
        return {"host": host_fields(await self._api.host())}

    async def _ping(self, _parameters: Parameters) -> Parameters:
        return {}


def _parsed(text: str, file: str, arch: Arch) -> GuestConfig:
    return guest_config(text, file=file, arch=arch)


def region_fields(region: Region, snapshot: Snapshot) -> Parameters:
    """Return a region as the interface's ``Region``."""
    members = [
        member_fields(guest, request)
        for guest in sorted(snapshot.guests, key=lambda guest: (guest.name, guest.domid))
        for request in guest.requests
        if request.region_id == region.region_id
    ]
    return {
        "id": region.region_id,
        "sizeBytes": region.size_bytes,
        "frameCount": region.nr_frames,
        "lifetime": region.lifetime.value,
        "owner": region.owner or None,
        "ready": region.ready,
        "holderUuid": region.holder_uuid,
        "holderDomainId": _holder_domid(region.holder_uuid, snapshot),
        "holderFirstFrame": region.holder_first_gfn,
        "members": members,
    }


def member_fields(guest: Guest, request: RegionRequest) -> Parameters:
    """Return a guest's part in a region as the interface's ``Member``."""
    return {
        "guest": guest.name,
        "domainId": _domid(guest),
        "state": guest.state.value,
        "role": request.role.value,
        "prot": request.prot.value,
        "firstFrame": request.first_gfn,
        "frameCount": request.nr_frames,
        "offsetFrames": request.offset_frames,
    }


def guest_fields(guest: Guest, snapshot: Snapshot) -> Parameters:
    """Return a guest as the interface's ``Guest``."""
    return {
        "name": guest.name,
        "uuid": guest.uuid,
        "domainId": _domid(guest),
        "state": guest.state.value,
        "holderDomainId": _holder_domid(guest.holder_uuid, snapshot),
        "regions": [request.region_id for request in guest.requests],
        "failure": guest.failure or None,
    }


def host_fields(host: HostInfo) -> Parameters:
    """Return the host, and what follows from it, as the interface's ``Host``."""
    return {
        "arch": host.arch.value,
        "xenVersion": host.xen_text,
        "xenCommandLine": host.xen_command_line,
        "hvm": host.has_hvm,
        "hap": host.has_hap,
        "freePages": host.free_pages,
        "totalPages": host.total_pages,
        "pageSize": PAGE_SIZE,
        "findings": [_finding_fields(finding) for finding in findings(host)],
    }


def _finding_fields(finding: Finding) -> Parameters:
    return {
        "topic": finding.topic,
        "verdict": finding.verdict.value,
        "text": finding.text,
        "hint": finding.hint or None,
    }


def _domid(guest: Guest) -> DomId | None:
    """Return the guest's domid unless its domain has ended: Xen may give that one to another."""
    return None if guest.state is GuestState.REBOOTING else guest.domid


def _holder_domid(uuid: str, snapshot: Snapshot) -> DomId | None:
    return next((holder.domid for holder in snapshot.holders if holder.uuid == uuid), None)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else ""
