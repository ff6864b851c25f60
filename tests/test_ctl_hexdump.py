# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every byte of a region is shown, at its place."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from varlink_fakes import FakeRegions, daemon

from xshmd.ctl.__main__ import main
from xshmd.ctl.hexdump import lines


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRegions]:
    api = FakeRegions()
    monkeypatch.setenv("XSHMD_SOCKET", str(tmp_path / "socket"))
    with daemon(tmp_path / "socket", api):
        yield api


def test_hexdump(api: FakeRegions, capsys: pytest.CaptureFixture[str]) -> None:
    api.memory[0x10000 - 3 : 0x10000 + 3] = b"\0ab~\x7f\xff"
    assert main(["hexdump", "r0", "--offset=0xffd0", "--length=0x58"]) == 0
    assert capsys.readouterr().out == (
        "0000ffd0  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|\n"
        "*\n"
        "0000fff0  00 00 00 00 00 00 00 00  00 00 00 00 00 00 61 62  |..............ab|\n"
        "00010000  7e 7f ff 00 00 00 00 00  00 00 00 00 00 00 00 00  |~...............|\n"
        "00010010  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  |................|\n"
        "00010020  00 00 00 00 00 00 00 00                           |........|\n"
        "00010028\n"
    )
    assert main(["hexdump", "r0", "--offset=1MiB"]) == 0
    assert capsys.readouterr().out == "00100000\n"
    assert main(["hexdump", "r0", "--length=1048577"]) == 2
    assert "not 1048577" in capsys.readouterr().err


def read_back(dump: list[str]) -> bytes:
    data = row = b""
    for line in dump:
        at, _, rest = line.partition("  ")
        if line != "*":
            while len(data) < int(at, 16):
                data += row
            row = bytes.fromhex(rest.partition("|")[0])
            data += row
    return data


@given(st.binary(max_size=100), st.integers(0, 20), st.integers(1, 4))
def test_no_byte_is_lost(end: bytes, repeats: int, rows: int) -> None:
    data = b"\0" * 16 * repeats + end
    cut = [data[at : at + 16 * rows] for at in range(0, len(data), 16 * rows)]
    assert read_back(list(lines(0, cut))) == data


def test_as_hexdump_of_others_has_it(tmp_path: Path) -> None:
    """od(1), which is everywhere, sees the same bytes at the same places."""
    data = bytes(range(256)) + bytes(64) + b"the end"
    (tmp_path / "data").write_bytes(data)
    done = subprocess.run(
        ["od", "-A", "x", "-t", "x1z", str(tmp_path / "data")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    theirs = [line.split(">")[0].split() for line in done.stdout.splitlines()]
    ours = [line.split("|")[0].split() for line in lines(0, [data])]
    assert [[row[0].lstrip("0"), *row[1:]] for row in ours] == [
        [row[0].lstrip("0"), *row[1:]] for row in theirs
    ]
