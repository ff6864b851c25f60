# SPDX-License-Identifier: LGPL-2.1-or-later
"""xshmctl doctor: what it says of machines made of files, with and without a daemon."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from varlink_fakes import FakeRegions, daemon

from xshmd import errors
from xshmd.ctl import args, doctor, probe
from xshmd.ctl.__main__ import main
from xshmd.ctl.probe import Check, Machine
from xshmd.machine import HostInfo

Captured = pytest.CaptureFixture[str]
SYSTEMCTL = """#!/bin/sh
printf 'LoadState=%s\\nActiveState=%s\\nSubState=%s\\n' $UNIT_STATE
"""


class Box:
    """A machine in a directory: a sound Xen control domain until something is taken away."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.package = directory / "package"
        self.programs = directory / "programs"
        self.write("proc/xen/capabilities", "control_d\n")
        self.write("sys/hypervisor/type", "xen\n")
        for name, value in (("major", "4"), ("minor", "20"), ("extra", ".4")):
            self.write(f"sys/hypervisor/version/{name}", f"{value}\n")
        for device in ("privcmd", "hypercall", "xenbus", "gntdev", "gntalloc", "evtchn"):
            self.write(f"dev/xen/{device}", "")
        self.write("usr/lib/x86_64-linux-gnu/libxenctrl.so.4.20", "")
        (self.root / "run/xenstored").mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as store:
            store.bind(str(self.root / "run/xenstored/socket"))
        self.write("run/xshmd-keeper/socket", "")
        (self.package / "xen").mkdir(parents=True)
        self.binding("_stable.abi3.so", b"\x7fELF libxencall.so.1\0")
        self.binding("_evtchn.abi3.so", b"\x7fELF libxenevtchn.so.1\0")
        self.binding("_xenctrl.abi3.so", b"\x7fELF\0libxenctrl.so.4.20\0")
        self.programs.mkdir()
        self.program("xl", "#!/bin/sh\n")

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def remove(self, path: str) -> None:
        (self.root / path).unlink()

    def binding(self, name: str, data: bytes) -> None:
        (self.package / "xen" / name).write_bytes(data)

    def program(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def machine(self) -> Machine:
        return Machine(root=self.root, package=self.package, search_path=str(self.programs), euid=0)

    def bad(self) -> list[Check]:
        return [check for check in probe.checks(self.machine()) if check.verdict != probe.OK]


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def run(box: Box, socket_path: Path, *more: str) -> int:
    return doctor.run(args.parse(["doctor", "--socket", str(socket_path), *more]), box.machine())


def test_a_sound_machine(box: Box) -> None:
    assert box.bad() == []
    topics = {check.topic for check in probe.checks(box.machine())}
    assert topics >= {"control domain", "devices", "xenstore", "Xen version", "compiled binding"}


@pytest.mark.parametrize(
    ("path", "verdict", "words"),
    [
        ("dev/xen/privcmd", probe.FAILED, "/dev/xen/privcmd is not there"),
        ("dev/xen/hypercall", probe.WARNING, "/dev/xen/hypercall is not there"),
        ("dev/xen/gntdev", probe.WARNING, "/dev/xen/gntdev is not there"),
        ("dev/xen/gntalloc", probe.WARNING, "/dev/xen/gntalloc is not there"),
        ("sys/hypervisor/version/minor", probe.WARNING, "does not say which Xen"),
        ("run/xshmd-keeper/socket", probe.WARNING, "xshmd-keeper does not run"),
        (
            "usr/lib/x86_64-linux-gnu/libxenctrl.so.4.20",
            probe.FAILED,
            "needs libxenctrl.so.4.20, which is not there",
        ),
    ],
)
def test_what_is_missing_is_named(box: Box, path: str, verdict: str, words: str) -> None:
    box.remove(path)
    (check,) = box.bad()
    assert check.verdict == verdict
    assert words in check.text
    assert check.hint


def test_xenbus_is_a_way_to_xenstore_too(box: Box) -> None:
    box.remove("run/xenstored/socket")
    assert box.bad() == []
    box.remove("dev/xen/xenbus")
    assert [(check.topic, check.verdict) for check in box.bad()] == [
        ("devices", probe.WARNING),
        ("xenstore", probe.FAILED),
    ]


def test_the_other_place_of_xenstoreds_socket(box: Box) -> None:
    (box.root / "var").mkdir()
    (box.root / "run").rename(box.root / "var/run")
    found = [check.text for check in probe.checks(box.machine()) if check.topic == "xenstore"]
    assert found == ["xenstored's socket is /var/run/xenstored/socket"]


def test_a_device_one_may_not_use(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "privcmd")
    machine = box.machine()._replace(euid=1000)
    (check,) = [each for each in probe.checks(machine) if each.verdict != probe.OK]
    assert (check.topic, check.hint) == ("devices", "run it as root")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("_stable", "_stable is not built"),
        ("_evtchn", "_evtchn is not built"),
        ("_xenctrl", "_xenctrl is not built"),
    ],
)
def test_a_binding_that_is_not_built(box: Box, module: str, words: str) -> None:
    (box.package / "xen" / f"{module}.abi3.so").unlink()
    (check,) = box.bad()
    assert check.verdict == probe.FAILED
    assert words in check.text


def test_a_binding_for_another_xen(box: Box) -> None:
    box.binding("_xenctrl.abi3.so", b"\x7fELF\0libxenctrl.so.4.17\0")
    (check,) = box.bad()
    assert check.text == "_xenctrl.abi3.so is built for Xen 4.17, running is 4.20"


@pytest.mark.parametrize(
    ("capabilities", "hypervisor", "words"),
    [
        (None, None, "does not run on Xen"),
        (None, "kvm", "does not run on Xen"),
        (None, "xen", "xenfs is not mounted"),
        ("", "xen", "not the control domain"),
    ],
)
def test_no_control_domain_is_6(
    box: Box, tmp_path: Path, capabilities: str | None, hypervisor: str | None, words: str
) -> None:
    for path, text in (
        ("proc/xen/capabilities", capabilities),
        ("sys/hypervisor/type", hypervisor),
    ):
        if text is None:
            box.remove(path)
        else:
            box.write(path, text)
    (check,) = box.bad()
    assert words in check.text
    assert run(box, tmp_path / "none") == 6


def test_without_xen_its_devices_are_not_complained_of(box: Box) -> None:
    box.remove("proc/xen/capabilities")
    box.remove("sys/hypervisor/type")
    box.remove("dev/xen/privcmd")
    assert [check.topic for check in box.bad()] == ["control domain"]


def test_xl_is_needed_for_create_only(box: Box) -> None:
    (box.programs / "xl").unlink()
    (check,) = box.bad()
    assert (check.topic, check.verdict) == ("xl", probe.WARNING)


@pytest.mark.parametrize(
    ("state", "verdict", "words"),
    [
        ("loaded active running", probe.OK, "active (running)"),
        ("loaded failed failed", probe.FAILED, "failed"),
        ("loaded inactive dead", probe.FAILED, "inactive"),
        ("not-found inactive dead", probe.WARNING, "not installed"),
    ],
)
def test_the_unit(
    box: Box, monkeypatch: pytest.MonkeyPatch, state: str, verdict: str, words: str
) -> None:
    monkeypatch.setenv("UNIT_STATE", state)
    box.program("systemctl", SYSTEMCTL)
    (box.root / "run/systemd/system").mkdir(parents=True)
    (check,) = [each for each in probe.checks(box.machine()) if each.topic == "systemd unit"]
    assert check.verdict == verdict
    assert words in check.text


def test_without_systemd_there_is_no_unit(box: Box) -> None:
    box.program("systemctl", SYSTEMCTL)
    assert "systemd unit" not in {check.topic for check in probe.checks(box.machine())}


def test_only_the_daemon_is_missing(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNIT_STATE", "loaded inactive dead")
    box.program("systemctl", SYSTEMCTL)
    (box.root / "run/systemd/system").mkdir(parents=True)
    assert run(box, tmp_path / "none") == 3
    box.remove("dev/xen/privcmd")
    assert run(box, tmp_path / "none") == 1


def test_the_daemon_has_its_say(box: Box, tmp_path: Path, capsys: Captured) -> None:
    with daemon(tmp_path / "socket", FakeRegions()):
        assert run(box, tmp_path / "socket") == 0
        out = capsys.readouterr().out
        assert "\nok       Xen version: Xen 4.20.4 on x86_64\n" in out
        assert "failed" not in out
        assert run(box, tmp_path / "socket", "--json=short") == 0
        findings = json.loads(capsys.readouterr().out)["findings"]
    assert {"topic": "xl", "verdict": "ok", "text": f"xl is {box.programs / 'xl'}"} in findings


def test_a_warning_is_no_failure_and_has_a_hint(box: Box, tmp_path: Path, capsys: Captured) -> None:
    (box.programs / "xl").unlink()
    with daemon(tmp_path / "socket", FakeRegions()):
        assert run(box, tmp_path / "socket") == 0
    assert (
        "warning  xl: there is no xl on PATH: xshmctl create needs it\n"
        "         hint: install xen-utils\n"
    ) in capsys.readouterr().out


class Broken(FakeRegions):
    async def host(self) -> HostInfo:
        raise errors.HypercallFailed("xc_physinfo failed", call="xc_physinfo", errno=1)


def test_a_daemon_that_cannot_say_is_a_failure(box: Box, tmp_path: Path, capsys: Captured) -> None:
    with daemon(tmp_path / "socket", Broken()):
        assert run(box, tmp_path / "socket") == 1
    assert "failed   daemon: xc_physinfo failed\n" in capsys.readouterr().out


def test_on_this_very_machine_it_ends_with_a_known_status(tmp_path: Path) -> None:
    assert main(["doctor", "--socket", str(tmp_path / "none")]) in (1, 3, 6)
