# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client that is not ours: python3-varlink, whose I/O blocks: the daemon is in a thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import varlink
from varlink_fakes import FakeRegions, daemon

from xshmd.varlink import idl


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[Any]:
    with (
        daemon(tmp_path / "socket", FakeRegions()),
        varlink.Client.new_with_address(f"unix:{tmp_path / 'socket'}") as client,
    ):
        yield client


def test_it_finds_and_reads_our_interfaces(foreign: Any) -> None:
    info = foreign.get_interfaces()
    assert set(info) == {"io.xshmd.Regions", "org.varlink.service"}
    described = foreign.get_interface("io.xshmd.Regions")
    assert described.description == idl.load("io.xshmd.Regions").text


def test_it_calls_our_methods(foreign: Any) -> None:
    with foreign.open("io.xshmd.Regions") as regions:
        assert regions.Ping() == {}
        (region,) = regions.ListRegions()["regions"]
        assert region["members"][1]["offsetFrames"] == 1
        assert regions.WaitGuest("ctl", 5)["guest"]["domainId"] == 5
        assert regions.DeclareGuest("a.cfg", 'name = "é"\n')["name"] == "é"


def test_it_understands_our_errors(foreign: Any) -> None:
    with foreign.open("io.xshmd.Regions") as regions:
        with pytest.raises(varlink.VarlinkError) as caught:
            regions.ShowRegion("nope")
        assert caught.value.error() == "io.xshmd.Regions.NoSuchRegion"
        assert caught.value.parameters()["facts"] == {"id": "nope"}
        with pytest.raises(varlink.InvalidParameter):
            regions.WaitGuest("ctl", -1)
        assert regions.Ping() == {}
