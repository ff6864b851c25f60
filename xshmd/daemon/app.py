# SPDX-License-Identifier: LGPL-2.1-or-later
"""Composes the daemon: the only place where the real Xen, the real xenstore and the rest meet."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from pathlib import Path
from typing import Final

import structlog
import trio

from xshmd import __version__
from xshmd.config.finder import Finder
from xshmd.daemon import audit
from xshmd.daemon.alone import alone
from xshmd.daemon.buffer_methods import BufferMethods
from xshmd.daemon.journal import Journal
from xshmd.daemon.list_methods import ListMethods
from xshmd.daemon.metrics import Exporter
from xshmd.daemon.processes import ProcProcesses
from xshmd.daemon.sdnotify import Notifier
from xshmd.daemon.service import dispatcher
from xshmd.engine.options import Options
from xshmd.engine.reconciler import Reconciler
from xshmd.errors import XenUnavailable, XshmError
from xshmd.keeper.client import KeeperClient
from xshmd.share.mediator import Mediator
from xshmd.share.scatter import Scatter
from xshmd.varlink import server
from xshmd.xen.event_channels import XenEventChannels
from xshmd.xen.hypervisor import XenHypervisor
from xshmd.xen.libxl_lock import LibxlCreationLock
from xshmd.xen.store import open_store

log = structlog.get_logger()

FLUSH_S: Final = 5.0
"""How often a journal that did not take an entry is tried again."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line says."""

    socket_path: Path
    options: Options
    metrics_path: Path | None = None
    """The file with figures for Prometheus, if one is wanted."""
    journal: Journal | None = None
    """Where the log goes, if that is the journal itself."""


class WallClock:
    """The real :class:`~xshmd.dom0_ports.Clock`."""

    def now(self) -> float:
        return time.time()

    def uptime(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)


async def run(settings: Settings) -> None:
    """Run the daemon until SIGTERM or SIGINT."""
    notifier = Notifier()
    # Who is not root, or where there is no Xen, is told that first; opening it does nothing yet.
    with XenHypervisor() as xen, alone(), contextlib.ExitStack() as stack:
        host = xen.host_info()
        log.info("starting", version=__version__, xen=host.xen_text, arch=host.arch.value)
        async with open_store() as store:
            engine = Reconciler(
                xen=xen,
                keeper=KeeperClient(),
                store=store,
                finder=Finder(arch=host.arch, on_skip=_say_skipped),
                locks=LibxlCreationLock(),
                clock=WallClock(),
                processes=ProcProcesses(),
                options=settings.options,
                channels=_event_channels(stack),
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
                if settings.journal is not None:
                    nursery.start_soon(_flush_log, settings.journal)
                # Before the engine: what it recovers is granted and withdrawn like the rest.
                await nursery.start(audit.run, engine)
                await nursery.start(engine.run)
                listener = server.open_listener(settings.socket_path)
                scatter, buffers = Scatter(engine, engine), BufferMethods(xen)
                mediator = Mediator(scatter, engine)
                engine.on_ring = mediator.hasten
                for part in (scatter, mediator, buffers):
                    await nursery.start(part.run)
                lists = ListMethods(scatter, mediator)
                served = dispatcher(audit.AuditedRegions(engine), lists, buffers)
                await nursery.start(server.serve, listener, served)
                if settings.metrics_path is not None:
                    nursery.start_soon(Exporter(engine, settings.metrics_path).run)
                nursery.start_soon(_reload_on_signal, notifier, engine)
                notifier.send("READY=1", f"STATUS={_status(engine)}")
                log.info("ready", socket=str(settings.socket_path), status=_status(engine))
                if notifier.watchdog_s:
                    nursery.start_soon(feed_watchdog, notifier, engine)
    notifier.send("STOPPING=1")
    log.info("stopped")


def _event_channels(stack: contextlib.ExitStack) -> XenEventChannels | None:
    try:
        return stack.enter_context(XenEventChannels())
    except XenUnavailable as error:
        # Who has no region with doorbells need not have the driver.
        log.warning("no doorbells", reason=error.one_line())
        return None


async def _flush_log(journal: Journal) -> None:
    """Write what the journal did not take at once, should nothing be logged for a while."""
    while True:
        await trio.sleep(FLUSH_S)
        journal.flush()


def _say_skipped(file: str, reason: str) -> None:
    log.warning("configuration skipped", file=file, reason=reason)


def _status(engine: Reconciler) -> str:
    snapshot = engine.snapshot()
    return f"{len(snapshot.regions)} regions, {len(snapshot.guests)} guests"


async def _stop_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("stopping", signal=signal.Signals(number).name)
            scope.cancel()
            return


async def _reload_on_signal(notifier: Notifier, engine: Reconciler) -> None:
    with trio.open_signal_receiver(signal.SIGHUP) as signals:
        async for _ in signals:
            now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            notifier.send("RELOADING=1", f"MONOTONIC_USEC={now_us}")
            try:
                await engine.reload()
            except XshmError as error:
                log.error("not reloaded", reason=error.one_line(), **error.facts)
            notifier.send("READY=1", f"STATUS={_status(engine)}")


async def feed_watchdog(notifier: Notifier, engine: Reconciler) -> None:
    """Feed it after a round through the reconciler: one whose one writer is stuck is dead."""
    while True:
        await engine.ping()
        notifier.send("WATCHDOG=1", f"STATUS={_status(engine)}")
        await trio.sleep(notifier.watchdog_s / 3)
