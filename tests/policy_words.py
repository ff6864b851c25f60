# SPDX-License-Identifier: LGPL-2.1-or-later
"""Words in which the tests of the rules are written."""

from typing import Any

from xshmd.errors import XshmError
from xshmd.machine import Arch, HostInfo
from xshmd.model import GuestConfig, GuestType, Place, RegionRequest, Role
from xshmd.units import gfn_of

X86_FREE, ARM_FREE = 0x1000000000, 0x3A000000


def request(
    address: int = X86_FREE, frames: int = 1, index: int = 0, file: str = "vm.cfg", **more: Any
) -> RegionRequest:
    values: dict[str, Any] = {
        "region_id": "r",
        "first_gfn": gfn_of(address),
        "nr_frames": frames,
        "role": Role.OWNER,
        "place": Place(file=file, key=f"static_shm[{index}]", line=index + 5),
    }
    return RegionRequest(**(values | more))


def guest(*requests: RegionRequest, **more: Any) -> GuestConfig:
    values: dict[str, Any] = {"name": "vm", "memory_mib": 64, "guest_type": GuestType.PVH}
    return GuestConfig(requests=requests, **(values | more))


def host(
    arch: Arch = Arch.X86_64,
    version: tuple[int, int] = (4, 20),
    *,
    has_hvm: bool = True,
    has_hap: bool = True,
) -> HostInfo:
    return HostInfo(
        arch=arch, xen_version=version, xen_extra=".1", xen_command_line="",
        has_hvm=has_hvm, has_hap=has_hap, free_pages=1 << 20, total_pages=1 << 21,
    )  # fmt: skip


X86, ARM = host(), host(Arch.ARM64)


def one(errors: tuple[XshmError, ...], kind: type[XshmError], *words: str) -> XshmError:
    """Check that there is one error of this very class that says all the words, well."""
    (error,) = errors
    assert type(error) is kind
    for word in words:
        assert word in error.one_line()
    assert error.message.startswith("vm.cfg:")
    assert error.facts["file"] == "vm.cfg"
    assert str(error.facts["place"]).startswith("static_shm[")
    assert error.hint
    assert not error.message.endswith(".")
    return error
