# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client that is not ours: python3-varlink, whose I/O blocks: the daemon is in a thread."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import varlink
from fakes.hypercalls import SimulatedCalls
from scatter_words import Toy
from varlink_fakes import FakeRegions, daemon

from xshmd.daemon.buffer_methods import BufferMethods
from xshmd.daemon.list_methods import ListMethods
from xshmd.varlink import idl


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[Any]:
    toy = Toy()
    others = ListMethods(toy.scatter, toy.mediator), BufferMethods(SimulatedCalls())
    with (
        daemon(tmp_path / "socket", FakeRegions(), *others),
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


CALLS: dict[str, dict[str, Any]] = {
    "ListRegions": {},
    "ShowRegion": {"id": "r0"},
    "ListGuests": {},
    "DeclareGuest": {"file": "a.cfg", "text": 'name = "a"\n'},
    "WithdrawGuest": {"name": "a"},
    "WaitGuest": {"name": "ctl", "timeoutSeconds": 5},
    "AddRegion": {"region": {"id": "r9", "sizeBytes": 4096}, "dryRun": True},
    "RemoveRegion": {"id": "r0", "force": True},
    "Attach": {"guest": "ctl", "entries": [{"region": "r9", "firstFrame": 1, "frameCount": 1}]},
    "Detach": {"guest": "ctl", "regions": ["r0"]},
    "Apply": {"changes": [{"remove": {"region": "r0"}}]},
    "Reload": {"dryRun": False},
    "ReadRegion": {"id": "r0", "offsetBytes": 0, "byteCount": 16},
    "WriteRegion": {"id": "r0", "offsetBytes": 0, "data": "eHNobQ=="},
    "Trigger": {"id": "r0", "offsetBytes": 4096},
    "Status": {},
    "GetHost": {},
    "Ping": {},
}
PART = [{"offsetBytes": 0, "byteCount": 16}]
FROM = [{"offsetBytes": 8192, "byteCount": 16}]
LISTS: list[tuple[str, dict[str, Any]]] = [
    # A list is filled, and what came of it asked for; another is taken back.
    ("RegisterList", {"region": "r", "guest": "a", "direction": "input", "ranges": PART}),
    ("ListLists", {}),
    ("Transfer", {"region": "r", "peer": "a", "direction": "output", "ranges": FROM}),
    ("AwaitList", {"list": 1, "timeoutSeconds": 5}),
    ("RegisterList", {"region": "r", "guest": "b", "direction": "output", "ranges": PART}),
    ("UnregisterList", {"list": 2}),
    ("OpenRequestPage", {"region": "r", "guest": "a", "offsetBytes": 4096}),
    ("CloseRequestPage", {"region": "r", "guest": "a"}),
]
MEMORY: list[tuple[str, dict[str, Any]]] = [
    # None stands for what the call before gave.
    ("AllocateBuffer", {"pageCount": 1}),
    ("AllocateMemory", {"buffer": None, "byteCount": 16}),
    ("WriteMemory", {"reference": None, "offsetBytes": 0, "data": "eHNobQ=="}),
    ("ReadMemory", {"reference": None, "offsetBytes": 0, "byteCount": 4}),
    ("CallXen", {"call": "extraversion", "reference": None}),
    ("FreeMemory", {"reference": None}),
    ("FreeBuffer", {"buffer": None}),
]
STREAMS = {"Monitor", "LeaseRegion", "Watch"}
CONTRACT = idl.load("io.xshmd.Regions")


def test_no_method_is_forgotten_here() -> None:
    played = {method for method, _ in (*LISTS, *MEMORY)}
    assert CALLS.keys() | played | STREAMS == CONTRACT.methods.keys()


def test_no_method_is_forgotten_by_the_scenarios_of_varlinkctl() -> None:
    text = (Path(__file__).parents[1] / "integration/scenarios/test_varlink_foreign.py").read_text()
    called = set(re.findall(r'\.(?:call|fails|words)\(\s*"(\w+)"', text))
    assert called == CONTRACT.methods.keys()


@pytest.mark.parametrize("method", CALLS)
def test_it_calls_every_method(foreign: Any, method: str) -> None:
    with foreign.open(CONTRACT.name) as regions:
        reply = getattr(regions, method)(**CALLS[method])
    CONTRACT.check(CONTRACT.methods[method].gives, reply)


@pytest.mark.parametrize("session", [LISTS, MEMORY], ids=["lists", "memory"])
def test_it_calls_what_follows_from_each_other(
    foreign: Any, session: list[tuple[str, dict[str, Any]]]
) -> None:
    given: dict[str, Any] = {}
    with foreign.open(CONTRACT.name) as regions:
        for method, parameters in session:
            asked = {key: given.get(key) if it is None else it for key, it in parameters.items()}
            reply = getattr(regions, method)(**asked)
            CONTRACT.check(CONTRACT.methods[method].gives, reply)
            given |= reply
    assert given.get("byteCount", 16) == 16
    assert given.get("data", "eHNobQ==") == "eHNobQ=="


def test_it_watches(foreign: Any) -> None:
    with foreign.open(CONTRACT.name) as regions:
        reply = next(iter(regions.Watch("r0", 4096, _more=True)))
    CONTRACT.check(CONTRACT.methods["Watch"].gives, reply)


def test_it_monitors(foreign: Any) -> None:
    with foreign.open(CONTRACT.name) as regions:
        replies = list(regions.Monitor(timeoutSeconds=0, _more=True))
    for reply in replies:
        CONTRACT.check(CONTRACT.methods["Monitor"].gives, reply)
    assert [bool(reply) for reply in replies] == [True, False]
    assert replies[0]["state"]["regions"][0]["id"] == "r0"


def test_it_leases(foreign: Any) -> None:
    with foreign.open(CONTRACT.name) as regions:
        reply = next(iter(regions.LeaseRegion("r0", "rw", _more=True)))
    CONTRACT.check(CONTRACT.methods["LeaseRegion"].gives, reply)
    assert reply["mapping"]["frameCount"] == 256


def test_it_understands_our_errors(foreign: Any) -> None:
    with foreign.open("io.xshmd.Regions") as regions:
        with pytest.raises(varlink.VarlinkError) as caught:
            regions.ShowRegion("nope")
        assert caught.value.error() == "io.xshmd.Regions.NoSuchRegion"
        assert caught.value.parameters()["facts"] == {"id": "nope"}
        with pytest.raises(varlink.InvalidParameter):
            regions.WaitGuest("ctl", -1)
        assert regions.Ping() == {}
