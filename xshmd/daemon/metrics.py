# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes figures for Prometheus' node_exporter: a text file that is always whole.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/.  The names are part of the
contract with the outside (docs/hooks.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import structlog
import trio

from xshmd import __version__
from xshmd.api import RegionsApi
from xshmd.machine import HostInfo
from xshmd.model import GuestState, Snapshot

log = structlog.get_logger()

EVERY_S: Final = 15.0
"""How often the file is written when nothing happens: a reader can tell a stale one by its age."""
AT_MOST_EVERY_S: Final = 1.0
MODE: Final = 0o644
"""node_exporter is not root."""

Labels = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """One metric with all of its samples."""

    name: str
    kind: str
    """``gauge`` or ``counter``."""
    help: str
    samples: tuple[tuple[Labels, float], ...]


COUNTERS: Final = (
    ("attaches", "xshmd_attach_total", "Times a guest was given a region's memory."),
    ("detaches", "xshmd_detach_total", "Times a guest ceased to have a region's memory."),
    ("guests_attached", "xshmd_guests_attached_total", "New guests given all of their regions."),
    ("refusals", "xshmd_guests_refused_total", "New guests that could not have their regions."),
    ("reloads", "xshmd_reload_total", "Times the configuration was read again."),
    ("messages_sent", "xshmd_xenstore_messages_total", "Requests sent to xenstored."),
    ("events_dropped", "xshmd_events_dropped_total", "Events that slow listeners missed."),
    ("doorbell_rings", "xshmd_doorbell_rings_total", "Rings of guests that came to dom0."),
    ("doorbells_held_up", "xshmd_doorbells_held_up_total", "Times a guest rang too fast."),
)
"""Name in the statistics, name of the metric, its help text."""
REFUSALS: Final = "refusals_"
"""Before the name of a rule in the statistics."""
MICRO: Final = 1e-6


def metrics(snapshot: Snapshot, statistics: Mapping[str, int], host: HostInfo) -> Iterator[Metric]:
    """Yield everything that is published, from what exists and what was counted."""
    states = Counter(guest.state for guest in snapshot.guests)
    build = (("version", __version__), ("xen", host.xen_text), ("arch", host.arch.value))
    yield _gauge("xshmd_up", "Always 1 in a file that is written.", 1)
    yield Metric(
        "xshmd_build_info", "gauge", "Always 1; what runs is in the labels.", ((build, 1),)
    )
    yield _gauge("xshmd_regions", "Regions that exist.", len(snapshot.regions))
    yield Metric(
        "xshmd_guests",
        "gauge",
        "Guests that have, are getting or await regions, by how far they are.",
        tuple(((("state", state.value),), states[state]) for state in GuestState),
    )
    yield _gauge("xshmd_holders", "Domains that hold regions' memory.", len(snapshot.holders))
    yield _gauge(
        "xshmd_shared_bytes",
        "Memory of all regions, each counted once.",
        sum(region.size_bytes for region in snapshot.regions),
    )
    yield _gauge("xshmd_host_free_bytes", "Memory of the host that is free.", host.free_bytes)
    for key, name, text in COUNTERS:
        if key in statistics:
            yield Metric(name, "counter", text, (((), statistics[key]),))
    yield Metric(
        "xshmd_refused_total",
        "counter",
        "Times that something was refused, by the rule that it broke.",
        tuple(
            ((("rule", key.removeprefix(REFUSALS)),), count)
            for key, count in statistics.items()
            if key.startswith(REFUSALS)
        ),
    )
    if "attach_microseconds" in statistics:
        text = "Seconds it took to give new guests their regions, all together."
        seconds = statistics["attach_microseconds"] * MICRO
        yield Metric("xshmd_attach_seconds_total", "counter", text, (((), seconds),))
    if "uptime_seconds" in statistics:
        uptime_s = statistics["uptime_seconds"]
        yield _gauge("xshmd_uptime_seconds", "How long the daemon has been running.", uptime_s)


def _gauge(name: str, text: str, value: float) -> Metric:
    return Metric(name, "gauge", text, (((), value),))


def exposition(published: Iterable[Metric]) -> str:
    """Return the metrics in Prometheus' text format."""
    lines = []
    for metric in published:
        lines.append(f"# HELP {metric.name} {_escaped(metric.help, quote=False)}")
        lines.append(f"# TYPE {metric.name} {metric.kind}")
        for labels, value in metric.samples:
            inside = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels)
            named = f"{metric.name}{{{inside}}}" if inside else metric.name
            lines.append(f"{named} {value!r}")
    return "\n".join((*lines, ""))


def _escaped(text: str, *, quote: bool = True) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quote else text


def fresh_name(path: Path) -> Path:
    """Return where the file is written before it is renamed; node_exporter reads only *.prom."""
    return path.with_name(f".{path.name}.new")


def write(path: Path, text: str) -> None:
    """Replace the file by one with this text, so that a reader never sees half of it."""
    fresh = fresh_name(path)
    fresh.unlink(missing_ok=True)
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
        with os.fdopen(fd, "w") as file:
            os.fchmod(fd, MODE)  # the unit's umask would leave it to root
            file.write(text)
        fresh.rename(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


class Exporter:
    """Keeps one file up to date: after every change, and now and then without one.

    A file that cannot be written is the admin's trouble and not the guests': it is said once, and
    tried again.
    """

    def __init__(self, api: RegionsApi, path: Path) -> None:
        self._api = api
        self._path = path
        self._failed = ""

    async def run(self) -> None:
        """Write the file until cancelled, then remove it: a daemon that is gone has no figures."""
        try:
            while True:
                async with self._api.monitor() as events:
                    ended = False
                    while not ended:
                        await self._write()
                        await trio.sleep(AT_MOST_EVERY_S)
                        with trio.move_on_after(EVERY_S - AT_MOST_EVERY_S):
                            ended = await _something_happened(events)
        finally:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    async def _write(self) -> None:
        host = await self._api.host()
        text = exposition(metrics(self._api.snapshot(), self._api.statistics(), host))
        try:
            await trio.to_thread.run_sync(write, self._path, text)
        except OSError as error:
            reason = f"{self._path}: {error.strerror}"
            if reason != self._failed:
                log.warning("metrics not written", reason=reason)
            self._failed = reason
        else:
            self._failed = ""


async def _something_happened(events: trio.MemoryReceiveChannel[object]) -> bool:
    """Wait for an event and take all there are; return whether the channel has ended."""
    try:
        await events.receive()
        with contextlib.suppress(trio.WouldBlock):
            while True:
                events.receive_nowait()
    except trio.EndOfChannel:
        return True
    return False
