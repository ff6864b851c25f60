# SPDX-License-Identifier: LGPL-2.1-or-later
"""The trees that dom0less is published with, read by xshmd, with guests made by plain `xl create`.

Host addresses are another machine's: those this one has no such memory at are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from integration.cache import Cache
from integration.scenarios.guest import MIB, Guest
from integration.scenarios.host import Host, names
from integration.toolroot import ToolRoot

pytestmark = pytest.mark.arch("arm64")

TREES: Final = Path(__file__).parents[2] / "tests" / "data" / "dts"
FOLDER: Final = "/etc/xshmd/regions.d"
SIZE: Final = 512 * MIB
BESIDE: Final = 0x500_0000
WITH_HOST_ADDRESS: Final = re.compile(
    r"\n *[a-z0-9-]+ \{[^{}]*xen,shared-mem = <\S+ \S+ \S+>;\s*\};", re.S
)
"""A region's node, in a tree with a cell for each number."""


@pytest.fixture(autouse=True)
def folder(host: Host) -> Iterator[None]:
    yield
    host.dom0.run(f"rm -rf {FOLDER}")


def put_tree(host: Host, text: str, tmp_path: Path) -> str:
    """Compile a tree and have xshmd find it; return its path."""
    (tmp_path / "tree.dts").write_text(text)
    compile_it = ["dtc", "-q", "-I", "dts", "-O", "dtb", "-o", "/rig/dt/tree.dtb"]
    ToolRoot.get(Cache()).run([*compile_it, "/rig/dt/tree.dts"], binds={tmp_path: "/rig/dt"})
    host.dom0.put(f"{FOLDER}/example.dtb", (tmp_path / "tree.dtb").read_bytes())
    return f"{FOLDER}/example.dtb"


def domu(host: Host, number: int, at: int, size: int, do: str) -> Guest:
    """A guest of a tree's: its name is that of its node, its configuration says nothing of it."""
    free_banks = 'static_shm_extended_regions = "unused"'
    guest = Guest(
        name=f"domU{number}", arch=host.arch, do=do, slot=number - 1, shm=f"shm={at:#x},{size:#x}",
        lines=(free_banks,),
    )  # fmt: skip
    host.write(guest)
    return guest


def test_what_has_no_host_address_is_shared(host: Host, tmp_path: Path) -> None:
    """The region of 512 MiB of booting.txt, where it says, in both of its guests."""
    text, left_out = WITH_HOST_ADDRESS.subn("", (TREES / "booting.dts").read_text())
    assert left_out == 4
    put_tree(host, text, tmp_path)
    owner = domu(host, 1, 0x8000_0000, SIZE, "fill,pong")
    borrower = domu(host, 2, 0x9000_0000, SIZE, "await-fill,check,ping")
    host.create(owner)
    host.create(borrower)
    host.wait_said(borrower, "checked pages=131072 bad=0 seed=7")
    host.wait_said(borrower, "ping rounds=100 .*")
    assert names(host.regions()) == ["my-shared-mem-2"]
    host.destroy(borrower, owner)
    host.wait(lambda: not host.regions(), "the region went with its owner")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        # There is memory of another machine at 0x10000000; of this one, registers.
        ("booting", "the host memory .* cannot be given to guests: memory 0 of PCI device .*"),
        ("design-2022", "the host memory .* cannot be given to guests: memory 0 of PCI device .*"),
        # What Xen's smoke test has no redistributors at, a guest made by xl on a GICv3 has.
        ("smoke-test", ".* at 0x4000000-0x13ffffff is on the interrupt controller, .*"),
    ],
    ids=["booting", "design-2022", "smoke-test"],
)
def test_another_machines_addresses_are_refused(
    host: Host, tmp_path: Path, name: str, reason: str
) -> None:
    """As published: whoever is to have what this machine has not is not made, and it says why."""
    put_tree(host, (TREES / f"{name}.dts").read_text(), tmp_path)
    guest, since = domu(host, 1, 0x6000_0000, MIB, "peek"), host.mark
    assert host.create(guest, check=False).status != 0
    host.wait_gone(guest)
    ((refused, why),) = host.refusals(since)
    assert refused == "domU1"
    assert re.fullmatch(reason, why)
    assert host.regions() == []


def test_a_host_address_that_this_machine_has(host: Host, tmp_path: Path) -> None:
    """Xen's smoke test, its addresses and size changed to what there is: a device's memory, and
    a place beside the redistributors."""
    size, at = MIB, host.plain_memory_at()
    text = (TREES / "smoke-test.dts").read_text()
    published = "<0x0 0x50000000 0x0 0x4000000 0x0 0x10000000>"
    assert published in text
    here = f"<{at >> 32:#x} {at & 0xFFFFFFFF:#x} 0x0 {BESIDE:#x} 0x0 {size:#x}>"
    put_tree(host, text.replace(published, here), tmp_path)
    for do, said in (
        ("fill", "filled pages=256 seed=7"),
        ("check", "checked pages=256 bad=0 seed=7"),
    ):
        guest = domu(host, 1, BESIDE, size, do)
        host.create(guest)
        host.wait_said(guest, said)
        host.destroy(guest)
    host.dom0.run(f"rm -rf {FOLDER}")
    host.xshmctl("reload")
    assert host.regions() == []
