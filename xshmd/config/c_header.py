# SPDX-License-Identifier: LGPL-2.1-or-later
"""A C header that tells a guest's program where its regions are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from xshmd.config import dts_text
from xshmd.config.own_regions import own_regions
from xshmd.model import GuestConfig, Prot, RegionRequest, Role
from xshmd.units import address_of, bytes_of

_ROLES: Final = {Role.OWNER: "XSHM_ROLE_OWNER", Role.BORROWER: "XSHM_ROLE_BORROWER"}

_TYPES: Final = """\
#define XSHM_ROLE_OWNER 1
#define XSHM_ROLE_BORROWER 2

struct xshm_region {
    const char *id;
    uint64_t begin;  /* guest-physical address of its first byte */
    uint64_t size;   /* bytes */
    uint64_t offset; /* first byte of the region that is at begin */
    int role;
    int writable;    /* 0: the guest agreed not to write */
};
"""
_TABLE: Final = """\
#if defined(__GNUC__)
__attribute__((unused))
#endif
static const struct xshm_region xshm_regions[XSHM_NR_REGIONS] = {
"""


def c_header(config: GuestConfig) -> str:
    """Return the header, in C11 and C++11: macros for each region, and a table of all.

    Raises:
        ConfigError: the guest has no region, or one whose place is not known.
    """
    regions = own_regions(config)
    names = [
        f"XSHM_{name.upper()}"
        for name in dts_text.identifiers([request.region_id for request in regions])
    ]
    parts = [
        "/* SPDX-License-Identifier: BSD-2-Clause */\n",
        dts_text.comment(f"Shared memory of guest '{config.name}', written by xshmctl convert."),
        "#ifndef XSHM_REGIONS_H\n#define XSHM_REGIONS_H\n\n#include <stdint.h>\n\n",
        _TYPES,
        f"\n#define XSHM_NR_REGIONS {len(regions)}\n",
    ]
    parts += [
        "\n" + "".join(_macros(name, request)) for name, request in zip(names, regions, strict=True)
    ]
    parts.append("\n" + _TABLE)
    parts += [_entry(name, request) for name, request in zip(names, regions, strict=True)]
    parts.append("};\n\n#endif\n")
    return "".join(parts)


def _macros(name: str, request: RegionRequest) -> Iterator[str]:
    yield f"#define {name}_ID {_string(request.region_id)}\n"
    yield f"#define {name}_BEGIN UINT64_C({address_of(request.first_gfn):#x})\n"
    yield f"#define {name}_SIZE UINT64_C({request.size_bytes:#x})\n"
    yield f"#define {name}_OFFSET UINT64_C({bytes_of(request.offset_frames):#x})\n"
    yield f"#define {name}_ROLE {_ROLES[request.role]}\n"
    yield f"#define {name}_WRITABLE {int(request.prot is Prot.RW)}\n"


def _entry(name: str, request: RegionRequest) -> str:
    lines = (("ID", "BEGIN", "SIZE"), ("OFFSET", "ROLE", "WRITABLE"))
    texts = [", ".join(f"{name}_{field}" for field in fields) for fields in lines]
    return "    { " + ",\n      ".join(texts) + " },\n"


def _string(text: str) -> str:
    """Write a string literal; a question mark is escaped for want of trigraphs."""
    plain = dts_text.printable(text)
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"').replace("?", "\\?") + '"'
