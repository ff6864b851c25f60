# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading and writing nodes, the same in a transaction and outside of one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from xshmd.errors import StoreError, StoreTimedOut
from xshmd.xen import store_wire as wire
from xshmd.xen.store_link import is_error
from xshmd.xen.store_wire import Op

MAX_LISTINGS: Final = 16
"""Tries of a long directory that changes while it is read in parts."""

Call = Callable[[Op, str, bytes], Awaitable[bytes]]
"""Sends one request (type, path for messages, payload) and returns the answer's payload."""


class Session:
    """Reads and writes: one request each, within the deadline."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def read(self, path: str) -> str | None:
        payload = wire.join_strings(wire.encode_path(path))
        try:
            return wire.decode_value(await self._call(Op.READ, path, payload))
        except StoreError as exc:
            if is_error(exc, "ENOENT"):
                return None
            raise

    async def directory(self, path: str) -> tuple[str, ...] | None:
        payload = wire.join_strings(wire.encode_path(path))
        try:
            names = await self._call(Op.DIRECTORY, path, payload)
        except StoreError as exc:
            if is_error(exc, "ENOENT"):
                return None
            if not is_error(exc, "E2BIG"):
                raise
            too_long = exc
        else:
            return wire.split_strings(names)
        for _ in range(MAX_LISTINGS):
            try:
                listing = await self._directory_in_parts(path)
            except StoreError as exc:
                if is_error(exc, "ENOENT"):
                    return None
                if is_error(exc, "ENOSYS"):
                    raise too_long from exc
                raise
            if listing is not None:
                return wire.split_strings(listing)
        raise StoreTimedOut(
            f"{path} changed {MAX_LISTINGS} times while it was being listed",
            hint="something creates or removes nodes there without pause",
            path=path,
        )

    async def _directory_in_parts(self, path: str) -> bytes | None:
        """Return the names, or None if the node changed between two parts."""
        names = b""
        first_generation: bytes | None = None
        while True:
            payload = wire.join_strings(wire.encode_path(path), b"%d" % len(names))
            answer = await self._call(Op.DIRECTORY_PART, path, payload)
            generation, part, is_last = wire.decode_directory_part(answer)
            if first_generation not in (None, generation):
                return None
            first_generation = generation
            names += part
            if is_last:
                return names

    async def write(self, path: str, value: str) -> None:
        await self._call(Op.WRITE, path, wire.encode_write(path, value))

    async def remove(self, path: str) -> None:
        payload = wire.join_strings(wire.encode_path(path))
        try:
            await self._call(Op.RM, path, payload)
        except StoreError as exc:
            if not is_error(
                exc, "ENOENT"
            ):  # which C xenstored says only if the parent is absent too
                raise

    async def set_permissions(self, path: str, permissions: Sequence[str]) -> None:
        await self._call(Op.SET_PERMS, path, wire.encode_permissions(path, permissions))
