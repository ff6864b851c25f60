# SPDX-License-Identifier: LGPL-2.1-or-later
"""Another's client, systemd's varlinkctl, against the real daemon: every method of the contract."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from integration.dom0 import Running
from integration.scenarios.guest import MIB, PAGE, Entry, Guest
from integration.scenarios.host import SOCKET, Host

INTERFACE = "io.xshmd.Regions"
IDL = f"/usr/lib/python3/dist-packages/xshmd/varlink/{INTERFACE}.varlink"


pytestmark = pytest.mark.alike


@pytest.fixture
def varlink(host: Host) -> Varlinkctl:
    """varlinkctl in dom0."""
    return Varlinkctl(host)


class Varlinkctl:
    """Calls the daemon's methods, each by a varlinkctl of its own."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def words(self, method: str, parameters: dict[str, Any], *flags: str) -> Sequence[str]:
        words = ["varlinkctl", "--json=short", *flags, "call", SOCKET, f"{INTERFACE}.{method}"]
        return [*words, json.dumps(parameters)]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        done = self._host.dom0.run(self.words(method, parameters), timeout_s=120)
        reply: dict[str, Any] = json.loads(done.text or "{}")
        return reply

    def fails(self, method: str, **parameters: Any) -> str:
        done = self._host.dom0.run(self.words(method, parameters), check=False, timeout_s=120)
        assert done.status != 0, done.describe()
        return done.stderr.decode() + done.text

    def listen(self, lines: list[dict[str, Any]], **parameters: Any) -> Running:
        """Call Monitor with more; each reply is put into `lines` as it comes."""
        partial = bytearray()

        def heard(stream: int, data: bytes) -> None:
            if stream != 1:
                return
            partial.extend(data)
            *whole, rest = bytes(partial).split(b"\n")
            partial[:] = rest
            # A JSON text sequence: each text begins with a record separator (RFC 7464).
            texts = [line.strip(b"\x1e\r ") for line in whole]
            lines.extend(json.loads(text) or {} for text in texts if text)

        words = self.words("Monitor", parameters, "--more")
        return self._host.dom0.spawn(words, on_output=heard, timeout_s=180)


@pytest.fixture
def guest(host: Host) -> Iterator[tuple[Guest, str]]:
    """A guest that owns a region, both of names nobody else has."""
    region = host.unique("wire")
    guest = host.guest("wired", Entry(region, host.at, MIB), do="beat")
    host.create(guest)
    yield guest, region
    host.destroy(guest)


def test_the_interface_is_valid(host: Host) -> None:
    """varlinkctl takes our interface definition, from the file and from the daemon, as it is."""
    run = host.dom0.run
    text = host.dom0.get(IDL).decode()
    done = run(["varlinkctl", "validate-idl", IDL])
    assert done.status == 0, done.describe()
    assert "SYNTAX" not in done.stderr.decode().upper()
    said = run(["varlinkctl", "introspect", SOCKET, INTERFACE]).text
    declared = set(re.findall(r"^(type|method|error) (\w+)", text, re.M))
    assert set(re.findall(r"^(type|method|error) (\w+)", said, re.M)) == declared
    methods = run(["varlinkctl", "list-methods", SOCKET, INTERFACE]).text.split()
    assert {name.rpartition(".")[2] for name in methods} == {
        name for kind, name in declared if kind == "method"
    }


def test_what_there_is(varlink: Varlinkctl, guest: tuple[Guest, str]) -> None:
    """Lists, the status, the host: in varlinkctl's hands they are what xshmctl prints."""
    made, region = guest
    assert [r["id"] for r in varlink.call("ListRegions")["regions"]] == [region]
    assert varlink.call("ShowRegion", id=region)["region"]["sizeBytes"] == MIB
    assert varlink.call("ListGuests")["guests"][0]["name"] == made.name
    status = varlink.call("Status")["status"]
    assert (status["regionCount"], status["sharedBytes"]) == (1, MIB)
    assert varlink.call("GetHost")["host"]["pageSize"] == PAGE
    assert varlink.call("WaitGuest", name=made.name)["guest"]["state"] == "attached"
    by_domid = str(varlink.call("ListGuests")["guests"][0]["domainId"])
    assert varlink.call("WaitGuest", name=by_domid, timeoutSeconds=0)["guest"]["name"] == made.name
    assert varlink.call("Ping") == {}
    assert f"{INTERFACE}.NoSuchRegion" in varlink.fails("ShowRegion", id="nosuch")


def test_declare_and_withdraw(host: Host, varlink: Varlinkctl) -> None:
    """A configuration is checked through varlinkctl; what is wrong comes back as an error."""
    other = host.guest("said", Entry(host.unique("wire"), host.at, MIB))
    said = varlink.call("DeclareGuest", file="by hand", text=other.config())
    assert said["name"] == other.name
    assert varlink.call("WithdrawGuest", name=other.name) == {}
    wrong = other.config().replace("size=0x100000", "size=17")
    assert f"{INTERFACE}.InvalidConfiguration" in varlink.fails(
        "DeclareGuest", file="by hand", text=wrong
    )


def test_changes(host: Host, varlink: Varlinkctl, guest: tuple[Guest, str]) -> None:
    """A region is made, given to a running guest, taken from it and freed; each tried dry first."""
    made, first = guest
    second, third = host.unique("wire"), host.unique("wire")
    definition = {"id": second, "sizeBytes": 4 * PAGE}
    entry = {"region": second, "firstFrame": host.at_elsewhere >> 12, "frameCount": 4}
    before = host.regions()
    for dry_run in (True, False):
        # The guest's target is the holder of its first region: the new one must be there as well.
        changes = [{"add": definition}, {"attach": {"guest": made.name, "entry": entry}}]
        steps = varlink.call("Apply", changes=changes, dryRun=dry_run)["steps"]
        assert {step["verb"] for step in steps} >= {"create", "attach"}
        assert dry_run == (host.regions() == before)
    assert host.region(second)["members"][0]["guest"] == made.name
    assert f"{INTERFACE}.Conflict" in varlink.fails("RemoveRegion", id=second)
    steps = varlink.call("Detach", guest=made.name, regions=[second])["steps"]
    assert [step["guest"] for step in steps if step["verb"] == "detach"] == [made.name]
    assert host.region(second)["members"] == []
    steps = varlink.call("Attach", guest=str(host.domid(made)), entries=[entry])["steps"]
    assert [step["guest"] for step in steps if step["verb"] == "attach"] == [made.name]
    assert varlink.call("RemoveRegion", id=second, force=True)["steps"][-1]["verb"] == "remove"
    varlink.call("AddRegion", region=dict(definition, id=third))
    assert host.region(third)["sizeBytes"] == 4 * PAGE
    assert f"{INTERFACE}.Conflict" in varlink.fails("AddRegion", region=dict(definition, id=first))
    varlink.call("RemoveRegion", id=third)
    assert varlink.call("Reload", dryRun=True)["steps"] == []
    assert varlink.call("Reload")["steps"] == []
    assert [region["id"] for region in host.regions()] == [first]


def test_bytes(host: Host, varlink: Varlinkctl, guest: tuple[Guest, str]) -> None:
    """Bytes are written into a region and read out of it, and beyond its end nothing is."""
    _, region = guest
    data = bytes(range(200))
    text = base64.b64encode(data).decode()
    offset = MIB - 200
    varlink.call("WriteRegion", id=region, offsetBytes=offset, data=text)
    assert host.peek(region, 255, PAGE - 8) == int.from_bytes(data[-8:], "little")
    read = varlink.call("ReadRegion", id=region, offsetBytes=offset, byteCount=200)["data"]
    assert base64.b64decode(read) == data
    for wrong in (offset + 1, -1, 1 << 62):
        said = varlink.fails("WriteRegion", id=region, offsetBytes=wrong, data=text)
        assert f"{INTERFACE}.InvalidArgument" in said


def test_lease(host: Host, varlink: Varlinkctl, guest: tuple[Guest, str]) -> None:
    """A process that is not of our library leases a region; its pid is said; with it the lease
    goes."""
    _, region = guest
    words = varlink.words("LeaseRegion", {"id": region}, "--more")
    process = host.dom0.spawn(words, timeout_s=120)
    (lease,) = host.wait(lambda: host.region(region)["leases"], "there is a lease")
    assert (lease["processId"], lease["processName"]) == (process.pid, "varlinkctl")
    assert lease["prot"] == "ro"
    process.kill(9)
    host.wait(lambda: not host.region(region)["leases"], "the lease is gone")


def test_lists(host: Host, varlink: Varlinkctl, guest: tuple[Guest, str]) -> None:
    """Bytes of dom0's go into a list of the guest's, and are where the list said."""
    made, region = guest
    word = (1 << 63) + 5
    text = base64.b64encode(word.to_bytes(8, "little")).decode()
    varlink.call("WriteRegion", id=region, offsetBytes=2 * PAGE, data=text)
    asked = {"region": region, "guest": made.name, "direction": "input"}
    first = varlink.call("RegisterList", **asked, ranges=[_bytes(3 * PAGE)])["list"]
    (posted,) = varlink.call("ListLists")["lists"]
    assert (posted["list"], posted["guest"], posted["byteCount"]) == (first, made.name, 8)
    moved = varlink.call(
        "Transfer", region=region, peer=made.name, direction="output", ranges=[_bytes(2 * PAGE)]
    )
    assert moved == varlink.call("AwaitList", list=first, timeoutSeconds=0) == {"byteCount": 8}
    assert host.peek(region, 3, 0) == word
    second = varlink.call("RegisterList", **asked, ranges=[_bytes(4 * PAGE)])["list"]
    assert varlink.call("UnregisterList", list=second) == {}
    assert f"{INTERFACE}.ListCancelled" in varlink.fails("AwaitList", list=second)
    varlink.call("OpenRequestPage", region=region, guest=made.name, offsetBytes=5 * PAGE)
    varlink.call("CloseRequestPage", region=region, guest=made.name)


def _bytes(offset: int) -> dict[str, int]:
    return {"offsetBytes": offset, "byteCount": 8}


def test_memory_ends_with_its_client(varlink: Varlinkctl) -> None:
    """Each varlinkctl is a process of its own, so what one was given the next does not have."""
    buffer = varlink.call("AllocateBuffer", pageCount=1)["buffer"]
    reference = buffer << 32
    place = {"reference": reference, "offsetBytes": 0}
    for said in (
        varlink.fails("AllocateMemory", buffer=buffer, byteCount=16),
        varlink.fails("WriteMemory", **place, data="eHNobQ=="),
        varlink.fails("ReadMemory", **place, byteCount=4),
        varlink.fails("FreeMemory", reference=reference),
        varlink.fails("FreeBuffer", buffer=buffer),
    ):
        assert f"{INTERFACE}.AlreadyFreed" in said
    assert varlink.call("CallXen", call="version")["result"] >> 16 == 4


def test_watch_and_trigger(host: Host, varlink: Varlinkctl) -> None:
    """One varlinkctl watches a byte of a region, another wakes it."""
    region = host.unique("wire")
    guest = host.guest("rung", Entry(region, host.at, MIB, more="doorbells=2"), do="stay")
    host.create(guest)
    place = {"id": region, "offsetBytes": 2 * PAGE}
    heard = bytearray()
    words = varlink.words("Watch", place, "--more")
    watching = host.dom0.spawn(words, on_output=lambda _, data: heard.extend(data), timeout_s=120)
    host.wait(lambda: heard, "it is told that it watches")
    assert varlink.call("Trigger", **place)["woken"] == 1
    host.wait(lambda: heard.count(b"triggered") >= 2, "it is woken")
    watching.kill(9)
    host.destroy(guest)


def test_monitor(host: Host, varlink: Varlinkctl) -> None:
    """`varlinkctl call --more Monitor` prints the state, and each peer that joins or leaves."""
    lines: list[dict[str, Any]] = []
    listening = varlink.listen(lines)
    host.wait(lambda: lines, "the state comes")
    assert lines[0]["state"] == {"regions": [], "guests": []}
    region = host.unique("wire")
    guest = host.guest("peer", Entry(region, host.at, MIB))
    host.create(guest)

    def seen(kind: str) -> list[dict[str, Any]]:
        events = [line["event"] for line in lines if line.get("event")]
        return [each for each in events if each["kind"] == kind and each.get("region") == region]

    joined = host.wait(lambda: seen("peer_joined"), "a peer joins")[0]
    assert (joined["guest"], joined["domainId"]) == (guest.name, host.domid(guest))
    assert joined["entry"]["firstFrame"] == host.at >> 12
    assert joined["sizeBytes"] == MIB
    host.destroy(guest)
    left = host.wait(lambda: seen("peer_left"), "the peer leaves")[0]
    assert left["guest"] == guest.name
    host.wait(lambda: seen("region_removed"), "the region goes")
    host.stop_daemon()
    done = listening.wait(60)
    assert done.status == 0, done.describe()


def test_monitor_must_be_asked_for_more(host: Host, varlink: Varlinkctl) -> None:
    """Without --more varlinkctl is told what it lacks; with a time limit it comes to its end."""
    assert "org.varlink.service.ExpectedMore" in varlink.fails("Monitor")
    lines: list[dict[str, Any]] = []
    assert varlink.listen(lines, timeoutSeconds=1).wait(60).status == 0
    assert "state" in lines[0]
