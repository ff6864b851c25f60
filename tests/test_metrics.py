# SPDX-License-Identifier: LGPL-2.1-or-later
"""The metrics file is what node_exporter can read, always whole, and says what there is."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from trio.testing import MockClock
from varlink_fakes import HOST, SNAPSHOT, FakeRegions

from xshmd.daemon import metrics
from xshmd.daemon.metrics import EVERY_S, Exporter, Metric, exposition
from xshmd.engine.events import EventHub
from xshmd.events import Event, EventKind

STATISTICS = {
    "attaches": 5, "detaches": 2, "refusals": 1, "messages_sent": 321, "events_dropped": 0,
    "doorbell_rings": 77,
    "doorbells_held_up": 3,
    "uptime_seconds": 17, "guests_attached": 3, "attach_microseconds": 1_500_000,
    "something_new": 4, "refusals_too-many-regions": 2, "refusals_Conflict": 1,
}  # fmt: skip
_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\n"])*)"(,|$)')
_SAMPLE = re.compile(rf"({_NAME})(?:\{{(.*)\}})? (\S+)")

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def _unescaped(match: re.Match[str]) -> str:
    return "\n" if match[1] == "n" else match[1]


def parsed(text: str) -> tuple[Samples, dict[str, str], dict[str, str]]:
    """Read the format by the letter of its description; return samples, types and help texts."""
    samples: Samples = {}
    types: dict[str, str] = {}
    helps: dict[str, str] = {}
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if match := re.fullmatch(rf"# HELP ({_NAME}) ((?:[^\\\n]|\\[\\n])*)", line):
            assert match[1] not in helps
            helps[match[1]] = re.sub(r"\\(.)", _unescaped, match[2])
        elif match := re.fullmatch(rf"# TYPE ({_NAME}) (counter|gauge)", line):
            assert match[1] not in types
            types[match[1]] = match[2]
        else:
            match = _SAMPLE.fullmatch(line)
            assert match, line
            assert match[1] in types, f"{line} before its TYPE"
            labels = []
            rest = match[2] or ""
            while rest:
                label = _LABEL.match(rest)
                assert label, rest
                value = re.sub(r"\\(.)", _unescaped, label[2])
                labels.append((label[1], value))
                rest = rest[label.end() :]
            key = (match[1], tuple(labels))
            assert key not in samples
            samples[key] = float(match[3])
    assert types.keys() == helps.keys()
    return samples, types, helps


def test_says_what_there_is() -> None:
    samples, types, _ = parsed(exposition(metrics.metrics(SNAPSHOT, STATISTICS, HOST)))
    plain = {name: value for (name, labels), value in samples.items() if not labels}
    assert plain == {
        "xshmd_up": 1, "xshmd_regions": 1, "xshmd_holders": 1, "xshmd_shared_bytes": 1 << 20,
        "xshmd_host_free_bytes": 1 << 30, "xshmd_attach_total": 5, "xshmd_detach_total": 2,
        "xshmd_guests_refused_total": 1, "xshmd_xenstore_messages_total": 321,
        "xshmd_doorbell_rings_total": 77,
        "xshmd_doorbells_held_up_total": 3,
        "xshmd_events_dropped_total": 0, "xshmd_uptime_seconds": 17,
        "xshmd_guests_attached_total": 3, "xshmd_attach_seconds_total": 1.5,
    }  # fmt: skip
    states = {dict(labels)["state"]: v for (n, labels), v in samples.items() if n == "xshmd_guests"}
    assert states == {
        "held": 0, "attaching": 0, "mapping": 0, "attached": 1, "rebooting": 1, "doomed": 0,
    }  # fmt: skip
    refused = {dict(ls)["rule"]: v for (n, ls), v in samples.items() if n == "xshmd_refused_total"}
    assert refused == {"too-many-regions": 2, "Conflict": 1}
    (build,) = (dict(labels) for (name, labels) in samples if name == "xshmd_build_info")
    assert (build["xen"], build["arch"]) == ("4.20.4", "x86_64")
    assert {name for name, kind in types.items() if kind == "counter"} == {
        name for name in types if name.endswith("_total")
    }


@given(st.text(), st.text(), st.floats(allow_nan=False) | st.integers(0, 1 << 53))
def test_whatever_is_in_it_it_can_be_read(text: str, label: str, value: float) -> None:
    metric = Metric("m", "gauge", text, (((("one", label), ("two", "x")), value),))
    samples, _, helps = parsed(exposition([metric]))
    assert samples == {("m", (("one", label), ("two", "x"))): value}
    assert helps == {"m": text}


def test_the_file_is_replaced_and_anybody_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "xshmd.prom"
    path.write_text("old")
    path.chmod(0o600)
    before = path.stat().st_ino
    mask = os.umask(0o077)  # the unit's
    try:
        metrics.write(path, "new\n")
    finally:
        os.umask(mask)
    assert path.read_text() == "new\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert path.stat().st_ino != before
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_crash_left_is_in_nobodys_way(tmp_path: Path) -> None:
    path = tmp_path / "xshmd.prom"
    metrics.fresh_name(path).write_text("half")
    metrics.write(path, "new\n")
    assert path.read_text() == "new\n"
    assert list(tmp_path.iterdir()) == [path]


class Regions(FakeRegions):
    """Has a real hub, and a number that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.hub = EventHub()
        self.attaches = 0

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
        async with self.hub.listen() as events:
            yield events

    def statistics(self) -> Mapping[str, int]:
        return {"attaches": self.attaches}

    def attach(self) -> None:
        self.attaches += 1
        self.hub.emit(Event(kind=EventKind.PEER_JOINED, region="r0"))


def attaches(path: Path) -> float | None:
    """Return the number in the file, if there is a file."""
    return parsed(path.read_text())[0]["xshmd_attach_total", ()] if path.exists() else None


async def until(path: Path, wanted: float, limit_s: float) -> None:
    """Wait in the test's own time until the file says so."""
    for _ in range(round(limit_s / 0.1)):
        if attaches(path) == wanted:
            return
        await trio.sleep(0.1)
    pytest.fail(f"not within {limit_s} s")


@pytest.fixture
def clock() -> MockClock:
    """Jumps ahead too, but gives the thread that writes the file a moment first."""
    return MockClock(autojump_threshold=0.02)


async def test_written_at_start_on_change_and_now_and_then(
    tmp_path: Path, clock: MockClock
) -> None:
    path = tmp_path / "xshmd.prom"
    api = Regions()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Exporter(api, path).run)
        await until(path, 0, 5)
        await trio.sleep(5)
        api.attach()
        await until(path, 1, 5)
        for _ in range(100):  # a burst costs one more write, not a hundred
            api.attach()
        await until(path, 101, 5)
        api.attaches = 200  # without an event
        await until(path, 200, EVERY_S + 5)
        nursery.cancel_scope.cancel()
    assert not path.exists()


async def test_a_folder_that_is_not_there_is_said_once(tmp_path: Path, clock: MockClock) -> None:
    folder = tmp_path / "later"
    path = folder / "xshmd.prom"
    with capture_logs() as entries:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Exporter(Regions(), path).run)
            await trio.sleep(5 * EVERY_S)
            assert [entry["event"] for entry in entries] == ["metrics not written"]
            assert str(path) in entries[0]["reason"]
            folder.mkdir()
            await until(path, 0, EVERY_S + 5)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("free_pages", [0, 1 << 40])
def test_large_numbers_are_exact(free_pages: int) -> None:
    host = dataclasses.replace(HOST, free_pages=free_pages)
    samples, _, _ = parsed(exposition(metrics.metrics(SNAPSHOT, {}, host)))
    assert samples["xshmd_host_free_bytes", ()] == free_pages * 4096


def test_the_documentation_lists_every_metric() -> None:
    page = (Path(__file__).parent.parent / "docs" / "hooks.md").read_text()
    every = dict.fromkeys((key for key, _, _ in metrics.COUNTERS), 0) | STATISTICS
    names = {metric.name for metric in metrics.metrics(SNAPSHOT, every, HOST)}
    assert names == set(re.findall(r"`(xshmd_\w+)", page))
