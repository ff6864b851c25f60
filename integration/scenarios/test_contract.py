# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the unit tests' fakes claim of Xen and xenstored is claimed of the real ones, too."""

from __future__ import annotations

import pytest

from integration.scenarios.host import Host


@pytest.mark.counts_as(12)
@pytest.mark.xen_keeps(24)
def test_contract_suite_on_real_xen(host: Host) -> None:
    """The contract suite, which the fakes pass, passes unchanged in dom0.

    Seen on x86: 15 pages of Xen's stay away after the first time in a boot and none after the next
    ones, most of them for the thousand grants of dom0's own.  A domain that leaks costs thirty.
    """
    host.stop_daemon()
    host.plain_memory()
    done = host.dom0.run(
        ["python3", "-m", "tests.contract.on_xen"], cwd="/rig", check=False, timeout_s=900
    )
    (host.artefacts / "contract.log").write_bytes(done.stdout + done.stderr)
    assert done.status == 0, done.describe()[-6000:]
