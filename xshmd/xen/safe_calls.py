# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hypercalls that the daemon makes for its clients from memory they filled, and why just those.

Xen takes every pointer in a hypercall's memory for one of the daemon's own.  So a call is safe only
if what the client writes holds no pointer, the most that Xen writes back is known and fits, nothing
changes by it, and it is about the caller's own domain.  ``docs/buffers.md`` goes through the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol

from xshmd.errors import OutOfRange, UsageError
from xshmd.xen.buffers import Lent, MemRef, Owner


class Caller(Protocol):
    """What makes the hypercall itself."""

    def xen_version(self, subcall: int, memory: Lent | None) -> int: ...


@dataclasses.dataclass(frozen=True, slots=True)
class SafeCall:
    """A subcall of ``xen_version`` (xen/include/public/version.h)."""

    subcall: int
    size_bytes: int
    """How much memory it takes at least; 0 if none."""
    variable: bool = False
    """Whether the memory begins with a 32-bit length of what follows, which Xen keeps to."""


SAFE_CALLS: Final[Mapping[str, SafeCall]] = MappingProxyType(
    {
        "version": SafeCall(0, 0),
        "extraversion": SafeCall(1, 16),
        "compile_info": SafeCall(2, 144),
        "capabilities": SafeCall(3, 1024),
        "changeset": SafeCall(4, 64),
        "features": SafeCall(6, 8),
        "page_size": SafeCall(7, 0),
        "guest_handle": SafeCall(8, 16),
        "command_line": SafeCall(9, 1024),
        "build_id": SafeCall(10, 4, variable=True),
    }
)


def make_safe_call(xen: Caller, owner: Owner, name: str, reference: MemRef | None) -> int:
    """Make a hypercall with a client's memory, and return what Xen returns.

    Args:
        xen: What makes it.
        owner: Whose the memory is.
        name: One of :data:`SAFE_CALLS`.
        reference: The memory, for a call that takes some.

    Raises:
        UsageError: there is no such call, or it takes memory and has none, or the reverse.
        OutOfRange: the memory is too small for what Xen would write.
        NoSuchBuffer, AlreadyFreed, ForeignBuffer, BufferBusy: as :meth:`Owner.use`.
        HypercallFailed: Xen refuses.
    """
    call = SAFE_CALLS.get(name)
    if call is None:
        raise UsageError(
            f"{name} is no hypercall that xshmd makes for others",
            hint=f"it makes {', '.join(SAFE_CALLS)}; a process makes others by itself",
        )
    if (reference is None) != (call.size_bytes == 0):
        raise UsageError(f"{name} takes {'no' if call.size_bytes == 0 else 'a'} memory reference")
    if reference is None:
        return xen.xen_version(call.subcall, None)
    with owner.use(reference) as memory:
        needed = call.size_bytes
        if call.variable:
            # Nobody can change it between this look and Xen's: while it is lent, it is ours.
            needed += int.from_bytes(memory.read(4), "little")
        if memory.size_bytes < needed:
            raise OutOfRange(
                f"{name} may write {needed} bytes, and the memory has {memory.size_bytes}",
                hint="allocate as much",
            )
        return xen.xen_version(call.subcall, memory)
