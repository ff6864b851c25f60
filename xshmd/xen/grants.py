# SPDX-License-Identifier: LGPL-2.1-or-later
"""Grant references by their thousands: a holder's entries written at once, and mapped in dom0.

The entries are written straight into the holder's grant table, which dom0 may map
(``XENMEM_acquire_resource``), and not by any call of the domain's own: a holder never runs.
They have the first form (``grant_entry_v1_t``), in which Xen keeps the marks of what is mapped in
the entry itself (xen/common/grant_table.c, ``_set_status_v1()``).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from xshmd.errors import XenUnavailable
from xshmd.ranges import ByteRange, nr_frames_of
from xshmd.units import PAGE_SIZE, DomId, Gfn
from xshmd.xen.errno_table import failure
from xshmd.xen.pages import MappedPages
from xshmd.xen.scatter_copy import Binding, Granting, copy_granted

ENTRIES_PER_FRAME = PAGE_SIZE // 8
"""sizeof(grant_entry_v1_t) is 8 (xen/include/public/grant_table.h)."""


class GrantCalls:
    """The calls of :class:`~xshmd.ports.Hypervisor` that are about grants.

    Synchronization: writers of one holder's entries take turns; dom0's mappings are free of it.
    """

    _ffi: Any
    _lib: Any
    _foreign: Any
    _gnttab: Any = None

    @contextmanager
    def _table(self, holder: DomId, first_ref: int, nr_refs: int) -> Iterator[tuple[Any, int]]:
        """Map the frames of a holder's grant table that have these entries.

        Yields:
            Where they are mapped, and which of the entries there is the first.
        """
        table = self._ffi.new("void **")
        first_frame, skip = divmod(first_ref, ENTRIES_PER_FRAME)
        nr_frames = -(-(skip + nr_refs) // ENTRIES_PER_FRAME)
        resource = self._lib.xshm_grant_table(self._foreign, holder, first_frame, nr_frames, table)
        if resource == self._ffi.NULL:
            code, end = self._ffi.errno, first_frame + nr_frames
            raise failure("XENMEM_acquire_resource", holder, code, nr_table_frames=end)
        try:
            yield table[0], skip
        finally:
            self._lib.xenforeignmemory_unmap_resource(self._foreign, resource)

    def write_grants(
        self,
        holder: DomId,
        first_ref: int,
        nr_frames: int,
        first_gfn: Gfn,
        guest: DomId,
        *,
        readonly: bool,
    ) -> None:
        with self._table(holder, first_ref, nr_frames) as (table, at):
            busy = self._lib.xshm_grants_write(table, at, nr_frames, guest, first_gfn, readonly)
        if busy:
            raise failure("writing grants", holder, errno.EBUSY, first_ref=first_ref, busy=busy)

    def end_grants(self, holder: DomId, first_ref: int, nr_frames: int) -> int:
        with self._table(holder, first_ref, nr_frames) as (table, at):
            return int(self._lib.xshm_grants_end(table, at, nr_frames))

    def grants_in_use(self, holder: DomId, first_ref: int, nr_frames: int) -> int:
        with self._table(holder, first_ref, nr_frames) as (table, at):
            return int(self._lib.xshm_grants_in_use(table, at, nr_frames))

    def map_grants(
        self, holder: DomId, first_ref: int, nr_frames: int, *, writable: bool
    ) -> MappedPages:
        handle = self._open_gnttab()
        address = self._lib.xshm_gnttab_map(handle, holder, first_ref, nr_frames, writable)
        if address == self._ffi.NULL:
            code = self._ffi.errno
            raise failure("xengnttab_map_domain_grant_refs", holder, code, first_ref=first_ref)
        unmap = self._lib.xengnttab_unmap
        return MappedPages(self._lib, self._ffi, unmap, handle, address, nr_frames)

    def copy_granted(
        self,
        holder: DomId,
        first_ref: int,
        source: Sequence[ByteRange],
        target: Sequence[ByteRange],
        *,
        count_at: int | None = None,
    ) -> int:
        binding = Binding(self._lib, self._ffi, self._foreign)
        with self._table(holder, first_ref, nr_frames_of((*target, *source))) as (table, at):
            granting = Granting(self._open_gnttab(), table, at, first_ref)
            return copy_granted(binding, granting, holder, source, target, count_at)

    def _open_gnttab(self) -> Any:
        # Only who maps grants needs the device.
        if self._gnttab is None:
            handle = self._lib.xshm_gnttab_open()
            if handle == self._ffi.NULL:
                raise XenUnavailable("cannot open /dev/xen/gntdev", hint="modprobe xen-gntdev")
            self._gnttab = handle
        return self._gnttab

    def _close_gnttab(self) -> None:
        if self._gnttab is not None:
            self._lib.xengnttab_close(self._gnttab)
            self._gnttab = None
