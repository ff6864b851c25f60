# SPDX-License-Identifier: LGPL-2.1-or-later
"""Grant references by their thousands: a holder's entries written at once, and mapped in dom0.

The entries are written straight into the holder's grant table, which dom0 may map
(``XENMEM_acquire_resource``), and not by any call of the domain's own: a holder never runs.
They have the first form (``grant_entry_v1_t``), in which Xen keeps the marks of what is mapped in
the entry itself (xen/common/grant_table.c, ``_set_status_v1()``).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from xshmd.errors import XenUnavailable
from xshmd.units import PAGE_SIZE, DomId, Gfn
from xshmd.xen.errno_table import failure
from xshmd.xen.pages import MappedPages

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
    def _table(self, holder: DomId, nr_refs: int) -> Iterator[Any]:
        """Map a holder's grant table as far as its first ``nr_refs`` entries."""
        table = self._ffi.new("void **")
        nr_frames = -(-nr_refs // ENTRIES_PER_FRAME)
        resource = self._lib.xshm_grant_table(self._foreign, holder, nr_frames, table)
        if resource == self._ffi.NULL:
            code = self._ffi.errno
            raise failure("XENMEM_acquire_resource", holder, code, nr_table_frames=nr_frames)
        try:
            yield table[0]
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
        with self._table(holder, first_ref + nr_frames) as table:
            busy = self._lib.xshm_grants_write(
                table, first_ref, nr_frames, guest, first_gfn, readonly
            )
        if busy:
            raise failure("writing grants", holder, errno.EBUSY, first_ref=first_ref, busy=busy)

    def end_grants(self, holder: DomId, first_ref: int, nr_frames: int) -> int:
        with self._table(holder, first_ref + nr_frames) as table:
            return int(self._lib.xshm_grants_end(table, first_ref, nr_frames))

    def grants_in_use(self, holder: DomId, first_ref: int, nr_frames: int) -> int:
        with self._table(holder, first_ref + nr_frames) as table:
            return int(self._lib.xshm_grants_in_use(table, first_ref, nr_frames))

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
