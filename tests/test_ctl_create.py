# SPDX-License-Identifier: LGPL-2.1-or-later
"""xshmctl create: a guest whole or not at all, with a stub for xl and a daemon without Xen."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from varlink_fakes import OWNER, FakeRegions, daemon

from xshmd import errors
from xshmd.ctl.__main__ import main
from xshmd.ctl.create import config_text

Captured = pytest.CaptureFixture[str]

CFG = """
name = "ctl"
type = "pvh"
memory = 16
static_shm = [ "id=r0, begin=0x38000000, size=0x100000, role=owner" ]
"""
STUB = """#!/bin/sh
# Keeps each domain's domid in a file of its name, and a log of its calls.
cd "$XL_STATE" || exit 99
echo "$*" >> log
case "$1" in
domid) cat "$2.domid" 2>/dev/null || exit 1 ;;
create)
    echo "Parsing config"
    if [ -p blocked ]; then echo begun > blocked; cat go-on > /dev/null; fi
    if [ -e rival ]; then cp rival "$(cat name).domid"; fi
    [ "$(cat create-status)" = 0 ] && echo 7 > "$(cat name).domid"
    exit "$(cat create-status)" ;;
destroy) for f in *.domid; do [ "$(cat "$f")" = "$2" ] && rm "$f" && exit 0; done; exit 1 ;;
unpause) echo "cannot" >&2; exit "$(cat unpause-status)" ;;
console) echo "this is the console" ;;
esac
"""


class Host:
    """A machine with a stub xl, a configuration file and a daemon."""

    def __init__(self, directory: Path, api: FakeRegions) -> None:
        self.api = api
        self.cfg = directory / "ctl.cfg"
        self.cfg.write_text(CFG)
        self.state = directory / "xl-state"
        self.state.mkdir()
        self.set("create-status", "0")
        self.set("unpause-status", "0")
        self.set("name", "ctl")
        self.set("log", "")

    def set(self, name: str, value: str) -> None:
        (self.state / name).write_text(value)

    def calls(self) -> list[str]:
        """Return what xl was called for, without its looking up of domids."""
        lines = (self.state / "log").read_text().splitlines()
        return [line for line in lines if not line.startswith("domid ")]

    def domains(self) -> list[str]:
        return sorted(path.stem for path in self.state.glob("*.domid"))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "xl").write_text(STUB)
    (programs / "xl").chmod(0o755)
    machine = Host(tmp_path, FakeRegions())
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("XL_STATE", str(machine.state))
    monkeypatch.setenv("XSHMD_SOCKET", str(tmp_path / "socket"))
    with daemon(tmp_path / "socket", machine.api):
        yield machine


def test_the_order_of_things(host: Host, capfd: Captured) -> None:
    assert main(["create", "--timeout=7", str(host.cfg), "vcpus=2"]) == 0
    assert host.calls() == [f"create -p {host.cfg} vcpus=2", "unpause 7"]
    assert [config.name for config in host.api.declared] == ["ctl"]
    assert host.api.waited == [("ctl", 7.0)]
    assert host.api.withdrawn == []
    out, err = capfd.readouterr()
    assert out == "ctl: domain 7, running, with r0\n"
    assert err == "Parsing config\n"


def test_json(host: Host, capfd: Captured) -> None:
    assert main(["create", "-j", str(host.cfg)]) == 0
    assert json.loads(capfd.readouterr().out)["guest"]["name"] == OWNER.name


def test_paused_stays_paused(host: Host, capfd: Captured) -> None:
    assert main(["create", str(host.cfg), "-p"]) == 0
    assert host.calls() == [f"create -p {host.cfg}"]
    assert "paused" in capfd.readouterr().out


def test_xls_flags_are_handed_on(host: Host, capfd: Captured) -> None:
    assert main(["create", "-qe", "-f", str(host.cfg), "memory=8"]) == 0
    assert host.calls()[0] == f"create -p -q -e {host.cfg} memory=8"
    assert capfd.readouterr().out == ""


def test_a_file_that_looks_like_a_setting(host: Host) -> None:
    odd = host.cfg.rename(host.cfg.with_name("a=b.cfg"))
    assert main(["create", "-f", str(odd)]) == 0
    assert host.calls()[0] == f"create -p -f {odd}"


def test_the_console_comes_last(host: Host) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xshmd.ctl", "create", "-c", str(host.cfg)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "this is the console\n")
    assert host.calls() == [f"create -p {host.cfg}", "unpause 7", "console 7"]


def test_overrides_reach_the_daemon(host: Host) -> None:
    host.set("name", "other")
    assert main(["create", str(host.cfg), 'name="other"']) == 0
    assert [config.name for config in host.api.declared] == ["other"]


@pytest.mark.parametrize("flag", ["-n", "-N", "--dry-run", "--dryrun"])
def test_a_dry_run_checks_and_says_what_it_would_do(host: Host, capfd: Captured, flag: str) -> None:
    assert main(["create", flag, str(host.cfg), "extra='c d'"]) == 0
    assert capfd.readouterr().out.splitlines() == [
        f"would run: xl create -p {host.cfg} " + shlex.quote("extra='c d'"),
        "would wait for r0",
        "would run: xl unpause ctl",
    ]
    assert host.calls() == []
    assert len(host.api.declared) == 1
    assert host.api.withdrawn == ["ctl"]


def test_a_dry_run_in_json(host: Host, capfd: Captured) -> None:
    assert main(["create", "-N", "--json=short", "-pc", str(host.cfg)]) == 0
    assert json.loads(capfd.readouterr().out) == {
        "name": "ctl",
        "regions": ["r0"],
        "commands": [["xl", "create", "-p", str(host.cfg)], ["xl", "console", "ctl"]],
    }


def test_a_dry_run_finds_what_is_wrong(host: Host) -> None:
    host.api.refusal = errors.Conflict("r0 is 2 MiB already")
    assert main(["create", "-n", str(host.cfg)]) == 5


def test_what_the_daemon_refuses_never_reaches_xl(host: Host, capfd: Captured) -> None:
    host.api.refusal = errors.Refused("r0 cannot be given", hint="move it")
    assert main(["create", str(host.cfg)]) == 5
    out, err = capfd.readouterr()
    assert (out, err) == ("", "xshmctl: r0 cannot be given\nhint: move it\n")
    assert host.calls() == []
    assert host.api.withdrawn == []


def test_a_mistake_is_told_with_file_and_line(host: Host, capfd: Captured) -> None:
    host.cfg.write_text(CFG + "= 5\n")
    assert main(["create", str(host.cfg)]) == 1
    assert f"{host.cfg}:{CFG.count(chr(10)) + 1}" in capfd.readouterr().err
    assert host.calls() == []


def test_without_a_name_nothing_is_begun(host: Host, capfd: Captured) -> None:
    host.cfg.write_text("memory = 8\n")
    assert main(["create", str(host.cfg)]) == 5
    assert host.calls() == []


def test_a_guest_without_regions_needs_no_waiting(host: Host, capfd: Captured) -> None:
    host.cfg.write_text('name = "ctl"\n')
    assert main(["create", str(host.cfg)]) == 0
    assert host.api.waited == []
    assert host.calls()[-1] == "unpause 7"
    assert "has no static_shm" in capfd.readouterr().err


def test_a_domain_of_that_name_is_left_alone(host: Host, capfd: Captured) -> None:
    host.set("ctl.domid", "3\n")
    assert main(["create", str(host.cfg)]) == 5
    assert "exists already: domain 3" in capfd.readouterr().err
    assert host.calls() == []
    assert host.domains() == ["ctl"]
    assert host.api.withdrawn == ["ctl"]


def test_when_xl_fails_nothing_is_destroyed(host: Host, capfd: Captured) -> None:
    host.set("create-status", "3")
    host.api.wait_outcome = errors.NoSuchGuest("never seen")
    assert main(["create", str(host.cfg)]) == 1
    assert host.calls() == [f"create -p {host.cfg}"]
    assert host.api.withdrawn == ["ctl"]
    assert "xl create failed with status 3" in capfd.readouterr().err


def test_when_xl_fails_a_domain_somebody_else_made_meanwhile_stays(host: Host) -> None:
    host.set("create-status", "3")
    host.set("rival", "8\n")
    host.api.wait_outcome = errors.NoSuchGuest("never seen")
    assert main(["create", str(host.cfg)]) == 1
    assert host.domains() == ["ctl"]


def test_when_xl_fails_because_of_the_daemon_its_reason_is_told(
    host: Host, capfd: Captured
) -> None:
    host.set("create-status", "1")
    host.api.wait_outcome = errors.OutOfMemory("only 4 KiB are free")
    assert main(["create", str(host.cfg)]) == 5
    assert host.api.waited == [("ctl", 0.0)]
    assert "xshmctl: only 4 KiB are free\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (errors.TimedOut("not in time"), 1),
        (errors.Refused("no"), 5),
        (errors.NoSuchGuest("gone"), 4),
        (KeyError("bug"), 1),
    ],
)
def test_without_its_regions_the_guest_is_taken_down(
    host: Host, outcome: BaseException, status: int
) -> None:
    host.api.wait_outcome = outcome
    assert main(["create", str(host.cfg)]) == status
    assert host.calls() == [f"create -p {host.cfg}", "destroy 7"]
    assert host.domains() == []
    assert host.api.withdrawn == ["ctl"]


def test_a_guest_that_cannot_be_unpaused_is_taken_down(host: Host, capfd: Captured) -> None:
    host.set("unpause-status", "1")
    assert main(["create", str(host.cfg)]) == 1
    assert host.calls()[-1] == "destroy 7"
    assert "xl unpause 7 failed: cannot" in capfd.readouterr().err


def test_only_the_own_domain_is_destroyed(host: Host) -> None:
    host.set("other.domid", "8\n")
    host.api.wait_outcome = errors.Refused("no")
    assert main(["create", str(host.cfg)]) == 5
    assert host.domains() == ["other"]


def test_no_xl(host: Host, monkeypatch: pytest.MonkeyPatch, capfd: Captured) -> None:
    monkeypatch.setenv("PATH", str(host.state))
    assert main(["create", str(host.cfg)]) == 1
    assert "no xl on PATH" in capfd.readouterr().err
    assert host.api.withdrawn == ["ctl"]


@pytest.mark.parametrize("name", ["missing.cfg", "."])
def test_a_file_that_cannot_be_read(host: Host, name: str, capfd: Captured) -> None:
    assert main(["create", str(host.cfg.parent / name)]) == 1
    assert capfd.readouterr().err.startswith(f"xshmctl: {host.cfg.parent / name}: ")


def test_a_file_that_is_no_text(host: Host, capfd: Captured) -> None:
    host.cfg.write_bytes(b'name = "a"\n# caf\xe9\n')
    assert main(["create", str(host.cfg)]) == 1
    assert f"{host.cfg}:2: not UTF-8" in capfd.readouterr().err


def test_a_file_that_is_something_else(host: Host, capfd: Captured) -> None:
    host.cfg.write_bytes(b"x" * (1 << 20))
    assert main(["create", str(host.cfg)]) == 1
    assert "1 MiB are too much" in capfd.readouterr().err


def test_the_text_is_what_xl_would_parse(tmp_path: Path) -> None:
    file = tmp_path / "a.cfg"
    file.write_text("a = 1")
    assert config_text(str(file), []) == "a = 1"
    assert config_text(str(file), ["b=2", "c=3"]) == "a = 1\nb=2\nc=3\n"
    assert config_text("/dev/null", ["b=2"]) == "\nb=2\n"


class Running:
    """An ``xshmctl create`` whose xl waits until it is told to go on."""

    def __init__(self, host: Host) -> None:
        for name in ("blocked", "go-on"):
            os.mkfifo(host.state / name)
        self._host = host
        self._process = subprocess.Popen(
            [sys.executable, "-m", "xshmd.ctl", "create", str(host.cfg)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert (host.state / "blocked").read_text() == "begun\n"

    @property
    def stderr(self) -> IO[str]:
        assert self._process.stderr is not None
        return self._process.stderr

    def signal(self, signum: int) -> None:
        """Send a signal to the process group, as a terminal does."""
        os.killpg(self._process.pid, signum)

    def let_xl_go_on(self) -> None:
        (self._host.state / "go-on").write_text("go\n")

    def release_whoever_still_waits(self) -> None:
        with contextlib.suppress(OSError):
            os.close(os.open(self._host.state / "go-on", os.O_WRONLY | os.O_NONBLOCK))

    def status(self) -> int:
        return self._process.wait(timeout=20)


@pytest.fixture
def running(host: Host) -> Iterator[Running]:
    started = Running(host)
    with started.stderr:
        yield started
        with contextlib.suppress(ProcessLookupError):
            started.signal(signal.SIGKILL)
        started.status()
        started.release_whoever_still_waits()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_while_xl_works(host: Host, running: Running, signum: int) -> None:
    assert running.stderr.readline() == "Parsing config\n"
    running.signal(signum)
    assert "interrupted" in running.stderr.readline()
    running.let_xl_go_on()
    assert running.status() == 128 + signum
    assert host.calls() == [f"create -p {host.cfg}", "destroy 7"]
    assert host.api.withdrawn == ["ctl"]


def test_interrupted_twice_does_not_wait_for_xl(host: Host, running: Running) -> None:
    assert running.stderr.readline() == "Parsing config\n"
    running.signal(signal.SIGINT)
    assert "interrupted" in running.stderr.readline()
    host.set("ctl.domid", "9\n")  # What xl has made of the domain so far.
    running.signal(signal.SIGINT)
    assert running.status() == 130
    assert host.calls() == [f"create -p {host.cfg}", "destroy 9"]
    assert host.domains() == []
    assert host.api.withdrawn == ["ctl"]


def test_interrupted_while_waiting_for_the_regions(host: Host) -> None:
    host.api.wait_outcome = None
    process = subprocess.Popen(
        [sys.executable, "-m", "xshmd.ctl", "create", str(host.cfg)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not host.api.waiting.is_set():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert host.calls() == [f"create -p {host.cfg}", "destroy 7"]
    assert host.api.withdrawn == ["ctl"]


def test_the_stub_is_executable(host: Host) -> None:
    assert stat.S_IMODE((host.cfg.parent / "bin" / "xl").stat().st_mode) == 0o755
