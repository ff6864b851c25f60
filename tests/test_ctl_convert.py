# SPDX-License-Identifier: LGPL-2.1-or-later
"""xshmctl convert: from one form to another, and what the other cannot say."""

import json
from pathlib import Path

import pytest

from xshmd.config.artefacts import ARTEFACTS
from xshmd.config.guest import guest_config
from xshmd.config.toml import read_toml
from xshmd.ctl.__main__ import main
from xshmd.ctl.convert import ARTEFACT_NAMES

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
[region.other]
size = "4 KiB"
"""


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ctl.cfg").write_text(OWNER)
    Path("members.toml").write_text(MEMBERS)


def convert(*argv: str) -> int:
    return main(["convert", "--arch=x86_64", *argv])


def test_to_toml(capsys: Captured) -> None:
    assert convert("--to=toml", "ctl.cfg", "members.toml") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    said = read_toml(captured.out.encode(), file="f")
    assert [region.region_id for region in said.regions] == ["sys", "other"]
    assert {guest.name: len(guest.requests) for guest in said.guests} == {"ctl": 1, "log": 2}


def test_to_xl_with_what_it_cannot_say(capsys: Captured) -> None:
    assert convert("--to", "xl", "members.toml") == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        f"xshmctl: note: region '{region}' belongs to the system: an xl configuration cannot define"
        " it, so keep its definition in a file in regions.d"
        for region in ("sys", "other")
    ]
    config = guest_config(captured.out, file="f")
    assert [request.region_id for request in config.requests] == ["r0", "sys"]


def test_strictly(capsys: Captured) -> None:
    assert convert("--to=xl", "--strict", "members.toml") == 5
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "xl cannot say 2 things, the first of which: region 'sys'" in captured.err
    assert "hint: leave out --strict" in captured.err
    assert convert("--to=xl", "--strict", "--guest=log", "members.toml") == 5
    assert "xl cannot say everything: region 'sys'" in capsys.readouterr().err
    assert convert("--to=xl", "--strict", "ctl.cfg") == 0
    capsys.readouterr()


def test_for_one_guest(capsys: Captured) -> None:
    assert convert("--to=toml", "--guest=log", "ctl.cfg", "members.toml") == 0
    text = capsys.readouterr().out
    assert "[region.sys]" in text
    assert "[region.r0]\nexternal = true\n" in text
    assert "ctl" not in text
    assert "other" not in text
    assert convert("--to=toml", "--guest=gone", "ctl.cfg", "members.toml") == 4
    assert "hint: there are ctl, log\n" in capsys.readouterr().err


def test_for_programs(capsys: Captured) -> None:
    assert convert("--to=xl", "--json=short", "members.toml") == 0
    captured = capsys.readouterr()
    value = json.loads(captured.out)
    assert value["text"].startswith("# for the configuration of guest 'log'\n")
    assert len(value["notes"]) == 2
    assert captured.err == ""


def test_files_that_are_wrong_are_not_converted(capsys: Captured) -> None:
    Path("bad.toml").write_text("[region.r]\nsize = 1\n")
    assert convert("--to=xl", "ctl.cfg", "bad.toml") == 5
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "xshmctl: bad.toml:2: region.r.size: 1 is not a multiple" in captured.err
    assert convert("--to=xl", "bad.toml", "gone") == 1
    assert "gone: it cannot be read" in capsys.readouterr().err


def test_the_names_of_artefacts_are_theirs() -> None:
    assert sorted(ARTEFACT_NAMES) == sorted(ARTEFACTS)


@pytest.mark.parametrize("name", ARTEFACT_NAMES)
def test_what_one_guest_is_given(name: str, capsys: Captured) -> None:
    assert convert(f"--to={name}", "--guest=log", "ctl.cfg", "members.toml") == 0
    text = capsys.readouterr().out
    # The second region of the guest follows the first: its place is chosen here.
    assert "1000002000" in text or "0x10 0x2000" in text or "0x10 0x00002000" in text


def test_an_artefact_is_for_one_guest(capsys: Captured) -> None:
    assert convert("--to=header", "ctl.cfg") == 0
    assert "0x1000000000" in capsys.readouterr().out
    assert convert("--to=header", "ctl.cfg", "members.toml") == 2
    captured = capsys.readouterr()
    assert "header is for one guest, and there are 2: ctl, log" in captured.err
    assert "hint: say --guest ctl" in captured.err
    Path("empty.toml").write_text("")
    assert convert("--to=header", "empty.toml") == 4
    capsys.readouterr()


def test_what_is_placed_depends_on_the_architecture(capsys: Captured) -> None:
    assert (
        main(["convert", "--to=memmap", "--arch=arm64", "members.toml", "ctl.cfg", "--guest=log"])
        == 0
    )
    assert "$0x3a000000" in capsys.readouterr().out


def test_no_room_is_an_error(capsys: Captured) -> None:
    Path("big.toml").write_text("[region.r]\nsize = '900 TiB'\n[region.r.guest.a]\n")
    for target in ("header", "dts"):
        assert convert(f"--to={target}", "big.toml") == 5
        assert "no free range" in capsys.readouterr().err
    # These can say that the place is to be chosen.
    assert convert("--to=toml", "big.toml") == 0
    capsys.readouterr()


MIXED = """
[region.granted]
size = 4096
transport = "grant"
[region.granted.guest.a]
[region.granted.guest.b]
[region.plain]
size = 4096
[region.plain.guest.a]
"""


def test_what_a_guest_maps_itself_is_nowhere_yet(capsys: Captured) -> None:
    Path("mixed.toml").write_text(MIXED)
    assert convert("--to=header", "--guest=a", "mixed.toml") == 0
    header = capsys.readouterr().out
    assert "PLAIN_BEGIN" in header
    assert "GRANTED" not in header
    assert convert("--to=memmap", "--guest=b", "mixed.toml") == 5
    assert "maps all of its regions itself" in capsys.readouterr().err
