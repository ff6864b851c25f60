# SPDX-License-Identifier: LGPL-2.1-or-later
"""A model of event channels: xen/common/event_channel.c, and dom0's driver for them.

It implements :class:`xshmd.ports.EventChannels` over the domains of the model of Xen, and has the
guests' side of it too.  Held to real Xen by ``tests/contract``; where they differ this is wrong.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable

import trio

from fakes.hypervisor import SimulatedXen
from fakes.objects import Domain
from xshmd.ports import NOWHERE_LINE, PortStatus
from xshmd.units import DOMID_0, DomId
from xshmd.xen.errno_table import failure

FIRST_DOM0_LINE = 40
"""dom0 has channels of its own, for its interrupts and for xenstored."""


@dataclasses.dataclass(slots=True)
class Port:
    """One port of a domain; there is none where it is closed."""

    remote: DomId
    remote_port: int = 0
    pending: bool = False


class SimulatedEventChannels:
    """See the module."""

    def __init__(self, xen: SimulatedXen) -> None:
        self._xen = xen
        self._ports: dict[tuple[DomId, str], dict[int, Port]] = {}
        self._lines: dict[int, tuple[DomId, str, int]] = {}
        self._to: dict[int, int | None] = {}
        self._rings: dict[int, int] = {}
        self._heard: list[int] = []
        self._wake = trio.Event()
        self.taken_at_birth = 0
        """How many ports a new domain has already: libxl's, for store and console."""
        self.bind_errors: list[int] = []
        """What the next calls of bind fail with, such as dom0's running out of ports."""
        self.max_port: Callable[[DomId], int] = lambda domid: 1023

    # -- domains ----------------------------------------------------------------------------------

    def _domain(self, call: str, domid: DomId) -> Domain:
        domain = self._xen.by_domid.get(domid)
        if domain is None:
            raise failure(call, domid, errno.ESRCH)
        return domain

    def ports(self, domid: DomId, call: str = "") -> dict[int, Port]:
        """Return the ports of a domain; they go with it."""
        domain = self._domain(call, domid)
        born_with = {port: Port(DOMID_0) for port in range(1, self.taken_at_birth + 1)}
        return self._ports.setdefault((domid, domain.uuid), born_with)

    # -- the port ---------------------------------------------------------------------------------

    def allocate(self, domid: DomId, remote: DomId) -> int:
        ports = self.ports(domid, "EVTCHNOP_alloc_unbound")
        if self._domain("EVTCHNOP_alloc_unbound", domid).dying:
            raise failure("EVTCHNOP_alloc_unbound", domid, errno.EINVAL)
        for port in range(1, self.max_port(domid) + 1):
            if port not in ports:
                ports[port] = Port(remote)
                return port
        raise failure("EVTCHNOP_alloc_unbound", domid, errno.ENOSPC)

    def status(self, domid: DomId, port: int) -> PortStatus | None:
        found = self.ports(domid, "EVTCHNOP_status").get(port)
        return None if found is None else PortStatus(found.remote, found.remote_port)

    def bind(self, domid: DomId, port: int) -> int:
        call = "EVTCHNOP_bind_interdomain"
        if self.bind_errors:
            raise failure(call, domid, self.bind_errors.pop(0), port=port)
        found = self.ports(domid, call).get(port)
        if found is None or found.remote != DOMID_0 or found.remote_port:
            raise failure(call, domid, errno.EINVAL, port=port)
        line = next(n for n in range(FIRST_DOM0_LINE, 1 << 17) if n not in self._lines)
        self._lines[line] = (domid, self._domain(call, domid).uuid, port)
        self._to[line], self._rings[line] = NOWHERE_LINE, 0
        found.remote_port = line
        self._ring(line)
        return line

    def unbind(self, line: int) -> None:
        if line not in self._lines:
            raise failure("IOCTL_EVTCHN_UNBIND", None, errno.ENOTCONN)
        domid, uuid, port = self._lines.pop(line)
        del self._to[line]
        found = self._ports.get((domid, uuid), {}).get(port)
        if found is not None:
            found.remote_port = 0

    def notify(self, line: int) -> None:
        if line not in self._lines:
            raise failure("IOCTL_EVTCHN_NOTIFY", None, errno.ENOTCONN)
        domid, uuid, port = self._lines[line]
        domain = self._xen.by_domid.get(domid)
        if domain is not None and domain.uuid == uuid:
            self._ports[domid, uuid][port].pending = True

    def pass_on(self, line: int, to: int | None) -> None:
        self._to[line] = to

    def rings(self, line: int) -> int:
        return self._rings.get(line, 0)

    def held_up(self) -> int:
        return 0  # nothing here takes time, so nobody is too fast

    def _ring(self, line: int) -> None:
        self._rings[line] += 1
        to = self._to[line]
        # Once it is passed on, or told, the line may ring again: nothing here takes time.
        if to is None:
            if line not in self._heard:
                self._heard.append(line)
            self._wake.set()
        elif to in self._lines:
            self.notify(to)

    async def run(self) -> None:
        await trio.sleep_forever()

    async def heard(self) -> tuple[int, ...]:
        while not self._heard:
            self._wake = trio.Event()
            await self._wake.wait()
        await trio.lowlevel.checkpoint()
        lines, self._heard = tuple(self._heard), []
        return lines

    # -- what guests do ---------------------------------------------------------------------------

    def die(self) -> None:
        """Have the daemon's process end: the kernel unbinds every line it had."""
        for line in tuple(self._lines):
            self.unbind(line)
        self._heard.clear()

    def guest_sends(self, domid: DomId, port: int) -> None:
        """EVTCHNOP_send: nobody hears what is sent on a port that is not bound."""
        found = self.ports(domid)[port]
        if found.remote_port:
            self._ring(found.remote_port)

    def guest_takes(self, domid: DomId) -> set[int]:
        """Return the ports that are pending, which they are no more."""
        ports = self.ports(domid)
        rung = {port for port, one in ports.items() if one.pending}
        for port in rung:
            ports[port].pending = False
        return rung

    def guest_closes(self, domid: DomId, port: int) -> None:
        """EVTCHNOP_close."""
        found = self.ports(domid).pop(port)
        if found.remote_port in self._lines:
            self._lines[found.remote_port] = (domid, "", port)
