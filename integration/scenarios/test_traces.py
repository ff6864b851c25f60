# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random sequences of calls get the same answers from the model and from real Xen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from integration.scenarios.host import Host

TESTS = Path(__file__).resolve().parents[2] / "tests"
USUAL_TRACES = {"arm64": 40, "x86_64": 15}
"""Each sixty calls; emulated x86 is slower."""
SECONDS_EACH = 20.0


@pytest.mark.xen_keeps(4)  # as the contract suite: domains by the dozen
def test_the_model_answers_as_xen_does(host: Host) -> None:
    """``XSHMD_TRACES=first:count`` plays others, or more: `make differential` does."""
    first, count = _chosen(host)
    host.stop_daemon()
    played = host.dom0.run(
        ["python3", "-m", "tests.contract.traces", str(first), str(count)],
        cwd="/rig", timeout_s=60 + SECONDS_EACH * count,
    )  # fmt: skip
    (host.artefacts / "traces.jsonl").write_bytes(played.stdout)
    compared = subprocess.run(
        [sys.executable, "-m", "contract.compare", host.arch],
        input=played.stdout, cwd=TESTS, env=os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
        capture_output=True, check=False,
    )  # fmt: skip
    said = (compared.stdout + compared.stderr).decode()
    assert compared.returncode == 0, said[-4000:]
    assert said.startswith(f"{count} traces compared"), said


def _chosen(host: Host) -> tuple[int, int]:
    if "XSHMD_TRACES" in os.environ:
        first, _, count = os.environ["XSHMD_TRACES"].partition(":")
        return int(first), int(count)
    return 0, USUAL_TRACES[host.arch]
