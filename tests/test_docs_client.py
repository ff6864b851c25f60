# SPDX-License-Identifier: LGPL-2.1-or-later
"""The examples of docs/client.md and the README run as they stand, and let go when told to."""

from __future__ import annotations

import dataclasses
import functools
import re
import threading
from pathlib import Path

import pytest
import trio
from fakes.dom0_memory import Dom0Memory
from varlink_fakes import OWNER, SNAPSHOT, FakeLease, FakeRegions, daemon, request

from xshmd import client, errors
from xshmd.client import on_trio
from xshmd.engine import leases

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "client.md").read_text()
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
EXAMPLES = [*PYTHON.findall(PAGE), *PYTHON.findall((ROOT / "README.md").read_text())]


class Impatient(FakeLease):
    """A lease of a region that is wanted back after a while."""

    async def wait_ending(self) -> str:
        await trio.sleep(0.3)
        return "removed by an administrator"


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("varlink_fakes.FakeLease", Impatient)
    api = FakeRegions()
    name = "telemetry" if "telemetry" in EXAMPLES[number] else "frames"
    region = dataclasses.replace(SNAPSHOT.regions[0], region_id=name)
    guest = dataclasses.replace(OWNER, requests=(request(name),))
    api.now = dataclasses.replace(SNAPSHOT, regions=(region,), guests=(guest,))
    memory = Dom0Memory(OWNER.holder_uuid, 3, region.holder_first_gfn, region.nr_frames)
    for module in (client, on_trio):
        connect = functools.partial(module.connect, str(tmp_path / "socket"), xen=memory)
        monkeypatch.setattr(module, "connect", connect)
    with daemon(tmp_path / "socket", api):
        # In a thread, as it may run an event loop of its own.
        failed: list[BaseException] = []

        def body() -> None:
            try:
                exec(compile(EXAMPLES[number], f"example {number}", "exec"), {})
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
    assert not failed, failed
    assert (memory.nr_open, memory.nr_mapped) == (0, 0)
    said = capsys.readouterr().out
    text = EXAMPLES[number]
    assert any(memory.content) == ("memory[" in text or "Header" in text)
    if "print(region.id" in text:
        assert said == "frames 1048576 ('ctl',)\n"
    assert said.count("let go: removed by an administrator") == text.count("let go")


def test_there_are_examples_of_all_of_it() -> None:
    assert len(EXAMPLES) == 7
    words_of_it = (".regions()", ".map(", ".attach(", "wait_ending", "on_trio", "from_buffer")
    for words in (*words_of_it, ".watch(", ".trigger("):
        assert any(words in text for text in EXAMPLES)


def test_what_it_says_is_so() -> None:
    assert f"at most {leases.MOST} leases" in PAGE
    assert leases.LET_GO_S == 5
    for name in re.findall(r"`([A-Z]\w+)`", PAGE.partition("What can go wrong")[2]):
        assert hasattr(errors, name) or name == "LeaseRegion", name
