# SPDX-License-Identifier: LGPL-2.1-or-later
"""xshmctl attach, detach, remove, reload, create FILE.toml, monitor, wait, status, dump, load."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from varlink_fakes import SNAPSHOT, FakeRegions, daemon, request

from xshmd.changes import AddRegion, AttachRegion, DetachRegion, RemoveRegion, Step
from xshmd.ctl import args, verbs
from xshmd.ctl.__main__ import main
from xshmd.ctl.transfer import Progress
from xshmd.errors import Conflict, NoSuchGuest
from xshmd.events import Event, EventKind
from xshmd.model import (
    Backing,
    Isolation,
    Lifetime,
    Prot,
    ProtEnforcement,
    RegionTerms,
    Role,
    Transport,
)
from xshmd.units import DomId, Gfn

Captured = pytest.CaptureFixture[str]
ENTRY = "id=r9,begin=0x3a000000,size=0x2000,role=borrower,offset=0x1000"
STEP = Step(verb="attach", region="r9", guest="ctl", domid=DomId(5), text="map r9 into ctl")


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRegions]:
    monkeypatch.setenv("XSHMD_SOCKET", str(tmp_path / "socket"))
    api = FakeRegions()
    api.steps = (STEP,)
    with daemon(tmp_path / "socket", api):
        yield api


def test_attach(api: FakeRegions, capsys: Captured) -> None:
    assert main(["attach", "ctl", ENTRY, "id=q,begin=4096,size=4096,role=owner"]) == 0
    ((first, second), dry_run) = api.applied[0]
    assert not dry_run
    assert isinstance(first, AttachRegion)
    assert isinstance(second, AttachRegion)
    assert (first.guest, first.request.region_id) == ("ctl", "r9")
    assert (first.request.first_gfn, first.request.nr_frames) == (Gfn(0x3A000), 2)
    assert (first.request.role, first.request.offset_frames) == (Role.BORROWER, 1)
    assert first.request.place.file == "command line: entry 1"
    assert second.request.role is Role.OWNER
    assert capsys.readouterr().out == "map r9 into ctl\n"


def test_a_wrong_entry_is_refused_here_with_all_that_is_wrong(
    api: FakeRegions, capsys: Captured
) -> None:
    assert main(["attach", "ctl", ENTRY, "id=q,begin=1,size=4096,role=own"]) == 5
    err = capsys.readouterr().err
    assert err.startswith("xshmctl: command line: entry 2: ")
    assert "begin=1 is not a multiple" in err
    assert "role=own" in err
    assert api.applied == []


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        (
            ["detach", "5", "r0", "r9"],
            (
                DetachRegion(guest="5", region_id="r0"),
                DetachRegion(guest="5", region_id="r9"),
            ),
        ),
        (["remove", "r0"], (RemoveRegion(region_id="r0"),)),
        (
            ["remove", "--force", "a", "b"],
            (RemoveRegion(region_id="a", force=True), RemoveRegion(region_id="b", force=True)),
        ),
    ],
)
@pytest.mark.parametrize("dry", [[], ["-N"], ["--dry-run"]])
def test_the_others_change_what_they_say(
    api: FakeRegions, argv: list[str], changes: tuple[object, ...], dry: list[str], capsys: Captured
) -> None:
    assert main([*argv, *dry]) == 0
    assert api.applied == [(changes, bool(dry))]
    would = "would " if dry else ""
    assert capsys.readouterr().out == f"{would}map r9 into ctl\n"


def test_reload(api: FakeRegions, capsys: Captured) -> None:
    assert main(["reload", "-N", "--json=short"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [step["verb"] for step in steps] == ["attach"]
    api.steps = ()
    assert main(["reload"]) == 0
    assert capsys.readouterr().out == "nothing to do.\n"
    assert api.reloaded == [True, False]


def test_a_refusal_has_its_hint_and_status(api: FakeRegions, capsys: Captured) -> None:
    api.refusal = Conflict("ctl has r0", hint="say --force")
    assert main(["remove", "r0"]) == 5
    assert capsys.readouterr() == ("", "xshmctl: ctl has r0\nhint: say --force\n")


TOML = """
[region.telemetry]
size = "1 MiB"
lifetime = "system"

[region.log]
size = 4096
"""


def test_create_from_toml_adds_all_its_regions_or_none(api: FakeRegions, tmp_path: Path) -> None:
    file = tmp_path / "regions.toml"
    file.write_text(TOML)
    assert main(["create", str(file)]) == 0
    assert main(["create", "-N", str(file)]) == 0
    ((changes, first), (again, second)) = api.applied
    assert (first, second, changes) == (False, True, again)
    assert [type(change) for change in changes] == [AddRegion, AddRegion]
    sizes = {c.config.region_id: c.config.nr_frames for c in changes if isinstance(c, AddRegion)}
    assert sizes == {"telemetry": 256, "log": 1}
    telemetry = next(
        c for c in changes if isinstance(c, AddRegion) and c.config.region_id == "telemetry"
    )
    assert telemetry.config.terms.lifetime is Lifetime.SYSTEM
    assert str(file) in telemetry.config.place.file


@pytest.mark.parametrize(
    ("text", "more", "status", "said"),
    [
        ("", [], 5, "defines no region"),
        ("[region.a", [], 1, "regions.toml"),
        (TOML, ["-p"], 2, "xl's options"),
        (TOML, ["memory=8"], 2, "xl's options"),
    ],
)
def test_a_toml_file_that_will_not_do(
    api: FakeRegions, tmp_path: Path, capsys: Captured,
    text: str, more: list[str], status: int, said: str,
) -> None:  # fmt: skip
    file = tmp_path / "regions.toml"
    file.write_text(text)
    assert main(["create", str(file), *more]) == status
    assert said in capsys.readouterr().err
    assert api.applied == []


@pytest.mark.parametrize("word", ["ctl", "5"])
def test_wait(api: FakeRegions, capsys: Captured, word: str) -> None:
    assert main(["wait", word, "--timeout=7"]) == 0
    assert capsys.readouterr().out == "ctl: domain 5, attached, with r0\n"
    assert main(["wait", word, "-j"]) == 0
    assert json.loads(capsys.readouterr().out)["guest"]["name"] == "ctl"
    assert api.waited == [("ctl", 7.0), ("ctl", 60.0)]
    api.wait_outcome = NoSuchGuest("ctl ended")
    assert main(["wait", word]) == 4


def test_status(api: FakeRegions, capsys: Captured) -> None:
    api.figures = {"attaches": 3, "last_reload_at": 1}
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^ *Daemon: xshmd \S+, process {os.getpid()}, at ", out, re.M)
    assert re.search(r"^ *Regions: 1, 1 MiB$", out, re.M)
    assert re.search(r"^ *Last reload: 1970-01-01 ", out, re.M)
    assert re.search(r"^ *Attaches: 3$", out, re.M)
    assert main(["status", "--json=short"]) == 0
    assert json.loads(capsys.readouterr().out)["status"]["counters"] == {"attaches": 3}


def test_show_says_what_is_not_as_usual(api: FakeRegions, capsys: Captured) -> None:
    terms = RegionTerms(
        prot=Prot.RO,
        backing=Backing.HOST,
        host_first_mfn=0x80000,
        transport=Transport.GRANT,
        isolation=Isolation.REGION,
        prot_enforcement=ProtEnforcement.ADVISORY,
    )
    region = dataclasses.replace(SNAPSHOT.regions[0], terms=terms)
    api.now = dataclasses.replace(SNAPSHOT, regions=(region,))
    assert main(["show", "r0"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "Backing: memory of the host, from machine address 0x80000000 on" in lines
    for start in ("Prot: ro", "Transport: grant", "Isolation: region", "Enforcement: advisory"):
        assert any(line.startswith(start) for line in lines), start


EVENTS = [
    Event(
        kind=EventKind.PEER_JOINED, region="r0", guest="a\x1bb", domid=DomId(7), request=request(),
        size_bytes=1 << 20, reason="guest created",
    ),
    Event(kind=EventKind.HOLDER_CREATED, holder_uuid="uuid"),
    Event(kind=EventKind.RELOADED),
]  # fmt: skip


def test_monitor_for_people(api: FakeRegions, capsys: Captured) -> None:
    api.to_come = [EVENTS, []]
    assert main(["monitor", "--timeout=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in lines)
    assert [line[10:].rstrip() for line in lines] == [
        "region            r0: 1 MiB, 2 members",
        "guest             ctl: attached, r0",
        "guest             log: rebooting, r0",
        "peer-joined       region r0, guest a?b (domain 7), at 0x38000000, 1 MiB: guest created",
        "holder-created    holder uuid",
        "reloaded",
        "resync            events were missed; this is how it is now",
        "region            r0: 1 MiB, 2 members",
        "guest             ctl: attached, r0",
        "guest             log: rebooting, r0",
    ]


def test_monitor_for_programs(api: FakeRegions, capsys: Captured) -> None:
    api.to_come = [EVENTS]
    assert main(["monitor", "--timeout=1", "--json=short"]) == 0
    replies = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [next(k for k, v in reply.items() if v) for reply in replies] == [
        "state", "event", "event", "event",
    ]  # fmt: skip
    assert replies[1]["event"]["kind"] == "peer_joined"


class Streams:
    """Stand-ins for the standard streams, which have bytes below."""

    def __init__(self, data: bytes = b"") -> None:
        self.buffer = io.BytesIO(data)
        self.flush = self.buffer.flush


def test_dump(api: FakeRegions, monkeypatch: pytest.MonkeyPatch) -> None:
    api.memory[:] = os.urandom(len(api.memory))
    out = Streams()
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["dump", "r0"]) == 0
    assert out.buffer.getvalue() == api.memory
    out.buffer.seek(0)
    out.buffer.truncate()
    assert main(["dump", "r0", "--offset=4KiB", "--length=0x11000"]) == 0
    assert out.buffer.getvalue() == api.memory[0x1000:0x12000]


@pytest.mark.parametrize(
    "argv",
    [
        ["dump", "r0", "--offset=1048577"],
        ["dump", "r0", "--offset=1MiB", "--length=1"],
        ["dump", "r0", "--length=1048577"],
        ["dump", "r0", "--length=-1"],
        ["dump", "r0", "--length=1MB"],
        ["dump", "r0", "--offset=9223372036854775808"],
        ["load", "r0", "--offset=1048577"],
    ],
)
@pytest.mark.usefixtures("api")
def test_what_is_not_in_the_region(argv: list[str], capsys: Captured) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("xshmctl: ")


def test_load_from_a_pipe_and_from_a_file(
    api: FakeRegions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    data = os.urandom(100_000)
    file = tmp_path / "image"
    file.write_bytes(data)
    with file.open("rb") as plain:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(plain))
        assert main(["load", "-N", "r0", "--offset=3"]) == 0
        assert not any(api.memory)
        assert capsys.readouterr().out == "would write 100000 bytes into r0, from byte 3 on\n"
        plain.seek(0)
        assert main(["load", "r0", "--offset=3"]) == 0
        assert api.memory[3:100_003] == data
        assert max(len(each) for _, _, each, _ in api.written) == 65536
        plain.seek(0)
        api.written.clear()
        assert main(["load", "r0", "--offset=1000000"]) == 5
        assert "the input has 100000" in capsys.readouterr().err
        assert api.written == []


def test_load_more_than_there_is_room_for(
    api: FakeRegions, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source:
        os.write(writing, b"x" * 60_000)
        os.close(writing)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(source))
        assert main(["load", "r0", "--offset=1040000"]) == 5
    assert "it has more" in capsys.readouterr().err
    assert not any(api.memory)


@pytest.mark.usefixtures("api")
def test_a_full_disk_is_no_traceback() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "xshmd.ctl", "dump", "r0"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    said = "xshmctl: the bytes cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_only_a_terminal_is_told_of_progress(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]
) -> None:
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    times = iter(range(10))
    monkeypatch.setattr("xshmd.ctl.transfer.time.monotonic", lambda: next(times))
    progress = Progress(1 << 20)
    progress.reached(1 << 19)
    progress.end()
    expected = "\rxshmctl:  50 % of 1 MiB\r\x1b[K" if stream is Terminal else ""
    assert shown.getvalue() == expected


@pytest.mark.parametrize(
    ("typed", "meant"), [("lst", "list"), ("atach", "attach"), ("moniter", "monitor")]
)
def test_a_mistyped_verb(typed: str, meant: str, capsys: Captured) -> None:
    assert main(["--json", "short", typed]) == 2
    assert capsys.readouterr().err == (
        f"xshmctl: there is no verb {typed}\nhint: did you mean {meant}?\n"
    )


def test_help(capsys: Captured) -> None:
    assert main(["help"]) == 0
    out = capsys.readouterr().out
    for verb in verbs.VERBS:
        assert f"    {verb}  " in out
    assert main(["help", "attach"]) == 0
    assert "usage: xshmctl attach " in capsys.readouterr().out
    assert main(["help", "nonsense"]) == 2


WORDS = (
    "list", "show", "r0", "--guests", "--no-legend", "--json=short", "--json", "short", "-j",
    "--socket=/a", "--socket=", "--", "-h", "",
)  # fmt: skip


def test_the_quick_way_means_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XSHMD_SOCKET", raising=False)
    taken = 0
    for count in range(4):
        for words in itertools.product(WORDS, repeat=count):
            quick = verbs.quick(list(words), verbs.DEFAULT_SOCKET)
            if quick is not None:
                taken += 1
                assert vars(args.parse(words)) == vars(quick), words
    assert taken > 100


@pytest.mark.parametrize(
    "argv",
    [["list"], ["list", "--guests", "--no-legend"], ["--json=short", "show", "a", "b"]],
)
def test_the_usual_goes_the_quick_way(argv: list[str]) -> None:
    assert verbs.quick(argv, "/a") is not None
