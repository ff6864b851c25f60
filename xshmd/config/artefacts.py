# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest's owner copies into the guest so that it finds its regions, as text.

All of it is a function of the guest's configuration alone, the same on every run.  Addresses are
those the guest sees; offsets count from the start of a region.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Final, Literal

from xshmd.config import dts_text
from xshmd.config.c_header import c_header
from xshmd.config.own_regions import own_regions
from xshmd.model import GuestConfig, RegionRequest, Role
from xshmd.units import address_of, bytes_of

BINDING: Final = "xen,shared-memory-v1"
"""Linux's binding, Documentation/devicetree/bindings/reserved-memory/xen,shared-memory.txt."""
_CELLS: Final = ("#address-cells = <2>;", "#size-cells = <2>;")


def partial_devicetree(config: GuestConfig) -> str:
    """Return a device tree source for ``device_tree=`` of an Arm guest's xl configuration.

    libxl copies /passthrough with all below it into the guest's tree, and /aliases, and nothing
    else (copy_partial_fdt in tools/libs/light/libxl_arm.c), so the regions are there and not in
    /reserved-memory.  It wants the properties that docs/misc/arm/passthrough.txt lists.

    Raises:
        ConfigError: the guest has no region, or one whose place is not known.
    """
    passthrough = [
        'compatible = "simple-bus";',
        "ranges;",
        *_CELLS,
        *_region_nodes(config, labelled=False),
    ]
    body = [*_CELLS, "", *dts_text.node("passthrough", passthrough)]
    lines = ["/dts-v1/;", "", *dts_text.node("/", body)]
    return _head(config, 'Compile it with dtc -O dtb, and say device_tree="FILE.dtb".') + _text(
        lines
    )


def reserved_memory(config: GuestConfig) -> str:
    """Return a device tree source to include after the guest's own, in Linux's binding.

    Raises:
        ConfigError: the guest has no region, or one whose place is not known.
    """
    lines = dts_text.node("/", _reserved(config))
    how = "Include it after the guest's own tree, whose root has 2 address and 2 size cells."
    return _head(config, how) + _text(lines)


def overlay(config: GuestConfig) -> str:
    """Return a device tree overlay source, as dtc -@ compiles it and Linux or U-Boot apply it.

    Raises:
        ConfigError: the guest has no region, or one whose place is not known.
    """
    lines = ["/dts-v1/;", "/plugin/;", "", *dts_text.node("&{/}", _reserved(config))]
    return _head(config, "Compile it with dtc -@ -O dtb; the root has 2+2 cells.") + _text(lines)


def zephyr_overlay(config: GuestConfig) -> str:
    """Return a Zephyr overlay: ``DT_REG_ADDR(DT_NODELABEL(xshm_ID))`` is where region ID begins.

    Zephyr reads it after the board's tree, so it has no header of its own.

    Raises:
        ConfigError: the guest has no region, or one whose place is not known.
    """
    lines = dts_text.node("&{/}", _reserved(config))
    return _head(
        config, "Give it to Zephyr's build as an overlay; the root has 2+2 cells."
    ) + _text(lines)


def memmap_arguments(config: GuestConfig, kind: Literal["reserve", "pmem"] = "reserve") -> str:
    """Return arguments for an x86 Linux command line, in one line.

    ``reserve`` keeps the range from being used for anything else; ``pmem`` makes it /dev/pmemN.
    In a GRUB configuration each ``$`` is to be written ``\\\\\\$``; in xl's ``extra`` as it is.

    Raises:
        ConfigError: the guest has no region, or one whose place is not known.
    """
    mark = {"reserve": "$", "pmem": "!"}[kind]
    return " ".join(
        f"memmap={request.size_bytes:#x}{mark}{address_of(request.first_gfn):#x}"
        for request in own_regions(config)
    ) + "\n"  # fmt: skip


ARTEFACTS: Final[Mapping[str, Callable[[GuestConfig], str]]] = MappingProxyType(
    {
        "partial-dts": partial_devicetree,
        "reserved-memory": reserved_memory,
        "memmap": memmap_arguments,
        "pmem": lambda config: memmap_arguments(config, "pmem"),
        "header": c_header,
        "overlay": overlay,
        "zephyr-overlay": zephyr_overlay,
    }
)
"""By the word that ``xshmctl convert --to`` knows each of them by."""


def _reserved(config: GuestConfig) -> list[str]:
    return dts_text.node("reserved-memory", [*_CELLS, "ranges;", *_region_nodes(config)])


def _region_nodes(config: GuestConfig, *, labelled: bool = True) -> Iterator[str]:
    """Yield the nodes under the names that Xen gives them (make_shm_resv_memory_node).

    A label may become a phandle, and in what libxl copies that could be one of its own.
    """
    regions = own_regions(config)
    labels = dts_text.identifiers([request.region_id for request in regions])
    for request, label in zip(regions, labels, strict=True):
        begin = address_of(request.first_gfn)
        name = f"xen-shmem@{begin:x}"
        label = f"xshm_{label}" if labelled else ""
        yield from ["", *dts_text.node(name, _properties(request, begin), label=label)]


def _properties(request: RegionRequest, begin: int) -> Iterator[str]:
    yield f"compatible = {dts_text.string(BINDING)};"
    yield f"reg = {dts_text.cells(begin, request.size_bytes)};"
    yield f"xen,id = {dts_text.string(request.region_id)};"
    if request.role is Role.BORROWER:
        yield f"xen,offset = {dts_text.cells(bytes_of(request.offset_frames))};"


def _head(config: GuestConfig, how: str) -> str:
    return dts_text.comment(f"Shared memory of guest '{config.name}'. {how}")


def _text(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
