# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the unit tests' fakes claim of Xen and xenstored is claimed of the real ones, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.scenarios.host import Host

SUITE = Path(__file__).resolve().parent.parent.parent / "tests" / "contract"


@pytest.mark.skipif(not SUITE.is_dir(), reason="there is no contract suite yet")
def test_contract_suite_on_real_xen(host: Host) -> None:
    """The contract suite, which the fakes pass, passes unchanged in dom0."""
    host.stop_daemon()
    done = host.dom0.run(
        ["python3", "-m", "tests.contract.on_xen"], cwd="/rig", check=False, timeout_s=300
    )
    (host.artefacts / "contract.log").write_bytes(done.stdout + done.stderr)
    assert done.status == 0, done.describe()[-6000:]
