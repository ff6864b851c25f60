# SPDX-License-Identifier: LGPL-2.1-or-later
"""bash completes verbs, options, and what a running daemon has; and runs nothing that is named."""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from varlink_fakes import OWNER, SNAPSHOT, FakeRegions, daemon

from xshmd.ctl import args, verbs

FILE = importlib.resources.files("xshmd").joinpath("resources/completion/xshmctl")
SCRIPT = """
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_xshmctl
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with an xshmctl that bash finds; no daemon runs."""
    program = tmp_path / "xshmctl"
    root = Path(args.__file__).parents[2]
    program.write_text(f'#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} -P -m xshmd.ctl "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XSHMD_SOCKET", str(tmp_path / "socket"))
    return tmp_path


@pytest.fixture
def api(path: Path) -> Iterator[FakeRegions]:
    api = FakeRegions()
    with daemon(path / "socket", api):
        yield api


def complete(*words: str, cwd: Path | None = None) -> set[str]:
    with importlib.resources.as_file(FILE) as file:
        done = subprocess.run(
            ["bash", "--norc", "-c", SCRIPT, "bash", str(file), *words],
            capture_output=True, text=True, check=True, timeout=30, cwd=cwd,
        )  # fmt: skip
    assert done.stderr == ""
    return set(done.stdout.split("\n")) - {""}


def test_verbs() -> None:
    assert complete("xshmctl", "") == set(verbs.VERBS)
    assert complete("xshmctl", "--json=short", "re") == {"remove", "reload"}
    assert complete("xshmctl", "--socket", "/a", "dum") == {"dump"}


@pytest.mark.parametrize("verb", verbs.VERBS)
def test_every_option_it_knows_exists(verb: str) -> None:
    _, parsers = args.parsers([verb])
    real = {option for action in parsers[verb]._actions for option in action.option_strings}
    known = {word.rstrip("=") for word in complete("xshmctl", verb, "-")}
    assert known <= real
    assert {"--json", "-j", "--no-legend", "--socket", "--help"} <= known
    if verb != "create":  # xl's own options are left to who knows xl
        assert {option for option in real if option.startswith("--")} <= known


@pytest.mark.parametrize(
    ("verb", "option"),
    [
        ("convert", "--to"),
        ("check", "--arch"),
        ("vhost-user", "--addresses"),
        ("vhost-user", "--no-advance-map"),
    ],
)
def test_it_knows_the_values_of_an_option(verb: str, option: str) -> None:
    _, parsers = args.parsers([verb])
    (action,) = (a for a in parsers[verb]._actions if option in a.option_strings)
    assert action.choices is not None
    assert complete("xshmctl", verb, option, "") == set(map(str, action.choices))


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["show", ""], {"r0"}),
        (["detach", ""], {"ctl", "log"}),
        (["detach", "ctl", ""], {"r0"}),
        (["attach", "c"], {"ctl"}),
        (["wait", "--timeout", "3", "l"], {"log"}),
        (["dump", "--offset", "=", "4", "r"], {"r0"}),
        (["dump", "r0", ""], set()),
        (["list", "--json", "=", ""], {"pretty", "short", "off"}),
        (["list", "--json", "=", "s"], {"short"}),
        (["help", "ch"], {"check"}),
    ],
)
@pytest.mark.usefixtures("api")
def test_names_come_from_the_daemon(words: list[str], found: set[str]) -> None:
    assert complete("xshmctl", *words) == found


@pytest.mark.usefixtures("path")
def test_without_a_daemon_it_is_silent() -> None:
    assert complete("xshmctl", "show", "") == set()


def test_a_name_is_never_run(api: FakeRegions, path: Path) -> None:
    evil = dataclasses.replace(OWNER, name="$(touch${IFS}pwned)")
    api.now = dataclasses.replace(SNAPSHOT, guests=(evil, dataclasses.replace(OWNER, name="`id`")))
    assert complete("xshmctl", "wait", "", cwd=path) == set()
    assert not (path / "pwned").exists()


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a b.cfg").touch()
    assert complete("xshmctl", "create", "a", cwd=tmp_path) == {"a b.cfg"}
