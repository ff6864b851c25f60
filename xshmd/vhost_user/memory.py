# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory a front-end lets a back-end reach: mapped as its table says, and never longer.

Addresses come from another and are never trusted: what is not wholly within the table is
:class:`OutsideMemory`.  With XEN_MMAP a region's descriptor is the device to map it through, so
that a back-end needs no right of its own and gets at nothing that its front-end could not.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

from xshmd.units import PAGE_SHIFT, PAGE_SIZE, DomId, Gfn, is_within
from xshmd.vhost_user import table
from xshmd.vhost_user.payloads import MemoryRegion, XenFlag
from xshmd.vhost_user.wire import ProtocolViolation
from xshmd.xen import device_maps
from xshmd.xen.windows import Window

MAX_XEN_BYTES: Final = 16 << 30
"""How much of domains' memory a front-end may have mapped: dom0 pays pages of its own for it."""
MAX_PLAIN_BYTES: Final = 1 << 40
"""How long its plain memory may be: what is not written costs nothing but addresses, of which a
process has 2^47."""


class OutsideMemory(Exception):
    """An address from the guest or the front-end is not within the memory table."""


class CannotMap(Exception):
    """The kernel or Xen would not map a region; the message says which and why."""


class Devices(Protocol):
    """How memory of domains is mapped: :mod:`xshmd.xen.device_maps`, or what stands for it."""

    def map_frames(self, window: Window, fd: int, domid: DomId, first_gfn: Gfn) -> None: ...

    def map_grants(self, window: Window, fd: int, domid: DomId, first_reference: int) -> None: ...


class _Mapped:
    """A region that is in the table."""

    def __init__(self, region: MemoryRegion, fd: int, devices: Devices) -> None:
        """Map it, unless it is not to be mapped in advance; takes over the descriptor."""
        self.region = region
        self._fd, self._devices = fd, devices
        self._window: Window | None = None
        self._skip = 0
        try:
            if region.in_advance:
                self._window, self._skip = _mapped(region, fd, devices)
        except BaseException:
            self.close()
            raise
        if self._window is not None:
            self._drop_fd()

    @contextlib.contextmanager
    def access(self, offset: int, size_bytes: int) -> Iterator[memoryview]:
        """Give access to some of its bytes, mapped for as long if they are not anyway."""
        if self._window is not None:
            yield self._window.view(self._skip + offset, size_bytes)
            return
        if not size_bytes:
            yield memoryview(b"")
            return
        first, skip = offset & -PAGE_SIZE, offset % PAGE_SIZE
        nr_frames = -(-(skip + size_bytes) // PAGE_SIZE)
        with _xen_window(
            self.region, self._fd, self._devices, first >> PAGE_SHIFT, nr_frames
        ) as window:
            yield window.view(skip, size_bytes)

    def view(self, offset: int, size_bytes: int) -> memoryview:
        """Return some of its bytes."""
        if self._window is None:
            raise CannotMap(
                f"the region at {self.region.guest_address:#x} is not to be mapped in advance"
            )
        return self._window.view(self._skip + offset, size_bytes)

    def close(self) -> None:
        """Unmap it; views of it show zeros from then on."""
        if self._window is not None:
            self._window.close()
        self._drop_fd()

    def _drop_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Memory:
    """The regions of one connection.

    Synchronization: none.

    Args:
        max_xen_bytes: How much of domains' memory may be mapped at the same time.
        devices: What maps that.
    """

    def __init__(self, max_xen_bytes: int = MAX_XEN_BYTES, devices: Devices = device_maps) -> None:
        self._max_xen_bytes, self._devices = max_xen_bytes, devices
        self._mapped: list[_Mapped] = []

    @property
    def regions(self) -> tuple[MemoryRegion, ...]:
        """What the table has, in the order it came."""
        return tuple(each.region for each in self._mapped)

    def replace(self, regions: Sequence[MemoryRegion], fds: Sequence[int], *, xen: bool) -> None:
        """Make this the table; takes over the descriptors, one a region, whatever happens.

        Raises:
            ProtocolViolation: It cannot be meant; nothing is mapped.
            CannotMap: Some of it cannot be mapped; nothing is.
        """
        with _ours(fds) as left:
            if len(fds) != len(regions):
                raise ProtocolViolation(
                    f"a memory table of {len(regions)} regions has {len(fds)} file descriptors"
                )
            table.check_table(regions, xen=xen)
            self._check_total(regions)
            # What is to go goes first: the two tables may well be the same memory.
            self.close()
            try:
                for region in regions:
                    self._mapped.append(_Mapped(region, left.pop(0), self._devices))
            except BaseException:
                self.close()
                raise

    def add(self, region: MemoryRegion, fds: Sequence[int], *, xen: bool) -> None:
        """Add a region; takes over its descriptor, whatever happens.

        Raises:
            ProtocolViolation: It cannot be meant.
            CannotMap: It cannot be mapped.
        """
        with _ours(fds) as left:
            if len(fds) != 1:
                raise ProtocolViolation(f"a memory region has {len(fds)} file descriptors")
            table.check(region, self.regions, xen=xen)
            self._check_total([*self.regions, region])
            self._mapped.append(_Mapped(region, left.pop(0), self._devices))

    def remove(self, region: MemoryRegion) -> None:
        """Take a region out of the table.

        Raises:
            ProtocolViolation: It is not in it.
        """
        for each in self._mapped:
            if each.region.is_same_place(region):
                self._mapped.remove(each)
                each.close()
                return
        raise ProtocolViolation(f"there is no region at {region.guest_address:#x} to be removed")

    def close(self) -> None:
        """Unmap everything; may be called again without harm."""
        while self._mapped:
            self._mapped.pop().close()

    # -- access ---------------------------------------------------------------------------------

    def view(self, guest_address: int, size_bytes: int) -> memoryview:
        """Return the bytes at an address as descriptors have it.

        Raises:
            OutsideMemory: They are not all in one region.
            CannotMap: The region is one to be mapped only while it is used: see :meth:`access`.
        """
        found, offset = self._find(guest_address, size_bytes, _guest)
        return found.view(offset, size_bytes)

    def view_user(self, user_address: int, size_bytes: int) -> memoryview:
        """Do as :meth:`view` for an address as SET_VRING_ADDR has it."""
        found, offset = self._find(user_address, size_bytes, _user)
        return found.view(offset, size_bytes)

    @contextlib.contextmanager
    def access(self, guest_address: int, size_bytes: int) -> Iterator[memoryview]:
        """Give access to bytes of any region, mapping and unmapping them if need be.

        Raises:
            OutsideMemory: They are not all in one region.
            CannotMap: They could not be mapped.
        """
        found, offset = self._find(guest_address, size_bytes, _guest)
        with found.access(offset, size_bytes) as view:
            yield view

    @contextlib.contextmanager
    def access_user(self, user_address: int, size_bytes: int) -> Iterator[memoryview]:
        """Do as :meth:`access` for an address as SET_VRING_ADDR has it."""
        found, offset = self._find(user_address, size_bytes, _user)
        with found.access(offset, size_bytes) as view:
            yield view

    def pieces(self, guest_address: int, size_bytes: int) -> list[tuple[int, int]]:
        """Cut a range where one region ends and another begins: (address, size in bytes) each.

        Raises:
            OutsideMemory: Some of it is in no region.
        """
        found: list[tuple[int, int]] = []
        while size_bytes:
            mapped, offset = self._find(guest_address, 1, _guest)
            size = min(size_bytes, mapped.region.size_bytes - offset)
            found.append((guest_address, size))
            guest_address += size
            size_bytes -= size
        return found

    def _find(
        self, address: int, size_bytes: int, start_of: Callable[[MemoryRegion], int]
    ) -> tuple[_Mapped, int]:
        for each in self._mapped:
            offset = address - start_of(each.region)
            if is_within(offset, size_bytes, each.region.size_bytes):
                return each, offset
        raise OutsideMemory(f"{size_bytes} bytes at {address:#x} are not in the memory table")

    def _check_total(self, regions: Sequence[MemoryRegion]) -> None:
        total = sum(
            region.size_bytes for region in regions if region.xen_flags and region.in_advance
        )
        if total > self._max_xen_bytes:
            raise ProtocolViolation(f"a memory table is of {total} bytes of domains' memory")
        plain = sum(region.size_bytes for region in regions if not region.xen_flags)
        if plain > MAX_PLAIN_BYTES:
            raise ProtocolViolation(f"a memory table is of {plain} bytes of plain memory")


def _guest(region: MemoryRegion) -> int:
    return region.guest_address


def _user(region: MemoryRegion) -> int:
    return region.user_address


@contextlib.contextmanager
def _ours(fds: Sequence[int]) -> Iterator[list[int]]:
    """Close what is left of these descriptors."""
    left = list(fds)
    try:
        yield left
    finally:
        for fd in left:
            os.close(fd)


def _mapped(region: MemoryRegion, fd: int, devices: Devices) -> tuple[Window, int]:
    """Map all of a region; return the window and where in it the region begins."""
    if region.xen_flags:
        return _xen_window(region, fd, devices, 0, region.size_bytes >> PAGE_SHIFT), 0
    skip = region.mmap_offset % PAGE_SIZE
    try:
        about = os.fstat(fd)
        end = region.mmap_offset + region.size_bytes
        if stat.S_ISREG(about.st_mode) and about.st_size < end:
            raise CannotMap(
                f"the region at {region.guest_address:#x} ends at byte {end} of a file of "
                f"{about.st_size}"
            )
        window = Window(-(-(skip + region.size_bytes) // PAGE_SIZE) * PAGE_SIZE)
    except (OSError, OverflowError) as error:
        raise _cannot(region, error) from error
    try:
        window.place(fd, region.mmap_offset - skip)
    except OSError as error:
        window.close()
        raise _cannot(region, error) from error
    return window, skip


def _xen_window(
    region: MemoryRegion, fd: int, devices: Devices, skip_frames: int, nr_frames: int
) -> Window:
    """Map frames of a region of a domain's memory."""
    domid = DomId(region.domid)
    try:
        window = Window(nr_frames << PAGE_SHIFT)
    except (OSError, OverflowError) as error:
        raise _cannot(region, error) from error
    try:
        if region.xen_flags & XenFlag.GRANT:
            devices.map_grants(window, fd, domid, table.first_grant(region) + skip_frames)
        else:
            gfn = Gfn(table.first_frame(region) + skip_frames)
            devices.map_frames(window, fd, domid, gfn)
    except OSError as error:
        window.close()
        raise _cannot(region, error) from error
    except BaseException:
        window.close()
        raise
    return window


def _cannot(region: MemoryRegion, error: Exception) -> CannotMap:
    of = f" of domain {region.domid}" if region.xen_flags else ""
    return CannotMap(f"the region{of} at {region.guest_address:#x} cannot be mapped: {error}")
