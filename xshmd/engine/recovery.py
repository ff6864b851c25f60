# SPDX-License-Identifier: LGPL-2.1-or-later
"""Brings the world and the records together after a start, whatever the last life was cut off in.

Every step of the engine is written down before it is done, so each record says what *may* have been
done.  Here it is either finished later (the guest is handed back to the reconciler, marked to be
done again by removing first) or undone.  Domains without a record of ours are never touched.
"""

from __future__ import annotations

import dataclasses

import structlog

from xshmd.dom0_ports import Clock
from xshmd.engine import identity
from xshmd.engine.changes import Changes
from xshmd.engine.gate import Gate
from xshmd.engine.grants import Grants
from xshmd.engine.holders import NO_DOMAIN, Holders
from xshmd.engine.ledger import Ledger
from xshmd.engine.pauses import pause_count
from xshmd.engine.windows import Windows
from xshmd.engine.xen_worker import XenWorker
from xshmd.errors import Conflict, DomainGone
from xshmd.machine import DomainInfo
from xshmd.model import Guest, GuestState
from xshmd.policy.identity import is_holder_uuid
from xshmd.ports import Hypervisor

log = structlog.get_logger()


async def recover(
    xen: Hypervisor,
    worker: XenWorker,
    holders: Holders,
    ledger: Ledger,
    gate: Gate,
    grants: Grants,
    windows: Windows,
    changes: Changes,
    clock: Clock,
) -> None:
    """Make the ledger true.

    Guests left HELD, ATTACHING or MAPPING stay so, with exactly one pause of ours on them, for the
    reconciler to take on from the start of that step; the DOOMED likewise, for it to destroy.
    """
    domains = {info.domid: info for info in xen.domains()}
    await _recover_holders(holders, ledger)
    await windows.recover()  # first: whoever stands still for one may stand still for changes too
    await changes.give_pauses_back()
    await changes.settle()
    await _recover_regions(holders, ledger)
    for guest in ledger.guests:
        if guest.state is GuestState.REBOOTING:
            continue
        info = domains.get(guest.domid)
        if info is None or info.uuid != guest.uuid or info.dying:
            await _vanished(ledger, await grants.forget(guest), clock)
            continue
        gate.adopt(guest)
        if guest.state in (GuestState.ATTACHED, GuestState.DOOMED):
            continue
        if not await _hold_again(xen, worker, gate, guest, info):
            await _ran_on(ledger, guest)
        elif guest.state is GuestState.HELD and info.cpu_time_ns:
            gate.had_run.add(guest.generation)
    recorded = {holder.uuid for holder in ledger.holders}
    for info in domains.values():
        if is_holder_uuid(info.uuid) and info.uuid not in recorded and not info.dying:
            log.warning(
                "holder without a record left alone",
                domid=info.domid,
                reason="its guests keep their memory; when they have ended, `xl destroy` it",
            )


async def _recover_holders(holders: Holders, ledger: Ledger) -> None:
    for holder in ledger.holders:
        if holder.domid == NO_DOMAIN:
            await holders.destroy(holder)  # by UUID: it may have been made, nobody can have it
            continue
        try:
            holders.verify(holder)
        except Conflict as lost:
            log.error("holder lost", reason=lost.one_line())
            await holders.lose(holder)


async def _recover_regions(holders: Holders, ledger: Ledger) -> None:
    for region in ledger.regions:
        if any(ledger.holder(uuid) is None for uuid in region.holder_uuids):
            await holders.free_frames(region)
        elif not region.ready:
            await holders.free_region(region, reason="its making was cut off")


async def _vanished(ledger: Ledger, guest: Guest, clock: Clock) -> None:
    """It ended while nobody looked: perhaps to reboot, so its regions wait for it a while."""
    if guest.state is GuestState.ATTACHED:
        await ledger.put_guest(
            dataclasses.replace(guest, state=GuestState.REBOOTING, ended_at=clock.uptime())
        )
    elif guest.state is not GuestState.DOOMED:  # whose leftovers the first look removes
        await ledger.drop_guest(guest.generation)


async def _hold_again(
    xen: Hypervisor, worker: XenWorker, gate: Gate, guest: Guest, info: DomainInfo
) -> bool:
    """Have exactly one pause of ours on the guest; return False if it is running.

    Whether the last life's pause was taken, or given back already, cannot be read from Xen's flags.
    The count can be found out, though: Xen allows 255 and refuses the next.
    """
    if not info.paused:
        return False
    gate.lock(guest)
    try:
        identity.verify(xen, guest)
        count = pause_count(xen, guest.domid)
        # Until libxl has stored the configuration, one of them is its own.
        ours = count if gate.creation_is_over(guest) else count - 1
        if ours < 1:
            xen.pause(guest.domid)
        for _ in range(ours - 1):
            # An earlier recovery was cut off in the middle of counting.
            xen.unpause(guest.domid)
    except DomainGone:
        gate.unlock(guest)  # the first look finds it gone
    return True


async def _ran_on(ledger: Ledger, guest: Guest) -> None:
    if guest.state is GuestState.MAPPING:
        # Unpausing it was the last thing done before its record would have said so.
        await ledger.put_guest(dataclasses.replace(guest, state=GuestState.ATTACHED))
        return
    await ledger.drop_guest(guest.generation)
    log.warning(
        "guest runs without its regions",
        guest=guest.name,
        domid=guest.domid,
        reason="it was started while xshmd was down; start it again",
    )
