# SPDX-License-Identifier: LGPL-2.1-or-later
"""A front-end's side of one connection: negotiates, and keeps a back-end's memory table in step.

It gives memory and, if asked to, says where queues are; driving those is somebody else's: a guest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Final

from xshmd.errors import Refused
from xshmd.vhost_user import payloads, wire
from xshmd.vhost_user.channel import Channel
from xshmd.vhost_user.payloads import MemoryRegion, VringAddress, VringState
from xshmd.vhost_user.wire import (
    FLAG_NEED_REPLY,
    VERSION,
    Message,
    ProtocolFeature,
    ProtocolViolation,
    Request,
)

ANSWER_S: Final = 10.0
"""How long a back-end may take to answer: mapping much memory is what it may be busy with."""
WANTED: Final = ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIGURE_MEM_SLOTS
OpenFd = Callable[[MemoryRegion], int]
"""Opens the descriptor that goes with a region; whoever calls it closes it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """Where a queue is, as a front-end announces it."""

    size: int
    where: VringAddress
    kick: int = -1
    """The descriptor that says something is in it; none: the back-end is to look by itself."""
    call: int = -1


class Frontend:
    """One back-end, from the first message on.

    Every method may raise :class:`~xshmd.vhost_user.channel.Disconnected`, TimeoutError or
    :class:`~xshmd.vhost_user.wire.ProtocolViolation`, after which the connection is of no use.

    Synchronization: none.

    Args:
        channel: The connection, which stays the caller's.
        timeout_s: How long any one answer may take.
    """

    def __init__(self, channel: Channel, timeout_s: float = ANSWER_S) -> None:
        self._channel, self._timeout_s = channel, timeout_s
        self.features = 0
        """Bits of virtio's features that both ends want."""
        self.protocol = ProtocolFeature(0)
        self.slots = wire.MAX_TABLE_REGIONS
        """How many regions the back-end takes."""
        self.table: tuple[MemoryRegion, ...] = ()
        """What it has been given."""

    @property
    def xen(self) -> bool:
        """Whether region descriptions have the fields for Xen."""
        return ProtocolFeature.XEN_MMAP in self.protocol

    def negotiate(self, *, xen: bool, features: int = wire.VIRTIO_F_VERSION_1) -> None:
        """Agree on features and take the session over.

        Args:
            xen: Whether the memory is a domain's, which takes XEN_MMAP.
            features: Bits of virtio's features to be used if the back-end has them.

        Raises:
            Refused: The back-end cannot do what is needed.
        """
        offered = self._ask_u64(Request.GET_FEATURES)
        self.features = offered & (features | wire.VHOST_USER_F_PROTOCOL_FEATURES)
        if offered & wire.VHOST_USER_F_PROTOCOL_FEATURES:
            wanted = WANTED | (ProtocolFeature.XEN_MMAP if xen else ProtocolFeature(0))
            known = self._ask_u64(Request.GET_PROTOCOL_FEATURES)
            agreed = ProtocolFeature(known & wanted)
            self._tell(Request.SET_PROTOCOL_FEATURES, payloads.encode_u64(agreed))
            self.protocol = agreed
        if xen and not self.xen:
            raise Refused(
                "the back-end cannot map memory of Xen domains: it does not know XEN_MMAP",
                hint="use one that does, such as those of rust-vmm built for Xen",
            )
        if ProtocolFeature.CONFIGURE_MEM_SLOTS in self.protocol:
            self.slots = self._ask_u64(Request.GET_MAX_MEM_SLOTS)
        self._tell(Request.SET_OWNER)
        self._tell(Request.SET_FEATURES, payloads.encode_u64(self.features))

    def give(self, wanted: Sequence[MemoryRegion], open_fd: OpenFd) -> None:
        """Make the back-end's memory table this one, with as few changes as the protocol allows.

        When it returns, the back-end has mapped what is new, and unmapped what is no more in it.

        Raises:
            Refused: It cannot have so many regions, or could not map them.
        """
        if len(wanted) > self.slots:
            raise Refused(f"the back-end takes {self.slots} regions, and there are {len(wanted)}")
        if tuple(wanted) != self.table:
            self._change(wanted, open_fd)
            if ProtocolFeature.REPLY_ACK not in self.protocol:
                # Messages are answered in their order, and this one has an answer.
                self._ask_u64(Request.GET_FEATURES)

    def _change(self, wanted: Sequence[MemoryRegion], open_fd: OpenFd) -> None:
        if ProtocolFeature.CONFIGURE_MEM_SLOTS in self.protocol:
            for region in self.table:
                if region not in wanted:
                    self._tell(Request.REM_MEM_REG, payloads.encode_single(region, xen=self.xen))
                    self.table = tuple(each for each in self.table if each != region)
            for region in wanted:
                if region not in self.table:
                    self._tell_with_fds(
                        Request.ADD_MEM_REG, payloads.encode_single(region, xen=self.xen), [region],
                        open_fd,
                    )  # fmt: skip
                    self.table += (region,)
        else:
            payload = payloads.encode_table(wanted, xen=self.xen)
            self._tell_with_fds(Request.SET_MEM_TABLE, payload, wanted, open_fd)
            self.table = tuple(wanted)

    def start(self, queue: Queue, base: int = 0) -> None:
        """Say where a queue is, and have the back-end look into it.

        Args:
            queue: The queue.
            base: The index of the available ring at which to begin.
        """
        index = queue.where.index
        self._tell(Request.SET_VRING_NUM, payloads.encode_state(VringState(index, queue.size)))
        self._tell(Request.SET_VRING_BASE, payloads.encode_state(VringState(index, base)))
        self._tell(Request.SET_VRING_ADDR, payloads.encode_address(queue.where))
        for request, fd in (
            (Request.SET_VRING_CALL, queue.call),
            (Request.SET_VRING_KICK, queue.kick),
        ):
            word = index | (wire.VRING_NO_FD if fd < 0 else 0)
            self._tell(request, payloads.encode_u64(word), (fd,) if fd >= 0 else ())
        if self.features & wire.VHOST_USER_F_PROTOCOL_FEATURES:
            self._tell(Request.SET_VRING_ENABLE, payloads.encode_state(VringState(index, 1)))

    def stop(self, index: int) -> int:
        """Stop a queue; return where in its available ring the back-end was."""
        payload = payloads.encode_state(VringState(index, 0))
        return payloads.decode_state(self._ask(Request.GET_VRING_BASE, payload)).num

    # -- messages -------------------------------------------------------------------------------

    def _ask_u64(self, request: Request) -> int:
        return payloads.decode_u64(self._ask(request))

    def _ask(self, request: Request, payload: bytes = b"") -> bytes:
        self._channel.send(Message(request, payload))
        return self._reply_to(request)

    def _tell(self, request: Request, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        acknowledged = ProtocolFeature.REPLY_ACK in self.protocol
        flags = VERSION | (FLAG_NEED_REPLY if acknowledged else 0)
        self._channel.send(Message(request, payload, fds, flags))
        if acknowledged and payloads.decode_u64(self._reply_to(request)):
            raise Refused(f"the back-end could not do {request.name}", hint="its log may say why")

    def _tell_with_fds(
        self, request: Request, payload: bytes, regions: Sequence[MemoryRegion], open_fd: OpenFd
    ) -> None:
        with contextlib.ExitStack() as opened:
            fds = []
            for region in regions:
                fds.append(open_fd(region))
                opened.callback(os.close, fds[-1])
            self._tell(request, payload, tuple(fds))

    def _reply_to(self, request: Request) -> bytes:
        reply = self._channel.receive(self._timeout_s)
        for fd in reply.fds:
            os.close(fd)
        if reply.request != request or not reply.is_reply or reply.fds:
            raise ProtocolViolation(f"{reply.name} came instead of a reply to {request.name}")
        return reply.payload
