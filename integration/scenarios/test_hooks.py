# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hooks for those who do not use plain xl, and what admins are told: journal and metrics."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from integration import Completed
from integration.scenarios.guest import Entry, Guest
from integration.scenarios.host import GRACE_S, Host, names

HOOKS = "/usr/lib/python3/dist-packages/xshmd/resources/hooks"
SCRIPTS = "/etc/xen/scripts"
PLAIN = "vif-plain"
SEEN = "/run/xshm-vif-seen"
METRICS = "/run/xshmd.prom"
JOURNAL = "/run/systemd/journal"
GRANTED = "4c72f4e1fc0a431c937307411b05416c"
WITHDRAWN = "eec7e4ded95946ee8869d59429f518c0"
ASKED = "786540d8fbab466793fc0e848f53c58d"


# -- saving ---------------------------------------------------------------------------------------


@pytest.mark.arch("x86_64")
def test_save_is_refused_and_harms_nobody(host: Host) -> None:
    """libxl refuses to save a guest with a region before it touches it: it runs on, and so does its
    peer.  What xl leaves of the file is known for what it is, and removed."""
    region = host.unique("demo")
    beater = host.guest("beater", Entry(region, host.at), do="fill,beat-watch")
    watcher = host.guest("watcher", Entry(region, host.at, role="borrower"), do="watch", slot=1)
    host.create(beater)
    host.create(watcher)
    host.wait_beats(watcher, 0)
    folder = "/var/lib/xen/save-test"
    host.dom0.run(["mkdir", folder])
    done = host.xl("save", beater.name, f"{folder}/{beater.name}", check=False)
    assert done.status != 0
    assert "Suspend event channel initialization failed" in done.stderr.decode()
    host.wait_beats(watcher, 0)
    assert names(host.region(region)["members"], "state") == ["attached"] * 2
    listed = host.dom0.run(["ls", folder]).text
    assert listed == beater.name  # xl's header and nothing of the guest
    said = host.dom0.run([f"{HOOKS}/xshm-forget-stubs", folder]).text
    assert beater.name in said
    host.dom0.run(["rmdir", folder])
    host.destroy(beater, watcher)


def test_saving_is_forbidden_where_there_is_something_to_lose(host: Host) -> None:
    """And only there.  Arm's xl has no save, but others may ask libxl for one."""
    sharer = host.guest("sharer", Entry(host.unique("demo"), host.at))
    plain = host.guest("plain")
    said = []
    for guest in (sharer, plain):
        host.create(guest)
        node = f"/local/domain/{host.domid(guest)}/device/suspend/event-channel"
        said.append(host.dom0.run(["xenstore-read", node]).text)
    assert said == ["xshmd: a guest with shared memory can be neither saved nor migrated", ""]
    host.destroy(sharer, plain)


# -- the network device's script ------------------------------------------------------------------


class Vif:
    """Guests with a network device that is set up by way of xshm-vif."""

    line = f'vif = [ "script={SCRIPTS}/xshm-vif" ]'

    def __init__(self, host: Host) -> None:
        self.host = host
        dom0 = host.dom0
        dom0.run(["modprobe", "xen-netback"])
        dom0.run(["install", "-m", "755", f"{HOOKS}/xshm-vif", f"{SCRIPTS}/xshm-vif"])
        # In place of vif-bridge: it notes how far the guest is, and says that the device is there.
        dom0.put(
            f"{SCRIPTS}/{PLAIN}",
            "#!/bin/sh\n"
            '[ "$1" = online ] || exit 0\n'
            f"xshmctl list --guests --no-legend >>{SEEN}\n"
            f'echo "online $vif" >>{SEEN}\n'
            'xenstore-write "$XENBUS_PATH/hotplug-status" connected\n',
            mode=0o755,
        )
        dom0.run(["rm", "-f", SEEN])

    def xl(self, *words: str, check: bool = True) -> Completed:
        env = {"XSHM_VIF_SCRIPT": PLAIN}
        return self.host.dom0.run(["xl", *words], env=env, check=check, timeout_s=180)

    def create(self, guest: Guest, *, check: bool = True) -> Completed:
        self.host.created.append(guest)
        return self.xl("create", self.host.config_path(guest), check=check)

    def seen(self) -> str:
        return self.host.dom0.run(f"cat {SEEN}", check=False).text


@pytest.fixture
def vif(host: Host) -> Iterator[Vif]:
    vif = Vif(host)
    yield vif
    host.dom0.run(f"rm -f {SEEN} {SCRIPTS}/xshm-vif {SCRIPTS}/{PLAIN}")


@pytest.mark.alike
@pytest.mark.xen_keeps(64)  # what netback allocates once, when its first device is made
def test_vif_script_waits_for_the_memory(host: Host, vif: Vif) -> None:
    """The device is set up when the guest has its regions; a guest without any is not held up."""
    sharer = host.guest("sharer", Entry(host.unique("demo"), host.at), do="stay", lines=(vif.line,))
    vif.create(sharer)
    assert re.search(rf"^{sharer.name} .*attached", vif.seen(), re.M), vif.seen()
    host.dom0.run(["rm", SEEN])
    plain = host.guest("plain", do="stay", lines=(vif.line,))
    vif.create(plain)
    assert "online vif" in vif.seen()
    for guest in (plain, sharer):
        vif.xl("destroy", guest.name)


@pytest.mark.alike
@pytest.mark.xen_keeps(64)
def test_vif_script_makes_xl_fail(host: Host, vif: Vif) -> None:
    """A refusal is xl's own failure, with the reason, even where the gate lets the guest be."""
    region = host.unique("nobodys")
    guest = host.guest("refused", Entry(region, host.at, role="borrower"), lines=(vif.line,))
    with host.daemon_with("--on-failure", "keep-paused"):
        done = vif.create(guest, check=False)
        assert done.status != 0
        assert region in done.stderr.decode()
        assert host.domid(guest) is None
        host.wait(lambda: not host.guests(), "the guest is forgotten")
    assert "online" not in vif.seen()


@pytest.mark.alike
@pytest.mark.xen_keeps(64)
def test_vif_script_without_a_daemon(host: Host, vif: Vif) -> None:
    """Nobody can say what the guest is to have: it does not start."""
    host.stop_daemon()
    guest = host.guest("early", Entry(host.unique("demo"), host.at), lines=(vif.line,))
    done = vif.create(guest, check=False)
    assert done.status != 0
    assert "xshmctl" in done.stderr.decode()
    assert host.domid(guest) is None
    host.start_daemon()


# -- metrics --------------------------------------------------------------------------------------


def figures(host: Host) -> dict[str, float]:
    """The samples of the metrics file, if it is there."""
    text = host.dom0.run(f"cat {METRICS}", check=False).text
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


@pytest.mark.alike
def test_metrics_agree_with_what_is_listed(host: Host) -> None:
    """The file follows what happens, and is gone with the daemon."""
    region = host.unique("demo")
    guest = host.guest("counted", Entry(region, host.at))
    with host.daemon_with("--metrics-file", METRICS):
        host.wait(lambda: figures(host).get("xshmd_up") == 1, "the file is written")
        before = figures(host)
        assert (before["xshmd_regions"], before["xshmd_attach_total"]) == (0, 0)
        host.create(guest)
        # At once, not at the next quarter of a minute: the second wait would not notice.
        host.wait(lambda: figures(host)["xshmd_attach_total"] == 1, "the attach is counted", 10)
        listed = json.loads(host.xshmctl("list", "--json=short").text)["regions"]
        now = figures(host)
        assert now["xshmd_regions"] == len(listed) == 1
        assert now["xshmd_shared_bytes"] == listed[0]["sizeBytes"]
        assert now['xshmd_guests{state="attached"}'] == 1
        assert now["xshmd_holders"] == 1
        assert now["xshmd_xenstore_messages_total"] > before["xshmd_xenstore_messages_total"]
        assert host.dom0.run(["stat", "-c", "%a", METRICS]).text == "644"
        host.destroy(guest)
        host.wait(lambda: figures(host)["xshmd_regions"] == 0, "the region's end is seen")
        assert figures(host)["xshmd_detach_total"] == 1
    assert not figures(host)


# -- the journal ----------------------------------------------------------------------------------


class Journald:
    """systemd's journal without systemd, and a daemon that finds itself connected to it."""

    def __init__(self, host: Host) -> None:
        self.host = host
        host.dom0.run(f"mkdir -p {JOURNAL} /run/log/journal")
        self._journald = host.dom0.spawn(["/usr/lib/systemd/systemd-journald"])
        asking = ["test", "-S", f"{JOURNAL}/socket"]
        host.wait(lambda: host.dom0.run(asking, check=False).status == 0, "journald listens")
        host.stop_daemon()
        # JOURNAL_STREAM names what is on stderr; under systemd that would be journald's.
        self._daemon = host.dom0.spawn(
            'export JOURNAL_STREAM="$(stat -Lc %d:%i /proc/self/fd/2)"; '
            f"exec xshmd --reboot-grace {GRACE_S}"
        )
        self.wait("SYSLOG_IDENTIFIER=xshmd")
        host.wait(lambda: host.xshmctl("list", check=False).status == 0, "xshmd answers")

    def entries(self, *matches: str) -> list[dict[str, Any]]:
        done = self.host.dom0.run(
            ["journalctl", "-D", "/run/log/journal", "-o", "json", "--no-pager", *matches],
            check=False,
        )
        return [json.loads(line) for line in done.text.splitlines() if line.startswith("{")]

    def wait(self, *matches: str) -> list[dict[str, Any]]:
        """Wait for such entries."""
        return self.host.wait(lambda: self.entries(*matches), f"the journal has {matches}")

    def said_on_stderr(self) -> str:
        return self._daemon.stderr.decode()

    def close(self) -> None:
        for running in (self._daemon, self._journald):
            running.kill(15)
            running.wait(30)
        self.host.dom0.run("rm -rf /run/systemd /run/log/journal")


@pytest.fixture
def journald(host: Host) -> Iterator[Journald]:
    journald = Journald(host)
    yield journald
    journald.close()


@pytest.mark.alike
def test_every_grant_and_withdrawal_is_in_the_journal(host: Host, journald: Journald) -> None:
    """With a MESSAGE_ID for what it is, and the facts as fields to select by."""
    region = host.unique("demo")
    guest = host.guest("audited", Entry(region, host.at))
    host.created.append(guest)
    host.xshmctl("create", host.config_path(guest))
    domid = host.domid(guest)
    granted = journald.wait(f"MESSAGE_ID={GRANTED}")
    assert len(granted) == 1
    entry = granted[0]
    wanted = {
        "XSHM_REGION": region, "XSHM_GUEST": guest.name, "XSHM_DOMID": str(domid),
        "XSHM_SIZE_BYTES": str(1 << 20), "XSHM_ADDRESS": hex(host.at), "XSHM_ROLE": "owner",
        "XSHM_WHY": "guest created", "PRIORITY": "6", "SYSLOG_IDENTIFIER": "xshmd",
    }  # fmt: skip
    assert {key: entry.get(key) for key in wanted} == wanted
    asked = journald.entries(f"MESSAGE_ID={ASKED}", f"XSHM_GUEST={guest.name}")
    assert [(e["XSHM_REQUEST"], e["XSHM_OUTCOME"]) for e in asked][:1] == [("declare", "done")]
    assert asked[0]["XSHM_CLIENT_UID"] == "0"
    assert int(asked[0]["XSHM_CLIENT_PID"]) > 1
    host.destroy(guest)
    withdrawn = journald.wait(f"MESSAGE_ID={WITHDRAWN}", f"XSHM_REGION={region}")
    assert (withdrawn[0]["XSHM_GUEST"], withdrawn[0]["XSHM_DOMID"]) == (guest.name, str(domid))
    assert journald.said_on_stderr() == ""


@pytest.mark.alike
def test_a_journal_that_stops_holds_nobody_up(host: Host, journald: Journald) -> None:
    """A stopped journald takes nothing: guests are served all the same, and once it goes on it
    learns what it missed."""
    region = host.unique("demo")
    pid = host.dom0.run(["pidof", "systemd-journald"]).text
    host.dom0.run(["kill", "-STOP", pid])
    try:
        guest = host.guest("served", Entry(region, host.at))
        began = time.monotonic()
        for _ in range(40):
            host.ask("call", "Reload", {})  # each leaves entries, more than a socket holds
        host.create(guest)
        host.wait_said(guest, "hello .*")
        host.destroy(guest)
        assert time.monotonic() - began < 300
    finally:
        host.dom0.run(["kill", "-CONT", pid])
    for message_id in (GRANTED, WITHDRAWN):
        matches = (f"MESSAGE_ID={message_id}", f"XSHM_REGION={region}")
        journald.wait(*matches)
