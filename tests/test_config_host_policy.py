# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limits and allow-lists are read as they are written, or refused with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from xshmd.config.finder import Finder
from xshmd.config.host_policy import PolicyFile, read_policy
from xshmd.config.toml_tree import Source
from xshmd.ctl.__main__ import main
from xshmd.errors import ConfigError, ConfigUnreadable, XshmError
from xshmd.host_policy import NO_POLICY, HostPolicy

TEXT = """
[limits]
regions = 64
memory = "4 GiB"
members = 8
leases = 0
regions_per_guest = 3
memory_per_guest = 0x1000
free_memory = "1 GiB"
pause = "2 s"

[allow.control]
guests = ["sensor-*", "ctl"]
regions = ["frames*"]
dom0 = true

[allow.rest]
guests = ["web-?"]
"""


def read(text: str) -> HostPolicy:
    return read_policy(text.encode(), file="xshmd.toml")


def test_all_of_it() -> None:
    policy = read(TEXT)
    limits = policy.limits
    values = {
        name: getattr(limits, name).value
        for name in (
            "regions", "memory", "members", "leases", "regions_per_guest", "memory_per_guest",
            "free_memory", "pause",
        )
    }  # fmt: skip
    assert values == {
        "regions": 64, "memory": 1 << 20, "members": 8, "leases": 0, "regions_per_guest": 3,
        "memory_per_guest": 1, "free_memory": 1 << 18,
        "pause": 2000,
    }  # fmt: skip
    assert limits.memory is not None
    assert str(limits.memory.place) == "xshmd.toml:4: limits.memory"
    control, rest = policy.allowed
    assert (control.name, control.guests, control.regions, control.dom0) == (
        "control", ("sensor-*", "ctl"), ("frames*",), True,
    )  # fmt: skip
    assert (rest.guests, rest.regions, rest.dom0) == (("web-?",), ("*",), False)
    assert str(rest.place) == "xshmd.toml:17: allow.rest"


def test_nothing_is_no_policy() -> None:
    assert read("") == NO_POLICY
    assert read("[limits]\n") == NO_POLICY


@pytest.mark.parametrize(
    ("text", "rule", "place"),
    [
        ("[limits]\nregion = 3", "unknown-key", "xshmd.toml:2: limits.region"),
        ("[region.r]\nsize = 4096", "unknown-key", "xshmd.toml:1: region"),
        ("limits = 3", "bad-type", "xshmd.toml:1: limits"),
        ('[limits]\nregions = "3"', "bad-type", "xshmd.toml:2: limits.regions"),
        ("[limits]\nregions = true", "bad-type", "xshmd.toml:2: limits.regions"),
        ("[limits]\nregions = 1.5", "bad-type", "xshmd.toml:2: limits.regions"),
        ("[limits]\nregions = -1", "bad-number", "xshmd.toml:2: limits.regions"),
        ("[limits]\nmemory = 5", "unaligned", "xshmd.toml:2: limits.memory"),
        ('[limits]\nmemory = "5 GB"', "bad-number", "xshmd.toml:2: limits.memory"),
        ("[limits]\npause = 5", "bad-type", "xshmd.toml:2: limits.pause"),
        ('[limits]\npause = "5 h"', "bad-time", "xshmd.toml:2: limits.pause"),
        ('[limits]\npause = "1.5 s"', "bad-time", "xshmd.toml:2: limits.pause"),
        ("[allow]\nguests = []", "bad-type", "xshmd.toml:2: allow.guests"),
        ("[allow.x]", "missing-key", "xshmd.toml:1: allow.x"),
        ("[allow.x]\nguests = []", "bad-type", "xshmd.toml:2: allow.x.guests"),
        ("[allow.x]\nguests = [3]", "bad-type", "xshmd.toml:2: allow.x.guests"),
        ('[allow.x]\nguests = [""]', "bad-type", "xshmd.toml:2: allow.x.guests"),
        ('[allow.x]\nguests = "a"', "bad-type", "xshmd.toml:2: allow.x.guests"),
        ('[allow.x]\nguests = ["a"]\nregions = []', "bad-type", "xshmd.toml:3: allow.x.regions"),
        ('[allow.x]\nguests = ["a"]\ndom0 = "yes"', "bad-type", "xshmd.toml:3: allow.x.dom0"),
    ],
)
def test_what_is_wrong(text: str, rule: str, place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert caught.value.facts["rule"] == rule
    assert caught.value.message.startswith(f"{place}: ")
    assert caught.value.hint


def test_drop_ins_change_single_keys() -> None:
    drop_in = Source("more.toml", b"[limits]\nregions = 2\n")
    policy = read_policy(TEXT.encode(), file="xshmd.toml", drop_ins=[drop_in])
    assert policy.limits.regions is not None
    assert policy.limits.regions.value == 2
    assert policy.limits.regions.place.file == "more.toml"
    assert policy.limits.memory is not None


def test_it_counts_from_when_it_is_written(tmp_path: Path) -> None:
    etc, lib = tmp_path / "etc", tmp_path / "lib"
    for directory in (etc, lib):
        directory.mkdir()
    file = PolicyFile((etc, lib))
    assert file.read() == NO_POLICY
    (lib / "xshmd.toml").write_text("[limits]\nregions = 1\n")
    assert file.read().limits.regions is not None
    (etc / "xshmd.toml").write_text("[limits]\nmembers = 1\n")
    assert file.read().limits.regions is None
    (etc / "xshmd.toml").write_text("[limits")
    for _ in range(2):
        with pytest.raises(ConfigUnreadable):
            file.read()
    (etc / "xshmd.toml").unlink()
    (lib / "xshmd.toml").unlink()
    assert file.read() == NO_POLICY


def test_a_reload_says_that_it_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "xshmd.toml").write_text("[limits]\nregion = 1\n")
    finder = Finder(
        own_directory=tmp_path / "guests.d", region_directories=(), xl_directories=(),
        policy_directories=(tmp_path,),
    )  # fmt: skip
    said = finder.policy()
    assert isinstance(said, ConfigError)
    assert "unknown key" in said.message
    with pytest.raises(XshmError, match="unknown key"):
        finder.declarations()


def test_check_holds_files_against_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, guest = tmp_path / "xshmd.toml", tmp_path / "r.toml"
    guest.write_text(
        '[region.r]\nsize = "8 KiB"\n[region.r.guest.a]\n[region.r.guest.b]\n[guest.a]\n[guest.b]\n'
    )
    files = [str(policy), str(guest)]
    policy.write_text('[limits]\nmemory = "8 KiB"\n[allow.x]\nguests = ["a", "b"]\n')
    assert main(["check", "--arch", "x86_64", *files]) == 0
    policy.write_text('[limits]\nmemory = "4 KiB"\n[allow.x]\nguests = ["a"]\n')
    assert main(["check", "--arch", "x86_64", *files]) == 5
    said = capsys.readouterr().out
    assert f"{guest}:1: region.r: regions would have 8 KiB of the host's memory" in said
    assert "[too-much-memory]" in said
    assert "[not-allowed]" in said
    assert said.count("[not-allowed-together]") == 1
    policy.write_text("[limits]\nregion = 3\n")
    assert main(["check", "--arch", "x86_64", *files]) == 5
    assert "did you mean 'regions'?" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["xl", "toml", "dts"])
def test_other_forms_have_no_word_for_it(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "xshmd.toml").write_text(TEXT)
    argv = ["convert", "--arch", "arm64", "--to", form, str(tmp_path / "xshmd.toml")]
    assert main(argv) == 0
    assert "limits and allow-lists" in capsys.readouterr().err
    assert main([*argv, "--strict"]) == 5
