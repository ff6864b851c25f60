# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the model says of event channels, said of Xen: the same cases on both.

They are played on a guest that does nothing, as ``python3 -m tests.contract.event_cases DOMID`` in
dom0; each leaves ports behind, which only a guest itself can close.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

import trio

from xshmd.errors import DomainGone, HypercallFailed, XshmError
from xshmd.ports import EventChannels, PortStatus
from xshmd.units import DOMID_0, DomId
from xshmd.xen.event_channels import XenEventChannels

from .host import Wrong, equal, expect, raises

Case = Callable[[EventChannels, DomId], None]
CASES: list[tuple[str, Case]] = []
NOBODY = DomId(0x7FEF)


def case(function: Case) -> Case:
    """Add a case under its function's name."""
    CASES.append((function.__name__, function))
    return function


@case
def a_new_port_is_the_lowest_free_one(channels: EventChannels, guest: DomId) -> None:
    free = next(port for port in range(1, 4096) if channels.status(guest, port) is None)
    equal(channels.allocate(guest, DOMID_0), free, "port")
    expect(channels.allocate(guest, DOMID_0) > free, "the next one is above")


@case
def a_port_waits_for_whom_it_is(channels: EventChannels, guest: DomId) -> None:
    port = channels.allocate(guest, DOMID_0)
    equal(channels.status(guest, port), PortStatus(DOMID_0, 0), "status")


@case
def port_0_and_those_never_used_are_closed(channels: EventChannels, guest: DomId) -> None:
    equal(channels.status(guest, 0), None, "port 0")
    equal(channels.status(guest, 100_000), None, "a port beyond all")


@case
def a_bound_port_knows_its_line(channels: EventChannels, guest: DomId) -> None:
    port = channels.allocate(guest, DOMID_0)
    line = channels.bind(guest, port)
    equal(channels.status(guest, port), PortStatus(DOMID_0, line), "status")
    channels.unbind(line)


@case
def an_unbound_line_leaves_the_port_waiting(channels: EventChannels, guest: DomId) -> None:
    port = channels.allocate(guest, DOMID_0)
    channels.unbind(channels.bind(guest, port))
    equal(channels.status(guest, port), PortStatus(DOMID_0, 0), "status")
    channels.unbind(channels.bind(guest, port))


@case
def a_port_is_bound_once(channels: EventChannels, guest: DomId) -> None:
    port = channels.allocate(guest, DOMID_0)
    line = channels.bind(guest, port)
    with raises(HypercallFailed, errno.EINVAL):
        channels.bind(guest, port)
    channels.unbind(line)


@case
def a_closed_port_cannot_be_bound(channels: EventChannels, guest: DomId) -> None:
    free = next(port for port in range(1, 4096) if channels.status(guest, port) is None)
    with raises(HypercallFailed, errno.EINVAL):
        channels.bind(guest, free)


@case
def another_domains_port_cannot_be_bound(channels: EventChannels, guest: DomId) -> None:
    port = channels.allocate(guest, guest)
    equal(channels.status(guest, port), PortStatus(guest, 0), "status")
    with raises(HypercallFailed, errno.EINVAL):
        channels.bind(guest, port)


@case
def nobody_has_ports(channels: EventChannels, guest: DomId) -> None:
    with raises(DomainGone, errno.ESRCH):
        channels.allocate(NOBODY, DOMID_0)
    with raises(DomainGone, errno.ESRCH):
        channels.status(NOBODY, 1)
    with raises(DomainGone, errno.ESRCH):
        channels.bind(NOBODY, 1)


@case
def a_line_that_is_none_cannot_be_rung(channels: EventChannels, guest: DomId) -> None:
    line = channels.bind(guest, channels.allocate(guest, DOMID_0))
    channels.notify(line)
    channels.unbind(line)
    with raises(HypercallFailed, errno.ENOTCONN):
        channels.notify(line)
    with raises(HypercallFailed, errno.ENOTCONN):
        channels.unbind(line)


async def a_bound_line_rings_once(channels: EventChannels, guest: DomId) -> None:
    """Xen may have lost what was sent before: evtchn_bind_interdomain() makes up for it."""
    lines = [channels.bind(guest, channels.allocate(guest, DOMID_0)) for _ in range(3)]
    with trio.fail_after(30):
        while not all(channels.rings(line) for line in lines):  # noqa: ASYNC110 - it has no event
            await trio.sleep(0.01)
    equal([channels.rings(line) for line in lines], [1, 1, 1], "rings")
    for line in lines:
        channels.unbind(line)


async def main(domid: DomId) -> int:
    """Run the cases on a guest; return the exit status."""
    failed = 0
    with XenEventChannels() as channels:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channels.run)
            # First: the others leave rings of lines behind that may be used again.
            try:
                await a_bound_line_rings_once(channels, domid)
            except (Wrong, XshmError, trio.TooSlowError) as reason:
                failed += 1
                print(f"FAIL a_bound_line_rings_once: {type(reason).__name__}: {reason}")
            for name, one in CASES:
                try:
                    one(channels, domid)
                except (Wrong, XshmError) as reason:
                    failed += 1
                    print(f"FAIL {name}: {type(reason).__name__}: {reason}")
            nursery.cancel_scope.cancel()
    print(f"{len(CASES) + 1 - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(trio.run(main, DomId(int(sys.argv[1]))))
