# SPDX-License-Identifier: LGPL-2.1-or-later
"""What docs/grants.md shows works as it is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from xshmd.ctl.__main__ import main
from xshmd.model import Grant
from xshmd.policy import grants
from xshmd.units import frames_of

TEXT = (Path(__file__).parent.parent / "docs/grants.md").read_text()


def test_the_region_may_be_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        (tmp_path / f"{number}.toml").write_text(block)
    files = map(str, tmp_path.iterdir())
    assert main(["check", "--arch", "arm64", *files]) == 0, capsys.readouterr().err


def test_the_references_are_those_it_would_have() -> None:
    node = re.search(r"begin=(\S+) size=(\S+)[^:]*grants=(\S+)", TEXT)
    assert node is not None
    shares = grants.shares(
        frames_of(int(node[2], 16)), 2, nr_table_frames=grants.USUAL_TABLE_FRAMES, room={}
    )
    domids = {str(number): 4 + number for number in range(len(shares))}
    made, at = [], 0
    for number, share in enumerate(shares):
        made.append(
            Grant(
                region_id="frames", holder_uuid=str(number), first_ref=grants.RESERVED_ENTRIES,
                nr_frames=share.nr_frames, offset_frames=at,
            )
        )  # fmt: skip
        at += share.nr_frames
    assert grants.published(made, domids) == node[3]
    first = re.search(r"references (\d+) to (\d+), which\nare the first (\d+) frames", TEXT)
    assert first is not None
    assert [int(word) for word in first.groups()] == [
        8,
        7 + shares[0].nr_frames,
        shares[0].nr_frames,
    ]


def test_the_helpers_command_lines_are_its_own() -> None:
    source = (Path(__file__).parent.parent / "xshmd/resources/guest/xshm-guest.c").read_text()
    shown = {line.split()[1] for line in re.findall(r"^    xshm-guest .*", TEXT, re.MULTILINE)}
    (usage,) = re.findall(r'"usage: xshm-guest (.*)\\n"', source)
    assert shown == {choice.split()[0] for choice in usage.split(" | ")}
