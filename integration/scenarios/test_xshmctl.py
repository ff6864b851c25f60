# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an admin types: xshmctl, and varlinkctl for all that xshmctl can do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from integration.scenarios.guest import MIB, PAGE, Entry, Guest
from integration.scenarios.host import CONFIGS, SOCKET, Host

pytestmark = pytest.mark.alike


@pytest.fixture
def pair(host: Host) -> Iterator[tuple[Guest, Guest, str]]:
    """Two guests and their region."""
    region = host.unique("demo")
    owner = host.guest("owner", Entry(region, host.at, MIB + PAGE), do="beat")
    borrower = host.guest(
        "borrower", Entry(region, host.at_elsewhere, 16 * PAGE, "borrower", "offset=0x10000"),
        slot=1,
    )  # fmt: skip
    host.create(owner)
    host.create(borrower)
    yield owner, borrower, region
    host.destroy(owner, borrower)


def test_list(host: Host, pair: tuple[Guest, Guest, str]) -> None:
    """`xshmctl list` shows each region on a line with who has it and where, as text and as JSON."""
    owner, borrower, region = pair
    lines = host.xshmctl("list").text.splitlines()
    assert lines[0].split() == ["ID", "SIZE", "LIFETIME", "OWNER", "HOLDER", "MEMBERS"]
    assert lines[1].startswith(f"{region} ")
    assert "1 MiB + 4 KiB" in lines[1]
    for guest, at in ((owner, host.at), (borrower, host.at_elsewhere)):
        assert f"{guest.name}@{at >> 12:#x}" in lines[1]
    assert lines[-1] == "1 region listed."
    bare = host.xshmctl("list", "--no-legend").text.splitlines()
    assert [line.split()[0] for line in bare] == [region]
    for words in (["-j"], ["--json=short"], ["--json=pretty"]):
        listed = json.loads(host.xshmctl("list", *words).text)["regions"]
        assert [r["id"] for r in listed] == [region]
        assert listed[0]["sizeBytes"] == MIB + PAGE
        assert {m["guest"] for m in listed[0]["members"]} == {owner.name, borrower.name}


def test_list_guests(host: Host, pair: tuple[Guest, Guest, str]) -> None:
    """`xshmctl list --guests` shows every guest that has regions, and its state."""
    owner, borrower, region = pair
    text = host.xshmctl("list", "--guests", "--no-legend").text
    rows = {line.split()[0]: line.split() for line in text.splitlines()}
    assert set(rows) == {owner.name, borrower.name}
    assert rows[owner.name][1] == str(host.domid(owner))
    assert rows[owner.name][2] == "attached"
    assert rows[owner.name][4] == region


def test_show(host: Host, pair: tuple[Guest, Guest, str]) -> None:
    """`xshmctl show` says all there is to say; of an unknown region it says so, with status 4."""
    owner, borrower, region = pair
    text = host.xshmctl("show", region).text
    for expected in (region, "1 MiB + 4 KiB (257 frames)", owner.name, borrower.name, "0x10"):
        assert expected in text, text
    shown = json.loads(host.xshmctl("show", "--json=short", region).text)["region"]
    assert shown == host.region(region)
    done = host.xshmctl("show", f"{region}x", check=False)
    assert done.status == 4
    assert done.stderr.decode().startswith(f"xshmctl: there is no region {region}x\nhint: ")
    both = host.xshmctl("show", "nosuch", region, check=False)
    assert both.status == 4
    assert region in both.text


def test_varlinkctl(host: Host, pair: tuple[Guest, Guest, str]) -> None:
    """systemd's own varlinkctl reads the interface and calls it."""
    _, _, region = pair
    run = host.dom0.run
    info = run(["varlinkctl", "info", SOCKET]).text
    assert re.search(r"Product: xshmd", info), info
    assert "io.xshmd.Regions" in info
    assert "io.xshmd.Regions" in run(["varlinkctl", "list-interfaces", SOCKET]).text
    methods = run(["varlinkctl", "list-methods", SOCKET]).text.split()
    assert {"io.xshmd.Regions.ListRegions", "io.xshmd.Regions.DeclareGuest"} <= set(methods)
    text = run(["varlinkctl", "introspect", SOCKET, "io.xshmd.Regions"]).text
    assert "method ListRegions" in text
    called = run(["varlinkctl", "-j", "call", SOCKET, "io.xshmd.Regions.ListRegions", "{}"]).text
    assert json.loads(called)["regions"][0]["id"] == region
    failed = run(
        ["varlinkctl", "call", SOCKET, "io.xshmd.Regions.ShowRegion", '{"id": "nosuch"}'],
        check=False,
    )
    assert failed.status != 0
    assert "io.xshmd.Regions.NoSuchRegion" in failed.stderr.decode() + failed.text


def test_create(host: Host) -> None:
    """`xshmctl create` makes a guest with its regions; -p leaves it paused; -N does nothing."""
    region = host.unique("demo")
    guest = host.guest("made", Entry(region, host.at), do="fill,check")
    path = host.config_path(guest)
    before = host.state()
    dry = host.xshmctl("create", "-N", path).text
    assert f"would run: xl create -p {path}" in dry
    assert f"wait for {region}" in dry
    assert not before.difference(host.state())
    host.created.append(guest)
    done = host.xshmctl("create", "-p", path)
    assert "paused" in done.text
    assert host.ask("pause_count", host.domid(guest)) == 1
    host.xl("unpause", guest.name)
    host.wait_said(guest, "checked pages=256 bad=0 seed=7")
    again = host.xshmctl("create", path, check=False)
    assert again.status == 5
    assert f"a domain called {guest.name} exists already" in again.stderr.decode()
    host.destroy(guest)
    other = host.guest("made", Entry(host.unique("demo"), host.at), do="fill,check")
    host.created.append(other)
    made = json.loads(host.xshmctl("create", "--json=short", host.config_path(other)).text)
    assert made["guest"]["name"] == other.name
    assert made["guest"]["state"] == "attached"
    host.wait_said(other, "checked pages=256 bad=0 seed=7")
    host.destroy(other)


def test_doctor(host: Host) -> None:
    """`xshmctl doctor` finds nothing amiss here, and says what the machine is."""
    done = host.xshmctl("doctor")
    assert "this is a Xen control domain" in done.text
    assert re.search(r"^ok +Xen version: Xen 4\.20", done.text, re.M), done.text
    assert re.search(rf"^ok +daemon: xshmd answers at {SOCKET}", done.text, re.M)
    assert not re.search(r"^failed", done.text, re.M)
    findings = json.loads(host.xshmctl("doctor", "--json=short").text)["findings"]
    assert {finding["verdict"] for finding in findings} <= {"ok", "warning"}
    topics = {finding["topic"] for finding in findings}
    assert {"control domain", "xenstore", "security module", "free memory"} <= topics


def test_daemon_not_running(host: Host) -> None:
    """With no daemon each verb says so, with a hint and status 3, and nothing is done."""
    guest = host.guest("unmade", Entry(host.unique("demo"), host.at))
    host.stop_daemon()
    for words in (["list"], ["show", "x"], ["create", host.config_path(guest)], ["doctor"]):
        done = host.xshmctl(*words, check=False)
        assert done.status == 3, done.describe()
        said = done.stderr.decode() if words != ["doctor"] else done.text
        assert re.search(r"^(xshmctl: |failed +daemon: )no xshmd answers at", said, re.M), said
        assert "hint: " in said
    assert host.domid(guest) is None


def test_not_root(host: Host) -> None:
    """Who is not root is told so, in a line, by the daemon and by xshmctl."""
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    done = host.dom0.run([*nobody, "xshmctl", "list"], check=False)
    assert done.status == 3
    assert re.match(r"xshmctl: .*\nhint: .*root", done.stderr.decode()), done.describe()
    done = host.dom0.run([*nobody, "xshmd", "--socket", "/tmp/none"], check=False)
    assert done.status == 6
    said = done.stderr.decode()
    assert "root" in said
    assert "Traceback" not in said


def test_second_daemon(host: Host) -> None:
    """A second daemon by accident does not take over from the first, nor harm its guests."""
    guest = host.guest("beater", Entry(host.unique("demo"), host.at), do="beat")
    host.create(guest)
    before = host.regions()
    done = host.dom0.run(["xshmd"], check=False, timeout_s=60)
    assert done.status not in (0, -9), done.describe()
    assert "Traceback" not in done.stderr.decode()
    assert host.regions() == before
    host.destroy(guest)


def test_change_what_runs(host: Host, pair: tuple[Guest, Guest, str]) -> None:
    """Attach, detach, create from TOML, remove: each tried with -N first, which changes nothing."""
    owner, _, region = pair
    added = host.unique("demo")
    path = f"{CONFIGS}/{added}.toml"
    host.dom0.put(path, f'[region.{added}]\nsize = "64 KiB"\n')
    entry = f"id={added},begin={host.at_large:#x},size=0x10000,role=borrower"
    mine = host.unique("demo")
    own = f"id={mine},begin={host.at_large:#x},size=0x10000,role=owner,lifetime=members"
    for words in (["create", path], ["attach", owner.name, own], ["reload"]):
        before = host.state()
        dry = host.xshmctl(words[0], "-N", *words[1:])
        assert not before.difference(host.state())
        assert all(line.startswith("would ") for line in dry.text.splitlines()) or "no" in dry.text
    host.xshmctl("create", path)
    assert host.region(added)["sizeBytes"] == 16 * PAGE
    assert host.xshmctl("attach", "nosuchguest", entry, check=False).status == 4
    assert host.xshmctl("remove", "nosuchregion", check=False).status == 4
    assert host.xshmctl("remove", region, check=False).status == 5
    host.xshmctl("remove", added)
    host.xshmctl("attach", str(host.domid(owner)), own)
    assert host.region(mine)["members"][0]["guest"] == owner.name
    host.xshmctl("detach", owner.name, mine)
    assert not [r for r in host.regions() if r["id"] == mine and r["members"]]
    if mine in host.xshmctl("list", "--no-legend").text:
        host.xshmctl("remove", mine)
    assert [r["id"] for r in host.regions()] == [region]


def test_bytes_of_a_region(host: Host, pair: tuple[Guest, Guest, str]) -> None:
    """What `load` writes, guests have; `dump` shows what is there; too much is refused."""
    _, _, region = pair
    run = host.dom0.run
    run(f"head -c 300000 /dev/urandom > {CONFIGS}/image")
    run(f"xshmctl load {region} --offset=8KiB < {CONFIGS}/image")
    host.wait_log(rf"region written .*region='?{region}'? .*offset_bytes=8192", 0)
    run(f"xshmctl dump {region} --offset=0x2000 --length 300000 | cmp - {CONFIGS}/image")
    word = int.from_bytes(host.dom0.get(f"{CONFIGS}/image")[:8], "little")
    assert host.peek(region, 2, 0) == word
    whole = run(f"xshmctl dump {region} | wc -c").text
    assert int(whole) == MIB + PAGE
    done = run(f"xshmctl load {region} --offset=1MiB < {CONFIGS}/image", check=False)
    assert done.status == 5
    assert "hint: " in done.stderr.decode()


def test_watch_and_wait(host: Host) -> None:
    """`monitor` says what happens, `wait` when a guest is ready, `status` how the daemon is."""
    region = host.unique("demo")
    guest = host.guest("seen", Entry(region, host.at, MIB))
    heard = bytearray()
    listening = host.dom0.spawn(
        ["xshmctl", "monitor", "--json=short"],
        on_output=lambda stream, data: heard.extend(data),
        timeout_s=120,
    )
    host.wait(lambda: b'"state"' in heard, "the state comes")
    host.create(guest)
    waited = host.xshmctl("wait", guest.name, "--timeout=60").text
    assert waited.startswith(f"{guest.name}: domain {host.domid(guest)}, attached, with {region}")
    host.wait(lambda: b"peer_joined" in heard, "the peer joins")
    said = host.xshmctl("status").text
    assert re.search(rf"process {host.daemon_pid},", said)
    assert re.search(r"^ *Regions: 1, 1 MiB$", said, re.M)
    host.destroy(guest)
    host.wait(lambda: b"peer_left" in heard, "the peer leaves")
    host.stop_daemon()
    assert listening.wait(60).status == 0
    replies = [json.loads(line) for line in bytes(heard).decode().splitlines()]
    kinds = [reply["event"]["kind"] for reply in replies if reply.get("event")]
    assert kinds.index("peer_joined") < kinds.index("peer_left")


def test_usage(host: Host) -> None:
    """A wrong command line is status 2 with a hint."""
    done = host.xshmctl("lst", check=False)
    assert done.status == 2
    assert re.match(r"xshmctl: .*\nhint: ", done.stderr.decode()), done.describe()
