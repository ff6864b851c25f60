# SPDX-License-Identifier: LGPL-2.1-or-later
"""What xshmctl shows of processes that have leases."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from varlink_fakes import SNAPSHOT, FakeRegions, daemon

from xshmd.ctl.__main__ import main
from xshmd.ctl.monitor import _event
from xshmd.events import Event, EventKind
from xshmd.model import Lease, Process, Prot
from xshmd.varlink.records import event_fields

VIEWER = Lease(
    lease_id="l", region_id="r0", prot=Prot.RO,
    process=Process(pid=77, uid=1000, started=9, name="view\ner"),
)  # fmt: skip
NAMELESS = dataclasses.replace(VIEWER, lease_id="m", process=Process(pid=8, uid=0))
OTHERS = dataclasses.replace(VIEWER, lease_id="n", region_id="r1")


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRegions]:
    api = FakeRegions()
    api.now = dataclasses.replace(SNAPSHOT, leases=(VIEWER, NAMELESS, OTHERS))
    monkeypatch.setenv("XSHMD_SOCKET", str(tmp_path / "socket"))
    with daemon(tmp_path / "socket", api):
        yield api


@pytest.mark.usefixtures("api")
def test_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--no-legend"]) == 0
    members = capsys.readouterr().out.split()[-1].split(",")
    assert members == ["ctl@0x38000000", "log@0x40000000", "dom0:8", "dom0:77"]
    assert main(["show", "r0"]) == 0
    shown = capsys.readouterr().out
    assert "dom0 (process 77, view?er, user 1000): lease ro\n" in shown
    assert "dom0 (process 8, user 0): lease ro\n" in shown
    assert shown.count("lease ro") == 2


def test_monitor() -> None:
    event = Event(kind=EventKind.LEASE_ENDED, region="r0", lease=VIEWER, reason="process ended")
    said = _event(event_fields(event))
    assert said == "region r0, process 77 of dom0, ro: process ended"
