#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""xshmd, saying what it asks of xenstore and how long its steps take: exact, from inside.

    counted_daemon.py LOG [xshmd's arguments]

Each line of LOG is a JSON list: ``["message", operation, path, step]`` as a request is sent, and
``["step", name, enclosing step, began, seconds]`` as a step ends.  Not for timing the daemon as a
whole: writing the lines takes time of its own.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

STEPS = (
    ("xshmd.engine.gate", "Gate", ("_handle", "_look_at", "_hold", "unpause", "unlock")),
    (
        "xshmd.engine.passage",
        "Passage",
        (
            "advance", "_prepare", "_config_of", "_plan", "_make", "_attach_if_built", "_map",
            "_let_go",
        ),
    ),
    ("xshmd.engine.passage", "", ("check", "attach", "plan_guest")),
    (
        "xshmd.engine.holders",
        "Holders",
        (
            "create", "add_region", "verify", "_make_domain", "_populate_now", "_name",
            "_check_memory",
        ),
    ),
    ("xshmd.engine.ends", "Ends", ("check_holders", "ended", "collect", "note_shutdowns")),
    ("xshmd.engine.reconciler", "Reconciler", ("_look", "_note_shutdowns")),
    ("xshmd.engine.holder_shutdown", "HolderShutdown", ("answer",)),
    ("xshmd.engine.xen_worker", "XenWorker", ("run",)),
    ("xshmd.engine.ledger", "Ledger", ("put_guest", "put_region", "put_holder", "drop_guest")),
    ("xshmd.config.finder", "Finder", ("find", "known")),
    (
        "xshmd.xen.hypervisor",
        "XenHypervisor",
        (
            "zero", "populate", "map_foreign", "set_paging_pool_bytes", "set_target", "pause",
            "unpause", "domains", "domain_info", "host_info", "create_holder_domain",
            "populated_frames",
        ),
    ),
)  # fmt: skip

current: contextvars.ContextVar[str] = contextvars.ContextVar("current", default="")


class Log:
    """The file of JSON lines; a line is one write, so lines of threads do not mix."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def say(self, *words: object) -> None:
        """Write one line."""
        os.write(self._fd, json.dumps(words).encode() + b"\n")


def stepped(log: Log, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, reporting each run of it."""

    def enter() -> tuple[str, contextvars.Token[str], float]:
        outer = current.get()
        return outer, current.set(f"{outer}/{name}" if outer else name), time.monotonic()

    def leave(entered: tuple[str, contextvars.Token[str], float]) -> None:
        outer, token, began = entered
        seconds = time.monotonic() - began
        current.reset(token)
        log.say("step", name, outer, began, seconds)

    @functools.wraps(function)
    async def slow(*args: Any, **kwargs: Any) -> Any:
        entered = enter()
        try:
            return await function(*args, **kwargs)
        finally:
            leave(entered)

    @functools.wraps(function)
    def fast(*args: Any, **kwargs: Any) -> Any:
        entered = enter()
        try:
            return function(*args, **kwargs)
        finally:
            leave(entered)

    return slow if inspect.iscoroutinefunction(function) else fast


def instrument(log: Log) -> None:
    """Wrap every step that exists; one that was renamed is said and left out."""
    for module_name, class_name, names in STEPS:
        module = importlib.import_module(module_name)
        owner = getattr(module, class_name, None) if class_name else module
        for name in names:
            function = getattr(owner, name, None)
            if function is None:
                print(f"no step {module_name} {class_name} {name}", file=sys.stderr)
                continue
            label = f"{class_name}.{name}" if class_name else name
            setattr(owner, name, stepped(log, label, function))
    link: Any = importlib.import_module("xshmd.xen.store_link").Link
    enqueue = link.enqueue

    def counted(self: Any, reply: Any, payload: bytes, tx_id: int = 0) -> None:
        log.say("message", reply.op.name, reply.path, current.get())
        enqueue(self, reply, payload, tx_id)

    link.enqueue = counted


def main() -> int:
    """Run xshmd, counted."""
    instrument(Log(sys.argv[1]))
    daemon = importlib.import_module("xshmd.daemon.__main__")
    return int(daemon.main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
