# SPDX-License-Identifier: LGPL-2.1-or-later
"""The model keeps the contract that real Xen keeps (``python3 -m tests.contract.on_xen``)."""

from __future__ import annotations

import pytest
from contract.cases import CASES, Case
from contract.host import ContractHost
from fakes.hypervisor import SimulatedXen

from xshmd.model import Arch


@pytest.mark.parametrize("arch", list(Arch), ids=str)
@pytest.mark.parametrize(("name", "case"), CASES, ids=[name for name, _ in CASES])
def test_contract(name: str, case: Case, arch: Arch) -> None:
    xen = SimulatedXen(arch, total_pages=1 << 18, dom0_pages=1 << 16)
    free = xen.free_pages
    with ContractHost(xen) as make:
        case(xen, make)
        xen.check()
    xen.check()
    assert xen.free_pages == free
    assert [info.domid for info in xen.domains()] == [0]


def test_names_are_unique() -> None:
    names = [name for name, _ in CASES]
    assert len(set(names)) == len(names) >= 60
