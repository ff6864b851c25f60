# SPDX-License-Identifier: LGPL-2.1-or-later
"""xshmctl check: every broken rule of all files together, with no daemon and no Xen."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xshmd.ctl.__main__ import main

Captured = pytest.CaptureFixture[str]

OWNER = """\
name = "ctl"
type = "pvh"
memory = 64
static_shm = [ "id=r0, begin=0x1000000000, size=0x2000, role=owner" ]
"""
MEMBERS = """\
[region.r0]
external = true
[region.r0.guest.log]

[region.sys]
size = "1 MiB"
[region.sys.guest.log]
offset = "4 KiB"
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(**texts: str) -> None:
    for name, text in texts.items():
        Path(name.replace("_", ".")).write_text(text)


def check(*argv: str, arch: str = "x86_64") -> int:
    return main(["check", f"--arch={arch}", *argv])


def findings(capsys: Captured) -> list[dict[str, Any]]:
    value = json.loads(capsys.readouterr().out)
    assert set(value) == {"findings", "members", "notes"}
    found: list[dict[str, Any]] = value["findings"]
    assert all(set(one) == {"file", "line", "place", "rule", "message", "hint"} for one in found)
    return found


def test_all_is_well(capsys: Captured) -> None:
    write(ctl_cfg=OWNER, members_toml=MEMBERS)
    assert check("ctl.cfg", "members.toml") == 0
    captured = capsys.readouterr()
    assert captured.out == (
        "GUEST  REGION  ROLE      ADDRESS       SIZE\n"
        "ctl    r0      owner     0x1000000000  8 KiB\n"
        "log    r0      borrower  0x1000000000  8 KiB     chosen\n"
        "log    sys     borrower  0x1000002000  1020 KiB  chosen\n"
        "\n3 members listed.\nAll rules hold.\n"
    )
    assert captured.err == ""


def test_all_is_well_for_programs(capsys: Captured) -> None:
    write(ctl_cfg=OWNER, members_toml=MEMBERS)
    assert check("--json=short", "ctl.cfg", "members.toml") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["findings"] == []
    assert value["members"][2] == {
        "guest": "log",
        "region": "sys",
        "role": "borrower",
        "address": 0x1000002000,
        "sizeBytes": 0xFF000,
        "chosen": True,
    }


def test_without_the_legend(capsys: Captured) -> None:
    write(ctl_cfg=OWNER, empty_toml="")
    assert check("--no-legend", "ctl.cfg") == 0
    assert capsys.readouterr().out == "ctl  r0  owner  0x1000000000  8 KiB\n"
    assert check("--no-legend", "empty.toml") == 0
    assert capsys.readouterr().out == ""
    write(bad_toml="[region.r]\nsize = 1\n")
    assert check("--no-legend", "bad.toml") == 5
    assert [line[:9] for line in capsys.readouterr().out.splitlines()] == ["bad.toml:", "  hint: m"]
    assert check("empty.toml") == 0
    assert capsys.readouterr().out == "All rules hold.\n"


def test_broken_rules_are_named_with_file_and_place(capsys: Captured) -> None:
    write(
        ctl_cfg=OWNER.replace("0x1000000000", "0x100000"),
        log_cfg='name = "log"\ntype = "pv"\nstatic_shm = [\n "id=r9, role=borrower",\n]\n',
        twice_toml="[region.r0]\nsize = 4096\nprott = 1\n",
    )
    assert check("ctl.cfg", "log.cfg", "twice.toml") == 5
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == ("twice.toml:3: region.r0.prott: unknown key 'prott' [unknown-key]")
    assert lines[1] == "  hint: did you mean 'prot'?"
    assert any(line.startswith("ctl.cfg:4: static_shm[0]: ") for line in lines)
    assert any(line.startswith("log.cfg:4: static_shm[0]: ") for line in lines)
    assert lines[-1].endswith("things are wrong in 3 files.")
    assert captured.err == ""


def test_rules_hold_across_files(capsys: Captured) -> None:
    write(ctl_cfg=OWNER, members_toml=MEMBERS, other_cfg=OWNER.replace("ctl", "other"))
    assert check("--json=short", "members.toml") == 5
    (undefined,) = findings(capsys)
    assert undefined["file"] == "members.toml"
    assert (undefined["line"], undefined["place"]) == (3, "region.r0.guest.log")
    assert not undefined["message"].startswith("members.toml")
    assert undefined["hint"]
    assert check("--json=short", "ctl.cfg", "members.toml", "other.cfg") == 5
    rules = {one["rule"] for one in findings(capsys)}
    assert rules == {"two-owners"}


def test_the_architecture_decides_what_is_free(capsys: Captured) -> None:
    write(ctl_cfg=OWNER.replace("0x1000000000", "0x3a000000"))
    assert check("ctl.cfg", arch="arm64") == 0
    assert check("ctl.cfg") == 0
    write(ctl_cfg=OWNER.replace("0x1000000000", "0x38000000"))
    assert check("ctl.cfg", arch="arm64") == 5
    assert check("ctl.cfg") == 0


def test_this_machine_is_the_usual_architecture(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    write(ctl_cfg=OWNER.replace("0x1000000000", "0x38000000"))
    real = os.uname()
    for machine, status in (("x86_64", 0), ("aarch64", 5), ("riscv64", 2)):
        named = os.uname_result((*real[:4], machine))
        monkeypatch.setattr(os, "uname", lambda named=named: named)
        assert main(["check", "ctl.cfg"]) == status
    assert "xshmctl: xshmd is not for riscv64\nhint: say --arch\n" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_counts_more_than_a_broken_rule(capsys: Captured) -> None:
    write(bad_toml="[region.r]\nsize = 1\n", worse_toml="[region.r\n")
    Path("directory").mkdir()
    os.mkfifo("fifo")
    assert check("--json=short", "bad.toml") == 5
    findings(capsys)
    assert check("--json=short", "bad.toml", "gone", "directory", "fifo", "worse.toml") == 1
    assert [(one["file"], one["rule"]) for one in findings(capsys)] == [
        ("bad.toml", "unaligned"),
        ("gone", "unreadable"),
        ("directory", "not-a-file"),
        ("fifo", "not-a-file"),
        ("worse.toml", "not-toml"),
    ]


def test_a_file_named_twice_is_read_once(capsys: Captured) -> None:
    write(r_toml="[region.r]\nsize = 1\n")
    assert check("--json=short", "r.toml", "r.toml") == 5
    assert len(findings(capsys)) == 1


def test_no_file_at_all_is_wrong_usage(capsys: Captured) -> None:
    assert check() == 2
    capsys.readouterr()


def test_what_cannot_be_enforced_is_remarked_upon(capsys: Captured) -> None:
    write(
        r_toml="[region.r]\nsize = 4096\nprot_enforcement = 'advisory'\n"
        "[region.r.guest.a]\nprot = 'ro'\n"
    )
    assert check("r.toml") == 0
    assert "xshmctl: note: " in capsys.readouterr().err


def test_a_name_cannot_steer_the_terminal(capsys: Captured) -> None:
    write(r_toml='[region.r]\nsize = 4096\n["\\u001b[2J"]\n')
    assert check("r.toml") == 5
    assert "\x1b" not in capsys.readouterr().out


def test_it_loads_nothing_it_does_not_need() -> None:
    write(r_toml="[region.r]\nsize = 4096\n[region.r.guest.a]\n")
    code = (
        "import sys; from xshmd.ctl.__main__ import main;"
        "status = main(['check', '--arch=x86_64', 'r.toml']);"
        "print(*sys.modules); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "xshmd.config.toml" in loaded
    heavy = {"trio", "structlog", "cffi", "libfdt", "asyncio", "xshmd.config.devicetree"}
    assert not loaded & heavy
