# SPDX-License-Identifier: LGPL-2.1-or-later
"""A back-end's side of one connection: what a message means, given all that came before it.

No socket is known here: messages come in, replies go out.  All that a front-end gave (memory,
descriptors) is this session's and ends with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from xshmd.vhost_user import payloads, wire
from xshmd.vhost_user.memory import CannotMap, Memory
from xshmd.vhost_user.payloads import Config
from xshmd.vhost_user.vring import Device, Vring, check_event
from xshmd.vhost_user.wire import Message, ProtocolFeature, ProtocolViolation, Request

MAX_MEM_SLOTS: Final = 64
"""How many regions a front-end may add one by one."""
FEATURES: Final = wire.VIRTIO_F_VERSION_1 | wire.VHOST_USER_F_PROTOCOL_FEATURES
PROTOCOL_FEATURES: Final = (
    ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG | ProtocolFeature.RESET_DEVICE | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS | ProtocolFeature.XEN_MMAP
)  # fmt: skip


class Session:
    """One front-end's connection, from its first message to its last.

    Synchronization: none.

    Args:
        device: What answers requests.
        memory: Where its memory goes; the session closes it.
    """

    def __init__(self, device: Device, memory: Memory) -> None:
        self._device = device
        self.memory = memory
        self._features = 0
        self._protocol = ProtocolFeature(0)
        self._status = 0
        self.vrings = [Vring() for _ in range(device.queue_count)]
        self._backend_fd = -1

    @property
    def xen(self) -> bool:
        """Whether region descriptions have the fields for Xen."""
        return ProtocolFeature.XEN_MMAP in self._protocol

    @property
    def most_fds(self) -> int:
        """How many descriptors it may come to hold."""
        # Three events of each queue, the channel back, and regions that are mapped on demand.
        return 3 * len(self.vrings) + 1 + MAX_MEM_SLOTS

    def close(self) -> None:
        """Unmap all memory and close all descriptors; may be called again without harm."""
        self.memory.close()
        for vring in self.vrings:
            vring.queue = None
            vring.close()
        self._replace_backend_fd(-1)

    # -- messages -------------------------------------------------------------------------------

    def handle(self, message: Message) -> Message | None:
        """Do what a message asks for; return the reply, if it is to have one.

        Raises:
            ProtocolViolation, CannotMap: The connection is to be closed.
        """
        fds = list(message.fds)
        try:
            if message.is_reply:
                raise ProtocolViolation(f"{message.name} came as a reply")
            handler = _HANDLERS.get(message.request)
            if handler is None:
                raise ProtocolViolation(f"{message.name} is not known")
            if fds and message.request not in _WITH_FDS:
                raise ProtocolViolation(f"{message.name} came with {len(fds)} file descriptors")
            failed = False
            try:
                payload = handler(self, message.payload, fds)
            except CannotMap:
                if not self._wants_ack(message):
                    raise
                failed, payload = True, None
        finally:
            for fd in fds:
                os.close(fd)
        if payload is None:
            if not self._wants_ack(message):
                return None
            payload = payloads.encode_u64(failed)
        return Message(message.request, payload, flags=wire.VERSION | wire.FLAG_REPLY)

    def _wants_ack(self, message: Message) -> bool:
        return message.needs_reply and ProtocolFeature.REPLY_ACK in self._protocol

    # Each handler takes the payload and the descriptors, of which it takes out those it keeps.

    def _get_features(self, payload: bytes, _fds: list[int]) -> bytes:
        _expect_nothing(payload)
        return payloads.encode_u64(FEATURES | self._device.features)

    def _set_features(self, payload: bytes, _fds: list[int]) -> None:
        wanted = payloads.decode_u64(payload)
        if wanted & ~(FEATURES | self._device.features):
            raise ProtocolViolation(f"the features {wanted:#x} are more than were offered")
        self._features = wanted
        if not wanted & wire.VHOST_USER_F_PROTOCOL_FEATURES:
            for vring in self.vrings:
                vring.enabled = True

    def _get_protocol_features(self, payload: bytes, _fds: list[int]) -> bytes:
        _expect_nothing(payload)
        return payloads.encode_u64(PROTOCOL_FEATURES)

    def _set_protocol_features(self, payload: bytes, _fds: list[int]) -> None:
        wanted = payloads.decode_u64(payload)
        if wanted & ~PROTOCOL_FEATURES:
            raise ProtocolViolation(f"the protocol features {wanted:#x} are more than were offered")
        # Descriptions of what is there already would be read in another way from now on.
        if self.memory.regions and ProtocolFeature.XEN_MMAP & (wanted ^ self._protocol):
            raise ProtocolViolation("XEN_MMAP is changed after memory was given")
        self._protocol = ProtocolFeature(wanted)

    def _set_owner(self, payload: bytes, _fds: list[int]) -> None:
        _expect_nothing(payload)

    def _get_queue_num(self, payload: bytes, _fds: list[int]) -> bytes:
        _expect_nothing(payload)
        return payloads.encode_u64(len(self.vrings))

    def _get_max_mem_slots(self, payload: bytes, _fds: list[int]) -> bytes:
        _expect_nothing(payload)
        return payloads.encode_u64(MAX_MEM_SLOTS)

    def _set_mem_table(self, payload: bytes, fds: list[int]) -> None:
        regions = payloads.decode_table(payload, xen=self.xen)
        given, fds[:] = tuple(fds), []
        self.memory.replace(regions, given, xen=self.xen)

    def _add_mem_reg(self, payload: bytes, fds: list[int]) -> None:
        if len(self.memory.regions) >= MAX_MEM_SLOTS:
            raise ProtocolViolation(f"more than {MAX_MEM_SLOTS} memory regions")
        region = payloads.decode_single(payload, xen=self.xen)
        given, fds[:] = tuple(fds), []
        self.memory.add(region, given, xen=self.xen)

    def _rem_mem_reg(self, payload: bytes, fds: list[int]) -> None:
        # Some front-ends send the descriptor again, which means nothing.
        if len(fds) > 1:
            raise ProtocolViolation(f"REM_MEM_REG came with {len(fds)} file descriptors")
        self.memory.remove(payloads.decode_single(payload, xen=self.xen))

    def _set_vring_num(self, payload: bytes, _fds: list[int]) -> None:
        vring, state = self._vring_state(payload)
        vring.size = state.num

    def _set_vring_addr(self, payload: bytes, _fds: list[int]) -> None:
        where = payloads.decode_address(payload)
        if where.descriptors % 16 or where.available % 2 or where.used % 4:
            raise ProtocolViolation("a ring is not aligned as rings are")
        self._vring(where.index).where = where

    def _set_vring_base(self, payload: bytes, _fds: list[int]) -> None:
        vring, state = self._vring_state(payload)
        vring.base = state.num & 0xFFFF

    def _get_vring_base(self, payload: bytes, _fds: list[int]) -> bytes:
        vring, state = self._vring_state(payload)
        vring.stop()
        return payloads.encode_state(payloads.VringState(state.index, vring.base))

    def _set_vring_kick(self, payload: bytes, fds: list[int]) -> None:
        vring, fd = self._vring_fd(payload, fds)
        vring.replace("kick", fd)
        vring.polled = fd < 0
        vring.broken = False

    def _set_vring_call(self, payload: bytes, fds: list[int]) -> None:
        vring, fd = self._vring_fd(payload, fds)
        vring.replace("call", fd)

    def _set_vring_err(self, payload: bytes, fds: list[int]) -> None:
        vring, fd = self._vring_fd(payload, fds)
        vring.replace("error", fd)

    def _set_vring_enable(self, payload: bytes, _fds: list[int]) -> None:
        vring, state = self._vring_state(payload)
        vring.enabled = bool(state.num)

    def _set_backend_req_fd(self, payload: bytes, fds: list[int]) -> None:
        _expect_nothing(payload)
        if len(fds) != 1:
            raise ProtocolViolation(f"SET_BACKEND_REQ_FD came with {len(fds)} file descriptors")
        self._replace_backend_fd(fds.pop())

    def _get_config(self, payload: bytes, _fds: list[int]) -> bytes:
        asked = payloads.decode_config(payload)
        space = self._device.config().ljust(wire.MAX_CONFIG_BYTES, b"\0")
        data = space[asked.offset : asked.offset + len(asked.data)]
        return payloads.encode_config(Config(asked.offset, asked.flags, data))

    def _set_config(self, payload: bytes, _fds: list[int]) -> None:
        payloads.decode_config(payload)  # nothing of it can be written

    def _reset(self, payload: bytes, _fds: list[int]) -> None:
        _expect_nothing(payload)
        for vring in self.vrings:
            vring.stop()
            vring.base = 0
            vring.enabled = False

    def _set_status(self, payload: bytes, fds: list[int]) -> None:
        self._status = payloads.decode_u64(payload) & 0xFF
        if not self._status:
            self._reset(b"", fds)

    def _get_status(self, payload: bytes, _fds: list[int]) -> bytes:
        _expect_nothing(payload)
        return payloads.encode_u64(self._status)

    def _vring(self, index: int) -> Vring:
        if index >= len(self.vrings):
            raise ProtocolViolation(f"there is no queue {index}")
        return self.vrings[index]

    def _vring_state(self, payload: bytes) -> tuple[Vring, payloads.VringState]:
        state = payloads.decode_state(payload)
        return self._vring(state.index), state

    def _vring_fd(self, payload: bytes, fds: list[int]) -> tuple[Vring, int]:
        word = payloads.decode_u64(payload)
        vring = self._vring(word & wire.VRING_INDEX_MASK)
        expected = 0 if word & wire.VRING_NO_FD else 1
        if len(fds) != expected:
            raise ProtocolViolation(f"a queue's event came with {len(fds)} file descriptors")
        if fds:
            check_event(fds[0])
        return vring, fds.pop() if fds else -1

    def _replace_backend_fd(self, fd: int) -> None:
        if self._backend_fd >= 0:
            os.close(self._backend_fd)
        self._backend_fd = fd

    # -- requests -------------------------------------------------------------------------------

    def process(self, index: int) -> int:
        """Answer what waits in a queue; see :meth:`~xshmd.vhost_user.vring.Vring.process`."""
        return self.vrings[index].process(self._device, self.memory, index)


_WITH_FDS: Final = frozenset(
    {
        Request.SET_MEM_TABLE, Request.ADD_MEM_REG, Request.REM_MEM_REG, Request.SET_VRING_KICK,
        Request.SET_VRING_CALL, Request.SET_VRING_ERR, Request.SET_BACKEND_REQ_FD,
    }
)  # fmt: skip
_Handler = Callable[[Session, bytes, list[int]], bytes | None]
_HANDLERS: Final[Mapping[int, _Handler]] = MappingProxyType(
    {
        Request.GET_FEATURES: Session._get_features,
        Request.SET_FEATURES: Session._set_features,
        Request.GET_PROTOCOL_FEATURES: Session._get_protocol_features,
        Request.SET_PROTOCOL_FEATURES: Session._set_protocol_features,
        Request.SET_OWNER: Session._set_owner,
        Request.RESET_OWNER: Session._reset,
        Request.RESET_DEVICE: Session._reset,
        Request.GET_QUEUE_NUM: Session._get_queue_num,
        Request.GET_MAX_MEM_SLOTS: Session._get_max_mem_slots,
        Request.SET_MEM_TABLE: Session._set_mem_table,
        Request.ADD_MEM_REG: Session._add_mem_reg,
        Request.REM_MEM_REG: Session._rem_mem_reg,
        Request.SET_VRING_NUM: Session._set_vring_num,
        Request.SET_VRING_ADDR: Session._set_vring_addr,
        Request.SET_VRING_BASE: Session._set_vring_base,
        Request.GET_VRING_BASE: Session._get_vring_base,
        Request.SET_VRING_KICK: Session._set_vring_kick,
        Request.SET_VRING_CALL: Session._set_vring_call,
        Request.SET_VRING_ERR: Session._set_vring_err,
        Request.SET_VRING_ENABLE: Session._set_vring_enable,
        Request.SET_BACKEND_REQ_FD: Session._set_backend_req_fd,
        Request.GET_CONFIG: Session._get_config,
        Request.SET_CONFIG: Session._set_config,
        Request.SET_STATUS: Session._set_status,
        Request.GET_STATUS: Session._get_status,
    }
)


def _expect_nothing(payload: bytes) -> None:
    if payload:
        raise ProtocolViolation(f"{len(payload)} bytes came where none are expected")
