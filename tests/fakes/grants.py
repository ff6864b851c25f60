# SPDX-License-Identifier: LGPL-2.1-or-later
"""The simulated machine's grant tables: who may map which of a domain's pages, and who does.

Version 1 of Xen 4.20's tables, from common/grant_table.c.  Not modelled: how many pages a table
takes as it grows, version 2 and transfers.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

from fakes.lending import Lending
from fakes.machine import CONTROL_DOMAIN, SimulatedMap
from fakes.objects import Domain, GrantEntry, Page
from xshmd.machine import Arch
from xshmd.units import DomId, Gfn
from xshmd.xen.errno_table import failure

ENTRIES_PER_FRAME: Final = 512


class GrantedMap(SimulatedMap):
    """References mapped by some domain, each pinned until it is unmapped."""

    def __init__(
        self,
        machine: GrantTables,
        mapper: DomId,
        entries: Sequence[GrantEntry],
        pages: Sequence[Page],
        *,
        writable: bool,
    ) -> None:
        super().__init__(machine, pages, writable=writable)
        self.mapper, self._entries, self._tables = mapper, tuple(entries), machine
        maps = machine.open_maps if mapper == CONTROL_DOMAIN else machine.granted_maps
        maps.add(self)

    def close(self) -> None:
        entries, self._entries = self._entries, ()
        for entry in entries:
            if self._writable:
                entry.writers -= 1
            else:
                entry.readers -= 1
        super().close()
        self._tables.settle_lent()


class GrantTables(Lending):
    """The calls that are about grants."""

    @property
    def silo(self) -> bool:
        """Whether a guest maps nothing of another's (xen/xsm/silo.c, silo_grant_mapref())."""
        said = [word for word in self.command_line.split() if word.startswith("xsm=")]
        return said[-1] == "xsm=silo" if said else self.arch is Arch.ARM64

    def _entries(self, holder: DomId, first_ref: int, nr_frames: int) -> list[GrantEntry]:
        """gnttab_acquire_resource(): the table grows to what is asked for, up to its limit."""
        call = "XENMEM_acquire_resource"
        domain = self._domain(holder, call)
        if first_ref + nr_frames > domain.max_grant_frames * ENTRIES_PER_FRAME:
            raise failure(call, holder, errno.EINVAL)
        refs = range(first_ref, first_ref + nr_frames)
        return [domain.grants.setdefault(ref, GrantEntry()) for ref in refs]

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
        with self._call("write_grants", holder, first_ref, nr_frames, first_gfn, guest, readonly):
            busy = 0
            for index, entry in enumerate(self._entries(holder, first_ref, nr_frames)):
                wanted = (True, readonly, guest, first_gfn + index)
                if (entry.valid, entry.readonly, entry.domid, entry.gfn) == wanted:
                    continue
                if entry.in_use:
                    busy += 1
                    continue
                entry.valid, entry.readonly, entry.domid, entry.gfn = wanted
            if busy:
                raise failure("writing grants", holder, errno.EBUSY)

    def end_grants(self, holder: DomId, first_ref: int, nr_frames: int) -> int:
        with self._call("end_grants", holder, first_ref, nr_frames):
            entries = self._entries(holder, first_ref, nr_frames)
            for entry in entries:
                entry.valid, entry.readonly = False, entry.in_use
            return sum(entry.in_use for entry in entries)

    def grants_in_use(self, holder: DomId, first_ref: int, nr_frames: int) -> int:
        with self._call("grants_in_use", holder, first_ref, nr_frames):
            return sum(entry.in_use for entry in self._entries(holder, first_ref, nr_frames))

    def map_grants(
        self, holder: DomId, first_ref: int, nr_frames: int, *, writable: bool
    ) -> GrantedMap:
        with self._call("map_grants", holder, first_ref, nr_frames, writable):
            return self._map_grants(CONTROL_DOMAIN, holder, first_ref, nr_frames, writable)

    def guest_map_grants(
        self, guest: DomId, holder: DomId, first_ref: int, nr_frames: int, *, writable: bool
    ) -> GrantedMap:
        """GNTTABOP_map_grant_ref, as a guest's kernel does it for a program: all or nothing."""
        with self._lock:
            if self.silo and holder != CONTROL_DOMAIN:
                raise failure("GNTTABOP_map_grant_ref", guest, errno.EINVAL)
            return self._map_grants(guest, holder, first_ref, nr_frames, writable)

    def _map_grants(
        self, mapper: DomId, holder: DomId, first_ref: int, nr_frames: int, writable: bool
    ) -> GrantedMap:
        """map_grant_ref(); Linux's gntdev makes EINVAL of whatever Xen says."""
        owner = self.by_domid.get(holder)
        entries: list[GrantEntry] = []
        pages: list[Page] = []
        for ref in range(first_ref, first_ref + nr_frames):
            entry = owner.grants.get(ref) if owner is not None else None
            page = entry.pinned if entry is not None and entry.in_use else None
            may = entry is not None and self._may_map(entry, mapper, writable)
            if may and page is None:
                page = self._granted_page(owner, entry)
            if entry is None or page is None or not may:
                for undone in entries:
                    undone.writers, undone.readers = (
                        undone.writers - writable, undone.readers - (not writable),
                    )  # fmt: skip
                raise failure("xengnttab_map_domain_grant_refs", holder, errno.EINVAL)
            entry.pinned = page
            entry.writers, entry.readers = entry.writers + writable, entry.readers + (not writable)
            entries.append(entry)
            pages.append(page)
        return GrantedMap(self, mapper, entries, pages, writable=writable)

    @staticmethod
    def _may_map(entry: GrantEntry, mapper: DomId, writable: bool) -> bool:
        if entry.in_use:
            # act->pin: of the entry itself nothing but GTF_readonly counts, and that only for the
            # first writer (_set_status_v1()).
            upgrade = writable and not entry.writers
            return entry.domid == mapper and not (upgrade and entry.readonly)
        return entry.valid and entry.domid == mapper and not (writable and entry.readonly)

    @staticmethod
    def _granted_page(owner: Domain | None, entry: GrantEntry | None) -> Page | None:
        """get_paged_frame(): of the granter's own RAM only."""
        if owner is None or entry is None or owner.dying:
            return None
        found = owner.p2m.get(entry.gfn)
        return None if found is None or found.foreign else found.page

    def _release_mappings(self, domain: Domain) -> None:
        """gnttab_release_mappings(), the first thing that is done to a dying domain."""
        for mapping in tuple(self.granted_maps):
            if isinstance(mapping, GrantedMap) and mapping.mapper == domain.domid:
                mapping.close()
