# SPDX-License-Identifier: LGPL-2.1-or-later
"""Doorbells over a death of the daemon, on arm64: on a Xen with the credit scheduler.

With credit2, the default, the emulated machine stood still in five runs of five when the next
daemon took up a flood of rings: dom0's vCPU runnable (pause_flags=0, an upcall pending; the debug
key q said so) and its processor idle, until any interrupt of that processor, such as a character
for Xen's console, went on with it.  With credit it was never seen.  Whether Xen or QEMU loses the
wake-up is not known; neither xshmd nor dom0's kernel can do anything about it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from integration import Machine
from integration.scenarios.conftest import CONFIG_FOLDERS
from integration.scenarios.host import Host, artefacts
from integration.scenarios.test_doorbells import outlive_the_daemon

pytestmark = [pytest.mark.arch("arm64"), pytest.mark.own_boot]

LIMIT_S = 1800


@pytest.fixture
def credit_host(arch: str) -> Iterator[Host]:
    """A machine whose Xen schedules by credit."""
    folder = artefacts(arch, "sched-credit")
    with Machine(
        arch, artefacts=folder, time_limit_s=LIMIT_S, xen_args=("sched=credit",)
    ) as booted:
        booted.dom0.run(f"mkdir -p {CONFIG_FOLDERS}")
        host = Host(booted)
        host.start_daemon()
        try:
            yield host
        finally:
            host.close()


def test_relayed_doorbells_outlive_the_daemon(credit_host: Host) -> None:
    """Rings stop while no daemon runs, and guests that wait for one are rung by the next."""
    outlive_the_daemon(credit_host)
