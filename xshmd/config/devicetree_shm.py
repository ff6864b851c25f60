# SPDX-License-Identifier: LGPL-2.1-or-later
"""The three numbers of ``xen,shared-mem``, and which of them is which.

There are two generations of the binding, told apart by the kind of ``xen,shm-id``:

* a number is the 2022 design's, whose order is <host size guest>;
* a string is that of the code which Xen took in (4.17 on), whose order is <host guest size>, or
  without a host address (4.19 on) <guest size>.

The number of cells is the same in both orders, so the kind of the id decides, as nothing else is
told to Xen.  What it decides must then hold for all nodes of the region together: whole pages, a
size, no overflow, one host range, and direct-mapped where the domain is.  Where that fails and the
other order would hold, the author had probably the other one in mind; as a wrong guess would put
memory where nobody asked for it, that is an error which shows both readings.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Sequence
from typing import Final

from xshmd.config.devicetree_blob import ADDRESS_CELLS, SIZE_CELLS, Node
from xshmd.config.findings import config_error
from xshmd.config.xlcfg import shown
from xshmd.errors import ConfigError
from xshmd.model import Place, Role
from xshmd.units import ADDRESS_LIMIT, PAGE_SIZE, human_size, is_within

KEY: Final = "xen,shared-mem"
_CELLS_OF_A_NUMBER: Final = (1, 2)


class Order(enum.Enum):
    """What the numbers of ``xen,shared-mem`` mean, in the words of an error."""

    DESIGN = "<host size guest>"
    MERGED = "<host guest size>"
    NO_HOST = "<guest size>"
    NO_HOST_TURNED = "<size guest>"


_OTHER: Final = {Order.DESIGN: Order.MERGED, Order.MERGED: Order.DESIGN}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a node says if its numbers are in a given order; all in bytes."""

    order: Order
    host: int | None
    guest: int
    size: int

    def __str__(self) -> str:
        host = "" if self.host is None else f"host {self.host:#x}, "
        return f"{self.order.value} is {host}guest {self.guest:#x}, {human_size(self.size)}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One node of a region: its part in one domain, the numbers not yet told apart."""

    domain: str
    direct_mapped: bool
    region_id: str
    numeric: bool
    """Whether the id was a number."""
    role: Role | None
    """None where the node does not say it: the region is the system's."""
    cells: tuple[int, ...]
    address_cells: int
    size_cells: int
    place: Place

    def reading(self, order: Order) -> Reading:
        widths = {
            Order.DESIGN: (self.address_cells, self.size_cells, self.address_cells),
            Order.MERGED: (self.address_cells, self.address_cells, self.size_cells),
            Order.NO_HOST: (self.address_cells, self.size_cells),
            Order.NO_HOST_TURNED: (self.size_cells, self.address_cells),
        }[order]
        numbers, at = [], 0
        for width in widths:
            number = 0
            for cell in self.cells[at : at + width]:
                number = number << 32 | cell
            numbers.append(number)
            at += width
        names = order.value.strip("<>").split()
        said = dict(zip(names, numbers, strict=True))
        return Reading(order=order, host=said.get("host"), guest=said["guest"], size=said["size"])

    def order(self) -> Order:
        """Return the order that the kind of the id stands for."""
        if len(self.cells) == self.address_cells + self.size_cells:
            return Order.NO_HOST
        return Order.DESIGN if self.numeric else Order.MERGED


def numbers_of(
    node: Node, place: Place, errors: list[ConfigError]
) -> tuple[tuple[int, ...], int, int] | None:
    """Return the cells of ``xen,shared-mem`` with how many make an address and a size.

    As in Xen, a parent without ``#address-cells`` has its own parent's (device_tree_for_each_node
    in xen/common/device-tree/bootfdt.c).
    """
    widths = []
    for key, default in (("#address-cells", ADDRESS_CELLS), ("#size-cells", SIZE_CELLS)):
        width = _inherited(node, key, default)
        if width not in _CELLS_OF_A_NUMBER:
            errors.append(
                config_error(
                    place,
                    f"the parent's {key} is not 1 or 2",
                    hint=f"say {key} = <2>",
                    rule="cells",
                )
            )
            return None
        widths.append(width)
    address, size = widths
    wanted = (address + size, 2 * address + size)
    cells = node.cells(KEY)
    if cells is None or len(cells) not in wanted:
        if KEY not in node.properties:
            said = f"'{KEY}' is missing"
        elif cells is None:
            said = f"{KEY} is no list of 32-bit cells"
        else:
            said = f"{KEY} has {len(cells)} cells"
        hint = (
            f"with #address-cells {address} and #size-cells {size} it has {wanted[1]} cells as"
            f" {Order.MERGED.value}, or {wanted[0]} as {Order.NO_HOST.value}"
        )
        errors.append(config_error(place, said, hint=hint, rule="cells"))
        return None
    return cells, address, size


def readings(members: Sequence[Member], errors: list[ConfigError]) -> tuple[Reading, ...]:
    """Return what each node of one region says; empty if that is wrong, as ``errors`` then say."""
    orders = [member.order() for member in members]
    for member, order in zip(members, orders, strict=True):
        if order is Order.NO_HOST and member.numeric:
            errors.append(_unclear_without_host(member))
            return ()
    found = _wrong(members, orders)
    if not found:
        return tuple(member.reading(order) for member, order in zip(members, orders, strict=True))
    others = [_OTHER.get(order, order) for order in orders]
    if others != orders and not _wrong(members, others):
        errors.append(_unclear(members, orders, found[0]))
    else:
        errors += found
    return ()


def _inherited(node: Node, key: str, default: int) -> int:
    above = node.parent
    while above is not None:
        if key in above.properties:
            cells = above.cells(key)
            return cells[0] if cells and len(cells) == 1 else 0
        above = above.parent
    return default


def _wrong(members: Sequence[Member], orders: Sequence[Order]) -> list[ConfigError]:
    first = members[0].reading(orders[0])
    found: list[ConfigError] = []
    for member, order in zip(members, orders, strict=True):
        reading = member.reading(order)
        found += _wrong_alone(member, reading)
        if (reading.host, reading.size) != (first.host, first.size):
            found.append(_another_region(member, reading, members[0], first))
    return found


def _wrong_alone(member: Member, reading: Reading) -> Iterator[ConfigError]:
    parts = (("host address", reading.host), ("guest address", reading.guest),
             ("size", reading.size))  # fmt: skip
    for name, number in parts:
        if number is not None and number % PAGE_SIZE:
            yield config_error(
                member.place,
                f"{KEY}: {name} {number:#x} is not a multiple of {human_size(PAGE_SIZE)}",
                hint=f"memory is shared in whole pages; the order is {reading.order.value}",
                rule="unaligned",
            )
    if not reading.size:
        yield config_error(
            member.place,
            f"{KEY}: the size is 0",
            hint=f"say {PAGE_SIZE:#x} or more; the order is {reading.order.value}",
            rule="size-zero",
        )
    for name, number in parts[:2]:
        if number is not None and not is_within(number, reading.size, ADDRESS_LIMIT):
            yield config_error(
                member.place,
                f"{KEY}: {name} {number:#x} + size {reading.size:#x} is beyond 64 bits",
                hint=f"choose a lower address; the order is {reading.order.value}",
                rule="beyond-64-bits",
            )
    if member.direct_mapped and reading.host != reading.guest:
        said = "there is no host address" if reading.host is None else f"host {reading.host:#x}"
        yield config_error(
            member.place,
            f"{KEY}: {said} but guest address {reading.guest:#x}, and {shown(member.domain)} is"
            " direct-mapped",
            hint="say the same host and guest address there",
            rule="direct-map",
        )


def _another_region(
    member: Member, reading: Reading, before: Member, first: Reading
) -> ConfigError:
    def text(one: Reading) -> str:
        host = "no host address" if one.host is None else f"host address {one.host:#x}"
        return f"{host} and size {one.size:#x}"

    return config_error(
        member.place,
        f"region '{member.region_id}' has {text(reading)} here, but {text(first)} in"
        f" {before.place.key}",
        hint="all nodes of a region say the same host address and size",
        rule="different-region",
    )


def _unclear(
    members: Sequence[Member], orders: Sequence[Order], problem: ConfigError
) -> ConfigError:
    at = next(index for index, order in enumerate(orders) if order in _OTHER)
    member, order = members[at], orders[at]
    kind = "a number" if member.numeric else "a string"
    return config_error(
        member.place,
        f"{KEY} of region '{member.region_id}' can be read in two ways: its id, {kind}, stands for"
        f" {order.value}, but then {problem.message}; while"
        f" {member.reading(_OTHER[order])}, and nothing is wrong with that",
        hint=f"write {Order.MERGED.value} and a string as xen,shm-id, in all nodes of the region",
        rule="unclear-order",
    )


def _unclear_without_host(member: Member) -> ConfigError:
    return config_error(
        member.place,
        f"{KEY} has no host address, and with a number as id it can be read in two ways:"
        f" {member.reading(Order.NO_HOST)}; {member.reading(Order.NO_HOST_TURNED)}",
        hint=f"write {Order.NO_HOST.value} and give a string as xen,shm-id",
        rule="unclear-order",
    )
