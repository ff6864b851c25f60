# SPDX-License-Identifier: LGPL-2.1-or-later
"""The units as they are shipped, hardening and all, where systemd is dom0's process 1."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from integration import Machine
from integration.scenarios.conftest import CONFIG_FOLDERS
from integration.scenarios.guest import Entry
from integration.scenarios.host import SOCKET, Host, artefacts, names, remove
from integration.scenarios.test_guest_to_guest import SEED
from integration.scenarios.test_lent import SIZE as LENT_SIZE
from integration.scenarios.test_lent import dumped, lent

pytestmark = [pytest.mark.arch("x86_64"), pytest.mark.own_boot]

UNIT = "xshmd.service"
KEEPER = "xshmd-keeper.service"
WORST_EXPOSURE = 1.5
LIMIT_S = 3600


class Installed(Host):
    """A host whose daemon is systemd's to run."""

    def show(self, *properties: str, unit: str = UNIT) -> dict[str, str]:
        done = self.dom0.run(["systemctl", "show", unit, f"--property={','.join(properties)}"])
        return dict(line.split("=", 1) for line in done.text.splitlines())

    def systemctl(self, *words: str) -> None:
        self.dom0.run(["systemctl", *words], timeout_s=300)

    def count_calls(self) -> int:
        """How often CALL_ALL_THE_TIME has called."""
        return int(self.dom0.run("cat /run/busy.statuses 2>/dev/null | wc -l").text)

    def has_called(self, at_least: int) -> bool:
        return self.count_calls() >= at_least

    def journal(self) -> list[dict[str, Any]]:
        """What the unit has said so far."""
        text = self.dom0.run(["journalctl", "-u", UNIT, "-o", "json", "--no-pager"]).text
        return [json.loads(line) for line in text.splitlines()]

    def log(self, since: int = 0) -> str:
        return "\n".join(str(entry.get("MESSAGE", "")) for entry in self.journal())[since:]


@pytest.fixture(scope="module")
def installed(arch: str) -> Iterator[Installed]:
    """The machine, with xen.service up and xshmd not started yet."""
    folder = artefacts(arch, "systemd")
    with Machine(arch, artefacts=folder, time_limit_s=LIMIT_S, init="systemd") as machine:
        machine.dom0.run(f"mkdir -p {CONFIG_FOLDERS}")
        machine.dom0.run("systemctl is-system-running --wait", check=False, timeout_s=300)
        host = Installed(machine)
        try:
            yield host
        finally:
            (folder / "journal.log").write_bytes(
                machine.dom0.run("journalctl -b --no-pager", check=False).stdout
            )
            host.close()


@pytest.fixture
def host_with_service(installed: Installed) -> Iterator[Installed]:
    """The same with the service running, and without guests before and after."""
    installed.systemctl("start", UNIT)
    yield installed
    left = installed.clean_up()
    installed.wait(lambda: len(installed.ask("domains")) == 1, "all domains but dom0 are gone")
    assert left == []


def test_socket_starts_the_service(installed: Installed) -> None:
    """Who asks before the daemon runs starts it by asking."""
    installed.systemctl("stop", UNIT, "xshmd.socket")
    installed.systemctl("start", "xshmd.socket")
    assert installed.show("ActiveState")["ActiveState"] == "inactive"
    mode = installed.dom0.run(["stat", "-c", "%a %U", SOCKET, "/run/xshmd"]).text
    assert mode.splitlines() == ["600 root", "700 root"]
    assert installed.xshmctl("list").text == "no regions."
    shown = installed.show("ActiveState", "SubState", "Type")
    assert shown == {"ActiveState": "active", "SubState": "running", "Type": "notify"}


def test_units_verify(installed: Installed) -> None:
    """`systemd-analyze verify` has nothing to say about any of the units."""
    units = [UNIT, "xshmd.socket", KEEPER]
    words = ["systemd-analyze", "verify", "--man=no", *units]
    done = installed.dom0.run(words, check=False, timeout_s=300)
    said = (done.stdout + done.stderr).decode()
    assert not [line for line in said.splitlines() if "xshmd" in line], said
    assert done.status == 0, said


@pytest.mark.parametrize("unit", [UNIT, KEEPER])
def test_exposure(installed: Installed, record_property: Any, unit: str) -> None:
    """`systemd-analyze security` finds the services well hardened."""
    done = installed.dom0.run(["systemd-analyze", "security", "--no-pager", unit], timeout_s=300)
    (installed.artefacts / f"security-{unit}.log").write_bytes(done.stdout)
    score = re.search(rf"Overall exposure level for {re.escape(unit)}: ([0-9.]+)", done.text)
    assert score is not None, done.text
    print(f"systemd-analyze security {unit}: {score[1]}")
    record_property("exposure", score[1])
    assert float(score[1]) <= WORST_EXPOSURE, done.text


def test_plain_xl_create(host_with_service: Installed) -> None:
    """Guests get their regions by plain `xl create` from the hardened service, wherever their
    configuration is; status and journal say so."""
    host = host_with_service
    region = host.unique("demo")
    owner = host.guest("owner", Entry(region, host.at), do="fill,beat")
    borrower = host.guest(
        "borrower", Entry(region, host.at, role="borrower"), do="await-fill,check,watch", slot=1
    )
    host.create(owner)
    # xl sees another /tmp than a service with PrivateTmp= would.
    text = host.dom0.get(host.config_path(borrower))
    host.dom0.put(f"/tmp/{borrower.name}.cfg", text)
    host.created.append(borrower)
    host.dom0.run(["xl", "create", f"{borrower.name}.cfg"], cwd="/tmp", timeout_s=300)
    host.wait_said(borrower, "checked pages=256 bad=0 seed=7")
    assert names(host.regions()) == [region]
    attached = [e for e in host.journal() if str(e["MESSAGE"]).startswith("guest attached")]
    assert {entry["PRIORITY"] for entry in attached[-2:]} == {"6"}
    assert len(attached) >= 2
    host.dom0.run(f"rm /tmp/{borrower.name}.cfg")
    host.destroy(owner, borrower)


def test_sealed_regions_outlive_a_restart(host_with_service: Installed) -> None:
    """The service wants the keeper, and a restart leaves it alone: what is in a sealed region is
    there for who joins after it."""
    host = host_with_service
    region = host.unique("sealed")
    owner = host.guest("owner", Entry(region, host.at, more="isolation=sealed"), do="fill,beat")
    host.create(owner)
    host.wait_said(owner, "filled .*")
    before = host.show("MainPID", "ActiveState", unit=KEEPER)
    assert before["ActiveState"] == "active"
    host.systemctl("restart", UNIT)
    assert host.dom0.run(["systemctl", "stop", KEEPER], check=False).status
    late = host.guest(
        "late", Entry(region, host.at, role="borrower"), do="await-fill,check,watch", slot=1
    )
    host.create(late)
    host.wait_said(late, "checked pages=256 bad=0 seed=7")
    host.wait_beats(late, 0)
    assert host.show("MainPID", "ActiveState", unit=KEEPER) == before
    host.destroy(owner, late)


def test_lends_from_the_hardened_keeper(host_with_service: Installed) -> None:
    """The keeper reaches gntalloc, whose module it had loaded, and what it lends outlives xshmd."""
    host = host_with_service
    region = host.unique("lent")
    host.apply(lent(region))
    guest = host.guest(
        "borrows", Entry(region, host.at, LENT_SIZE, role="borrower"),
        linux=True, shm="", seed=SEED, do=f"granted-hold:{region}",
    )  # fmt: skip
    host.create(guest)
    host.wait_said(guest, f"mapped {region} rw {LENT_SIZE}")
    host.dom0.run(f"printf '\\{SEED}' | xshmctl load {region}")
    host.systemctl("restart", UNIT)
    assert dumped(host, region) == SEED
    host.destroy(guest)
    host.apply(remove(region))


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_restart_while_guests_run(host_with_service: Installed, how: str) -> None:
    """`systemctl restart`, and a kill -9 that systemd answers by itself: guests go on, regions are
    the same, a third guest can join."""
    host = host_with_service
    region, beater, watcher = host.beater_and_watcher()
    host.create_all(beater, watcher)
    host.wait_beats(watcher, 0)
    before, pid = host.regions(), host.show("MainPID")["MainPID"]
    if how == "restart":
        host.systemctl("restart", UNIT)
    else:
        host.systemctl("kill", "--signal=KILL", UNIT)
    host.wait(
        lambda: (
            host.show("MainPID")["MainPID"] not in ("0", pid)
            and host.show("ActiveState")["ActiveState"] == "active"
        ),
        "the service is up again",
    )
    assert host.regions() == before
    host.wait_beats(watcher, 0)
    third = host.guest("third", Entry(region, host.at, role="borrower"), do="check", slot=2)
    host.create(third)
    host.wait_said(third, "checked pages=256 bad=0 seed=7")
    host.destroy(third, watcher, beater)


def test_refusal(host_with_service: Installed) -> None:
    """A guest that cannot have its region fails to start, and the journal has the reason as an
    error."""
    host = host_with_service
    guest = host.guest("refused", Entry(host.unique("bad"), host.at, role="borrower"))
    assert host.create(guest, check=False).status != 0
    assert host.domid(guest) is None
    refused = [e for e in host.journal() if str(e["MESSAGE"]).startswith("guest refused")]
    assert "which nobody defines" in refused[-1]["MESSAGE"]
    assert refused[-1]["PRIORITY"] == "3"


def test_watchdog_and_status(host_with_service: Installed) -> None:
    """systemd's watchdog is on and fed, and `systemctl status` says how many regions there are."""
    host = host_with_service
    shown = host.show("WatchdogUSec", "WatchdogTimestampMonotonic")
    assert shown["WatchdogUSec"] == "1min"
    # A guest of the scenario before may have ended a moment ago.
    host.wait(
        lambda: host.show("StatusText")["StatusText"] == "0 regions, 0 guests", "the status is told"
    )
    fed = shown["WatchdogTimestampMonotonic"]
    host.wait(
        lambda: host.show("WatchdogTimestampMonotonic")["WatchdogTimestampMonotonic"] != fed,
        "the watchdog is fed",
    )
    assert "xshmd.service" in host.dom0.run(["systemctl", "status", "--no-pager", UNIT]).text


CALL_ALL_THE_TIME = """
while [ -e /run/busy ]; do
    timeout 60 xshmctl -j list >/dev/null 2>>/run/busy.errors; echo $? >>/run/busy.statuses
done
"""


def test_restart_and_reload_under_load(host_with_service: Installed) -> None:
    """While clients ask without a pause the service is reloaded and restarted: nobody finds nobody
    there, as systemd keeps the socket, and the guests go on."""
    host = host_with_service
    _, beater, watcher = host.beater_and_watcher()
    host.create_all(beater, watcher)
    host.wait_beats(watcher, 0)
    before = host.regions()
    host.dom0.run("rm -f /run/busy.*; touch /run/busy")
    for _ in range(2):
        host.dom0.run(["systemd-run", "--quiet", "sh", "-c", CALL_ALL_THE_TIME])
    for how in ("reload", "restart", "reload", "restart"):
        host.systemctl(how, UNIT)
        at_least = host.count_calls() + 4
        host.wait(partial(host.has_called, at_least), "clients go on")
    host.dom0.run("rm /run/busy")
    statuses = host.dom0.run("cat /run/busy.statuses").text.split()
    errors = host.dom0.run("cat /run/busy.errors").text
    # A call that is under way when the daemon stops is cut off, and says so: two clients, twice.
    assert statuses.count("0") >= len(statuses) - 4, errors
    assert "no xshmd answers" not in errors
    assert host.regions() == before
    host.wait_beats(watcher, 0)
    host.destroy(watcher, beater)


def test_watchdog_ends_a_daemon_that_hangs(host_with_service: Installed) -> None:
    """systemd kills one that does not come round, and starts the next; the guest goes on."""
    host = host_with_service
    region, beater, watcher = host.beater_and_watcher("beat")
    host.create_all(beater, watcher)
    drop_in = "/run/systemd/system/xshmd.service.d/quick.conf"
    host.dom0.put(drop_in, "[Service]\nWatchdogSec=4\nTimeoutAbortSec=1\n")
    try:
        host.systemctl("daemon-reload")
        host.systemctl("restart", UNIT)
        pid, restarts = host.show("MainPID")["MainPID"], int(host.show("NRestarts")["NRestarts"])
        host.dom0.run(["kill", "-STOP", pid])
        host.wait(
            lambda: (
                int(host.show("NRestarts")["NRestarts"]) > restarts
                and host.show("ActiveState")["ActiveState"] == "active"
            ),
            "the next one is up",
        )
        assert names(host.regions()) == [region]
    finally:
        host.dom0.run(["rm", drop_in])
        host.systemctl("daemon-reload")
        host.systemctl("restart", UNIT)
    host.wait_beats(watcher, 0)
    host.destroy(watcher, beater)


def test_nothing_denied(host_with_service: Installed) -> None:
    """Nothing the daemon did so far ran into its own hardening, or ended in a traceback."""
    said = host_with_service.log()
    for word in ("Traceback", "Operation not permitted", "Read-only file system", "PermissionErr"):
        assert word not in said, said[-3000:]


def test_audit(host_with_service: Installed) -> None:
    """From the hardened service too, entries reach the journal with their fields."""
    host = host_with_service
    region = host.unique("audited")
    guest = host.guest("audited", Entry(region, host.at))
    host.create(guest)
    domid = str(host.domid(guest))
    host.destroy(guest)

    def entries() -> list[tuple[str, str]]:
        """The guest's entries with a MESSAGE_ID, as the journal selects them."""
        asking = ["journalctl", "-u", UNIT, f"XSHM_REGION={region}", "-o", "json", "--no-pager"]
        found = map(json.loads, host.dom0.run(asking).text.splitlines())
        return [(e["MESSAGE_ID"], e.get("XSHM_DOMID", "")) for e in found if "MESSAGE_ID" in e]

    granted = ("4c72f4e1fc0a431c937307411b05416c", domid)
    withdrawn = ("eec7e4ded95946ee8869d59429f518c0", domid)
    host.wait(lambda: {granted, withdrawn} <= {*entries()}, "both are in the journal")
    assert len(entries()) == len({*entries()})


def test_xendomains(host_with_service: Installed) -> None:
    """xendomains first saves every guest, as it is set up to: one that cannot be saved is started
    all the same at the next boot."""
    host = host_with_service
    default, scripts = "/etc/default/xendomains", "/etc/xen/scripts"
    hook = "/usr/lib/python3/dist-packages/xshmd/resources/hooks/xshm-forget-stubs"
    host.dom0.run(["install", "-m", "755", hook, f"{scripts}/xshm-forget-stubs"])
    drop_in = Path(__file__).parents[2] / "systemd" / "xshmd-xendomains.conf"
    drop_in_there = "/etc/systemd/system/xendomains.service.d/xshmd.conf"
    host.dom0.put(drop_in_there, drop_in.read_text())
    # This guest does not hear of a shutdown: no need to wait five minutes for it.
    host.dom0.run(["sed", "-i.old", "s/^\\(XENDOMAINS_STOP_MAXWAIT\\)=.*/\\1=5/", default])
    host.systemctl("daemon-reload")
    region = host.unique("demo")
    guest = host.guest("auto", Entry(region, host.at), do="boots,stay")
    host.dom0.put(f"/etc/xen/auto/{guest.name}", guest.config())
    host.created.append(guest)
    saved = f"/var/lib/xen/save/{guest.name}"
    try:
        host.systemctl("restart", "xendomains.service")
        host.wait_said(guest, "boots=1")
        host.systemctl("stop", "xendomains.service")
        host.destroy(guest)  # as the machine's end does
        host.wait(lambda: not host.regions(), "the region is freed")
        assert host.dom0.run(["test", "-e", saved], check=False).status == 0  # xl's header
        host.systemctl("start", "xendomains.service")
        host.wait_said(guest, "boots=1", times=2)
        assert names(host.regions()) == [region]
        assert host.dom0.run(["test", "-e", saved], check=False).status != 0
        host.destroy(guest)
    finally:
        left = f"/etc/xen/auto/{guest.name} {saved} {drop_in_there} {scripts}/xshm-forget-stubs"
        host.dom0.run(f"rm -f {left}; mv {default}.old {default}")
        host.systemctl("daemon-reload")
