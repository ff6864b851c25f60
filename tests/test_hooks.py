# SPDX-License-Identifier: LGPL-2.1-or-later
"""The shell hooks do what libxl, xendomains and libvirt expect of them, as those run them.

What a hook calls is stood in for by scripts that write down how they were called.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

import xshmd
from xshmd import errors

HOOKS = Path(xshmd.__file__).parent / "resources" / "hooks"
ALL = ("libvirt-libxl", "xshm-forget-stubs", "xshm-vif")
BACKEND = "/local/domain/0/backend/vif/7/0"


class Stage:
    """A folder with a hook in it, and the programs it calls."""

    def __init__(self, folder: Path, hook: str) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.scripts = folder / "scripts"
        self.bin.mkdir()
        self.scripts.mkdir()
        self.hook = self.scripts / hook
        shutil.copy(HOOKS / hook, self.hook)
        self.calls = folder / "calls"
        self.calls.touch()
        self.program("xenstore-write")
        self.program("vif-bridge", self.scripts)

    def program(self, name: str, where: Path | None = None, *, do: str = "") -> None:
        path = (where or self.bin) / name
        path.write_text(f'#!/bin/sh\necho "{name}" "$@" >>"{self.calls}"\n{do}\n')
        path.chmod(0o755)

    def run(
        self, *words: str, env: Mapping[str, str] | None = None, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        path = f"{self.bin}:{os.environ['PATH']}"
        return subprocess.run(
            [self.hook, *words], env={"PATH": path, **(env or {})}, input=stdin,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    @property
    def called(self) -> list[str]:
        return self.calls.read_text().splitlines()


@pytest.mark.parametrize("name", ALL)
def test_they_are_programs(name: str) -> None:
    assert sorted(path.name for path in HOOKS.iterdir()) == list(ALL)
    assert os.access(HOOKS / name, os.X_OK)
    done = subprocess.run(["sh", "-n", HOOKS / name], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


# -- the network device ---------------------------------------------------------------------------


@pytest.fixture
def vif(tmp_path: Path) -> Stage:
    stage = Stage(tmp_path, "xshm-vif")
    stage.program("xshmctl")
    return stage


def online(stage: Stage, **env: str) -> subprocess.CompletedProcess[str]:
    return stage.run("online", "type_if=vif", env={"XENBUS_PATH": BACKEND, **env})


@pytest.mark.parametrize("path", [BACKEND, "backend/vif/7/0"])
def test_vif_waits_and_then_does_the_work(vif: Stage, path: str) -> None:
    assert online(vif, XENBUS_PATH=path).returncode == 0
    assert vif.called == ["xshmctl wait --timeout 30 7", "vif-bridge online type_if=vif"]


def test_vif_of_a_guest_without_regions(vif: Stage) -> None:
    vif.program("xshmctl", do=f"exit {errors.NoSuchGuest('').exit_status}")
    assert online(vif).returncode == 0
    assert vif.called[1:] == ["vif-bridge online type_if=vif"]


@pytest.mark.parametrize("words", [("offline", "type_if=vif"), ("add", "type_if=tap"), ("remove",)])
def test_vif_waits_only_when_a_device_is_made(vif: Stage, words: tuple[str, ...]) -> None:
    assert vif.run(*words, env={"XENBUS_PATH": BACKEND}).returncode == 0
    assert vif.called == [" ".join(("vif-bridge", *words))]


def test_vif_failure_is_what_the_daemon_says(vif: Stage) -> None:
    """libxl shows hotplug-error; more than the first line would not be one."""
    say = 'echo "xshmctl: region r0 is 4 KiB, not 8 KiB" >&2; echo "hint: mend it" >&2'
    vif.program("xshmctl", do=f"{say}; exit {errors.Conflict('').exit_status}")
    done = online(vif)
    assert done.returncode == 1
    assert vif.called[1:] == [
        f"xenstore-write {BACKEND}/hotplug-error xshmctl: region r0 is 4 KiB, not 8 KiB "
        f"{BACKEND}/hotplug-status error"
    ]


@pytest.mark.parametrize(
    ("status", "words"), [(3, "no daemon"), (1, "not in time"), (124, "does not answer")]
)
def test_vif_fails_closed(vif: Stage, status: int, words: str) -> None:
    vif.program("xshmctl", do=f'echo "{words}" >&2; exit {status}')
    done = online(vif)
    assert done.returncode == 1
    assert words in done.stderr
    assert not any(call.startswith("vif-bridge") for call in vif.called)


def test_vif_without_xshmctl(vif: Stage) -> None:
    (vif.bin / "xshmctl").unlink()
    done = vif.run(
        "online", env={"XENBUS_PATH": BACKEND, "PATH": f"{vif.bin}:/usr/bin:/bin"}
    )  # no other xshmctl is there
    assert done.returncode == 1
    assert "xshmctl is not installed" in done.stderr


def test_vif_daemon_that_never_answers(vif: Stage) -> None:
    vif.program("xshmctl", do="exec sleep 100")
    assert online(vif, XSHM_WAIT_S="-4").returncode == 1  # so that the outer limit is a second
    assert not any(call.startswith("vif-bridge") for call in vif.called)


@pytest.mark.parametrize("how", ["name", "path"])
def test_vif_other_script(vif: Stage, how: str) -> None:
    vif.program("vif-mine", vif.scripts, do="exit 7")
    mine = "vif-mine" if how == "name" else str(vif.scripts / "vif-mine")
    assert online(vif, XSHM_VIF_SCRIPT=mine).returncode == 7
    assert vif.called[1:] == ["vif-mine online type_if=vif"]


# -- xendomains -----------------------------------------------------------------------------------


def save_file(more: bytes = b"", *, config: bytes = b"x" * 958) -> bytes:
    """A save file as xl begins it (tools/xl/xl.h, struct save_file_header)."""
    magic = b"Xen saved domain, xl format\n \0 \r"
    return magic + struct.pack("<4I", 0x01020304, 3, 0, len(config)) + config + more


def test_stubs_go_and_guests_stay(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "xshm-forget-stubs")
    folder = tmp_path / "save"
    folder.mkdir()
    whole = {
        "guest": save_file(b"LibxlFmt" + bytes(100)),
        "one byte": save_file(b"L"),
        "other": b"LinuxGuestRecord" + bytes(100),
        "short": b"Xen saved",
    }
    stubs = {"stub": save_file(), "cut": save_file()[:-10], "bare": save_file(config=b""), "": b""}
    for name, data in {**whole, **stubs}.items():
        (folder / (name or "empty")).write_bytes(data)
    (folder / "folder").mkdir()
    (folder / "link").symlink_to(tmp_path / "target")
    (tmp_path / "target").write_bytes(save_file())
    done = stage.run(str(folder))
    assert done.returncode == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted([*whole, "folder", "link"])
    assert (tmp_path / "target").exists()
    assert len(done.stdout.splitlines()) == len(stubs)


@pytest.mark.parametrize("there", [True, False])
def test_no_stubs_no_fuss(tmp_path: Path, there: bool) -> None:
    stage = Stage(tmp_path, "xshm-forget-stubs")
    folder = tmp_path / "save"
    if there:
        folder.mkdir()
    done = stage.run(str(folder))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- libvirt --------------------------------------------------------------------------------------


@pytest.fixture
def libvirt(tmp_path: Path) -> Stage:
    stage = Stage(tmp_path, "libvirt-libxl")
    stage.program("xshmctl")
    for name in ("guests.d/a.cfg", "guests.d/b.cfg", "regions.d/r.toml", "regions.d/r.toml~"):
        path = tmp_path / "etc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return stage


def start(stage: Stage, operation: str = "prepare") -> subprocess.CompletedProcess[str]:
    env = {"XSHMD_ETC": str(stage.folder / "etc")}
    return stage.run("a", operation, "begin", "-", env=env, stdin="<domain/>" * 100_000)


def test_libvirt_checks_all_files_together(libvirt: Stage) -> None:
    assert start(libvirt).returncode == 0
    etc = libvirt.folder / "etc"
    files = [etc / "guests.d/a.cfg", etc / "guests.d/b.cfg", etc / "regions.d/r.toml"]
    assert libvirt.called == [f"xshmctl check {' '.join(map(str, files))}", "xshmctl list"]


def test_libvirt_start_is_refused_with_the_reason(libvirt: Stage) -> None:
    libvirt.program("xshmctl", do='[ "$1" = check ] && echo "a.cfg:3: wrong" && exit 5')
    done = start(libvirt)
    assert done.returncode == 1
    assert "guest a is not started" in done.stderr
    assert "a.cfg:3: wrong" in done.stderr


def test_libvirt_start_without_a_daemon(libvirt: Stage) -> None:
    libvirt.program("xshmctl", do='[ "$1" = list ] && echo "no daemon" >&2 && exit 3; exit 0')
    done = start(libvirt)
    assert done.returncode == 1
    assert "no daemon" in done.stderr


@pytest.mark.parametrize("operation", ["start", "started", "stopped", "release", "reconnect"])
def test_libvirt_other_operations_cost_nothing(libvirt: Stage, operation: str) -> None:
    assert start(libvirt, operation).returncode == 0
    assert libvirt.called == []


def test_libvirt_host_without_shared_memory(libvirt: Stage) -> None:
    shutil.rmtree(libvirt.folder / "etc")
    assert start(libvirt).returncode == 0
    assert libvirt.called == []
