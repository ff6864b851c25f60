# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xshmctl vhost-user serve|connect``: gives a back-end in dom0 the memory of a region or a guest.

It is this process, not the daemon, that back-ends talk to: whatever one of them sends can harm
nobody but this command.  What there is the daemon says; each change of it comes as an event.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import socket
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Final

from xshmd.ctl import render
from xshmd.ctl.lending import Lender, Watch
from xshmd.ctl.signals import Signals
from xshmd.errors import Conflict, Refused
from xshmd.units import human_size
from xshmd.vhost_user.channel import Channel, Disconnected
from xshmd.vhost_user.frontend import Frontend, Queue
from xshmd.vhost_user.offer import NO_ADVANCE_FLAGS, Addresses, Target
from xshmd.vhost_user.payloads import MemoryRegion
from xshmd.vhost_user.wire import ProtocolViolation

AGAIN_S: Final = 1.0
"""When to try again to reach a back-end that is not there."""
Peers = Generator[socket.socket, None, None]


def run(options: Any) -> int:
    """Serve one back-end after the other until a signal comes."""
    target = Target(
        region=options.region or "", guest=options.guest or "",
        addresses=Addresses(options.addresses), no_advance=NO_ADVANCE_FLAGS[options.no_advance_map],
    )  # fmt: skip
    signals = Signals()
    with signals.caught(), contextlib.ExitStack() as closing:
        lender = closing.enter_context(Lender(options.socket, target))
        lender.check()
        watch = closing.enter_context(Watch(options.socket))
        said = Said(options.json)
        serving = options.mode == "serve"
        peers = _accepted(options.path, said) if serving else _connected(options.path)
        closing.callback(peers.close)
        for connected in peers:
            with contextlib.closing(Channel(connected)) as channel:
                said("connected")
                try:
                    _serve(channel, lender, watch, options.queues, said, signals)
                except (Disconnected, ProtocolViolation, TimeoutError, Refused, Conflict) as why:
                    said("disconnected", why=str(why) or "it did not answer in time")
                    if isinstance(why, Refused) and not serving:
                        raise
                finally:
                    with signals.held():
                        lender.forget()
    return 0


def _serve(
    channel: Channel,
    lender: Lender,
    watch: Watch,
    queues: Sequence[Queue],
    said: Said,
    signals: Signals,
) -> None:
    """Keep a back-end's memory in step until it goes."""
    frontend = Frontend(channel)
    frontend.negotiate(xen=True)
    running: set[int] = set()
    while True:
        watch.clear()
        with signals.held():  # what was given is also said
            running = _update(frontend, lender, queues, running, said)
        awaited = [channel.fileno(), watch.fileno(), *lender.filenos()]
        ready, _, _ = select.select(awaited, [], [], lender.patience())
        if channel.fileno() in ready and (message := channel.receive_some()) is not None:
            for fd in message.fds:
                os.close(fd)
            raise ProtocolViolation(f"{message.name} came unasked")


def _update(
    frontend: Frontend, lender: Lender, queues: Sequence[Queue], started: set[int], said: Said
) -> set[int]:
    """Give and withdraw what has changed; return which queues run now."""
    before = frontend.table
    now = lender.current(before)
    covered = {queue.where.index for queue in queues if _covers(now, queue)}
    # What is under a queue may be another region at the same addresses: that is another queue.
    same = [region for region in now if region in before]
    running = {queue.where.index for queue in queues if _covers(same, queue)} & started
    for index in started - running:
        frontend.stop(index)
    frontend.give(now, lender.open_fd)
    lender.keep(frontend.table)
    for gone in (region for region in before if region not in now):
        said("withdrawn", gone)
    for new in (region for region in now if region not in before):
        said("given", new)
    for queue in queues:
        if queue.where.index in covered - running:
            # A back-end that is new goes on where the one before it was.
            frontend.start(queue, lender.used_index(queue.where.used))
    return covered


def _covers(regions: Sequence[MemoryRegion], queue: Queue) -> bool:
    """Return whether all parts of a queue begin in what the back-end has."""
    where = queue.where
    return all(
        any(0 <= at - region.user_address < region.size_bytes for region in regions)
        for at in (where.descriptors, where.available, where.used)
    )


# -- the socket -----------------------------------------------------------------------------------


def _accepted(path: Path, said: Said) -> Peers:
    """Listen at a path; yield one back-end after the other."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        os.fchmod(listener.fileno(), 0o600)
        try:
            listener.bind(str(path))
        except OSError as error:
            raise Conflict(
                f"there can be no socket {path}: {error.strerror}", hint="remove what is there"
            ) from error
        try:
            listener.listen()
            said("listening", path=str(path))
            while True:
                yield listener.accept()[0]
        finally:
            path.unlink(missing_ok=True)


def _connected(path: Path) -> Peers:
    """Connect to a back-end that listens at a path, again whenever that ends."""
    while True:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.connect(str(path))
        except OSError:
            connected.close()
            time.sleep(AGAIN_S)
            continue
        yield connected


# -- what is said ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    """Prints what happens, a line each, or as JSON."""

    json: str

    def __call__(
        self, event: str, region: MemoryRegion | None = None, *, path: str = "", why: str = ""
    ) -> None:
        if self.json != "off":
            facts: dict[str, Any] = {"event": event}
            if region is not None:
                facts |= {
                    "guestAddress": region.guest_address, "sizeBytes": region.size_bytes,
                    "userAddress": region.user_address, "offset": region.mmap_offset,
                    "domainId": region.domid,
                }  # fmt: skip
            facts |= {key: value for key, value in (("path", path), ("why", why)) if value}
            render.print_json(facts, self.json)
        else:
            words = [event, path]
            if region is not None:
                words += [
                    human_size(region.size_bytes), f"at {region.guest_address:#x}",
                    f"(user address {region.user_address:#x}) of domain {region.domid}",
                ]  # fmt: skip
            text = " ".join(word for word in words if word)
            print(render.printable(f"{text}: {why}" if why else text))
        render.flush()
