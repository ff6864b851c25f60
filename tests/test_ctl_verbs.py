# SPDX-License-Identifier: LGPL-2.1-or-later
"""xshmctl's command line, list and show, against a daemon behind a real socket."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from varlink_fakes import OWNER, SNAPSHOT, FakeRegions, daemon

from xshmd.ctl import args
from xshmd.ctl.__main__ import main
from xshmd.errors import UsageError
from xshmd.model import Snapshot

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def api() -> FakeRegions:
    return FakeRegions()


@pytest.fixture
def socket_path(
    tmp_path: Path, api: FakeRegions, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    monkeypatch.setenv("XSHMD_SOCKET", str(tmp_path / "socket"))
    with daemon(tmp_path / "socket", api):
        yield tmp_path / "socket"


@pytest.mark.usefixtures("socket_path")
def test_list(capsys: Captured) -> None:
    assert main(["list"]) == 0
    assert capsys.readouterr().out == (
        "ID  SIZE   LIFETIME  OWNER  HOLDER  MEMBERS\n"
        "r0  1 MiB  members   ctl    3       ctl@0x38000000,log@0x40000000\n"
        "\n"
        "1 region listed.\n"
    )


@pytest.mark.usefixtures("socket_path")
def test_list_guests(capsys: Captured) -> None:
    assert main(["list", "--guests"]) == 0
    assert capsys.readouterr().out == (
        "NAME  DOMAIN  STATE      HOLDER  REGIONS\n"
        "ctl   5       attached   3       r0\n"
        "log   -       rebooting  3       r0\n"
        "\n"
        "2 guests listed.\n"
    )


@pytest.mark.usefixtures("socket_path")
@pytest.mark.parametrize("argv", [["--no-legend", "list"], ["list", "--no-legend"]])
def test_no_legend_is_for_scripts(capsys: Captured, argv: list[str]) -> None:
    assert main(argv) == 0
    assert capsys.readouterr().out.splitlines() == [
        "r0  1 MiB  members  ctl  3  ctl@0x38000000,log@0x40000000"
    ]


@pytest.mark.usefixtures("socket_path")
def test_nothing_to_list(api: FakeRegions, capsys: Captured) -> None:
    api.now = Snapshot()
    assert main(["list"]) == 0
    assert capsys.readouterr().out == "no regions.\n"
    assert main(["list", "--no-legend"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("socket_path")
@pytest.mark.parametrize(
    "argv", [["--json=short", "list"], ["list", "--json", "short"], ["list", "-j"]]
)
def test_json_is_what_the_daemon_replies(capsys: Captured, argv: list[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out)["regions"][0]["holderFirstFrame"] == 0x100


@pytest.mark.usefixtures("socket_path")
def test_json_pretty(capsys: Captured) -> None:
    assert main(["show", "--json=pretty", "r0"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["region"]["id"] == "r0"
    assert '\n  "region": {\n' in out


@pytest.mark.usefixtures("socket_path")
def test_show(capsys: Captured) -> None:
    assert main(["show", "r0"]) == 0
    assert capsys.readouterr().out == (
        "r0\n"
        "    Size: 1 MiB (256 frames)\n"
        "Lifetime: members (freed when its last member has ended)\n"
        "   Owner: ctl\n"
        "   Ready: yes\n"
        "  Holder: domain 3, uuid 00000000-0000-0000-0000-000000000003, frames 0x100..0x1ff\n"
        " Members: ctl (domain 5, attached): owner rw at 0x38000000, frames 0x38000..0x380ff\n"
        "          log (no domain, rebooting): borrower ro at 0x40000000, "
        "frames 0x40000..0x40001, from the region's frame 0x1 on\n"
    )


@pytest.mark.usefixtures("socket_path")
def test_show_goes_on_after_one_that_is_not_there(capsys: Captured) -> None:
    assert main(["show", "nope", "r0"]) == 4
    captured = capsys.readouterr()
    assert captured.err == (
        "xshmctl: there is no region nope\nhint: xshmctl list shows those there are\n"
    )
    assert captured.out.startswith("r0\n")


@pytest.mark.usefixtures("socket_path")
def test_a_name_cannot_steer_the_terminal(api: FakeRegions, capsys: Captured) -> None:
    evil = dataclasses.replace(OWNER, name="a\x1b[2Jb\r\nc")
    api.now = dataclasses.replace(SNAPSHOT, guests=(evil,))
    for argv in (["list"], ["list", "--guests"], ["show", "r0"]):
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert "a?[2Jb??c" in out
        assert "\x1b" not in out


@pytest.mark.usefixtures("socket_path")
def test_columns_line_up_under_wide_and_combining_characters(
    api: FakeRegions, capsys: Captured
) -> None:
    named = [dataclasses.replace(OWNER, name=name) for name in ("ctl", "e\u0301te\u0301", "温度計")]
    api.now = dataclasses.replace(SNAPSHOT, guests=tuple(named))
    assert main(["list", "--guests", "--no-legend"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("5")[0] for line in lines] == [
        "ctl     ", "e\u0301te\u0301     ", "温度計  "
    ]  # fmt: skip


def test_the_option_beats_the_environment(
    socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XSHMD_SOCKET", "/nonexistent/socket")
    assert main(["list"]) == 3
    assert main(["list", "--socket", str(socket_path)]) == 0
    assert main(["--socket", str(socket_path), "list"]) == 0


def test_no_daemon(capsys: Captured, tmp_path: Path) -> None:
    assert main(["list", "--socket", str(tmp_path / "none")]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"xshmctl: no xshmd answers at {tmp_path / 'none'}: No such file")
    assert "\nhint: " in err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["frobnicate"],
        ["list", "--frobnicate"],
        ["list", "extra"],
        ["list", "--json=yes"],
        ["list", "--leg"],
        ["show"],
        ["create"],
        ["create", "a=1"],
        ["create", "a.cfg", "b.cfg"],
        ["create", "-f", "a.cfg", "b.cfg"],
        ["create", "--frobnicate", "a.cfg"],
        ["create", "a.cfg", "-F"],
        ["create", "--timeout", "-1", "a.cfg"],
        ["create", "--timeout", "3601", "a.cfg"],
        ["create", "--timeout", "soon", "a.cfg"],
    ],
)
def test_wrong_usage(capsys: Captured, argv: list[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("xshmctl: ")


def test_help_names_every_verb_and_exit_status(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in ("list", "show", "create", "doctor", "3 no daemon answers", "130 interrupted"):
        assert words in out


@pytest.mark.parametrize(
    ("argv", "file", "overrides", "flags"),
    [
        (["a.cfg"], "a.cfg", [], None),
        (["a.cfg", "memory=8", "vcpus=2"], "a.cfg", ["memory=8", "vcpus=2"], None),
        (["memory=8", "a.cfg"], "a.cfg", ["memory=8"], None),
        (["-q", "a.cfg", "-e", "memory=8"], "a.cfg", ["memory=8"], ["-q", "-e"]),
        (["a.cfg", "m=1", "-dq", "n=2"], "a.cfg", ["m=1", "n=2"], ["-d", "-q"]),
        (["-f", "a=b.cfg", "m=1"], "a=b.cfg", ["m=1"], None),
        (["--defconfig=a.cfg", "--quiet"], "a.cfg", [], ["-q"]),
    ],
)
def test_xls_words_are_taken_as_xl_takes_them(
    argv: list[str], file: str, overrides: list[str], flags: list[str] | None
) -> None:
    options = args.parse(["create", *argv])
    assert (options.defconfig, options.overrides, options.xl_flags) == (file, overrides, flags)


def test_bundled_flags() -> None:
    options = args.parse(["create", "-pcn", "a.cfg"])
    assert (options.paused, options.console, options.dry_run) == (True, True, True)
    with pytest.raises(UsageError):
        args.parse(["create", "-pz", "a.cfg"])


def test_sigint_is_130(api: FakeRegions, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from xshmd.ctl import listing\n"
        "from xshmd.ctl.__main__ import main\n"
        # Whoever started the tests may have had it ignored, which is inherited.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "listing.run = lambda options: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(main(['list']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, b"")


@pytest.mark.usefixtures("socket_path")
def test_a_reader_who_has_enough_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "xshmd.ctl", "list"],
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


HEAVY = {"trio", "structlog", "cffi", "_cffi_backend", "pyxs", "asyncio", "inspect"}
SLOW = HEAVY | {"argparse", "typing", "dataclasses", "socket", "pathlib", "subprocess", "gettext"}


@pytest.mark.usefixtures("socket_path")
@pytest.mark.parametrize(
    ("verb", "kept_out"),
    [
        (["list"], SLOW | {"json", "re", "enum", "functools"}),
        (["--json=short", "list", "--guests"], SLOW),
        (["show", "r0"], SLOW),
        (["status"], HEAVY),
        (["doctor"], HEAVY),
        (["monitor", "--timeout=0"], HEAVY),
        (["create", "-n", "/dev/null", "name='a'"], HEAVY),
    ],
)
def test_it_starts_fast_because_of_what_it_does_not_import(
    verb: list[str], kept_out: set[str]
) -> None:
    # Isolated, but for our own path: what a site brings with it is none of our doing.
    script = (
        "import sys\n"
        f"sys.path.append({str(Path(args.__file__).parents[2])!r})\n"
        "from xshmd.ctl.__main__ import main\n"
        "main(sys.argv[1:])\n"
        "print('LOADED', *sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, *verb],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded = set(done.stdout.rpartition("LOADED ")[2].split())
    assert "xshmd.ctl.render" in loaded
    assert loaded & kept_out == set(), done.stderr


def test_the_command_ends_with_the_status_and_all_that_was_printed(socket_path: Path) -> None:
    command = [sys.executable, "-m", "xshmd.ctl"]
    done = subprocess.run([*command, "list"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "1 region listed.")
    done = subprocess.run([*command, "lst"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("xshmctl: there is no verb lst\n")


def test_an_error_does_not_swallow_what_was_printed_before_it() -> None:
    script = (
        "from xshmd.ctl import listing\n"
        "from xshmd.ctl.__main__ import command\n"
        "from xshmd.errors import Conflict\n"
        "import sys\n"
        "def run(options):\n"
        "    print('before')\n"
        "    raise Conflict('no')\n"
        "listing.run = run\n"
        "sys.argv[1:] = ['list']\n"
        "command()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (5, "before\n", "xshmctl: no\n")
