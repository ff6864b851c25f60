# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xshmctl doctor``: what is not as it should be, from files and, if it answers, the daemon."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from xshmd import errors
from xshmd.ctl import probe, render
from xshmd.ctl.probe import Check, Machine
from xshmd.varlink.client import Client


def run(options: Any, machine: Machine | None = None) -> int:
    """Check the machine and print each finding."""
    found = [*probe.checks(machine or Machine()), *_live(options.socket)]
    if options.json != "off":
        fields = [_fields(check) for check in found]
        render.print_json({"findings": fields}, options.json)
    else:
        _print(found)
    return _status(found)


def _live(socket_path: str) -> Iterator[Check]:
    """Yield what the daemon has to say."""
    try:
        with Client(socket_path) as client:
            host = client.call("GetHost")["host"]
    except errors.DaemonUnreachable as exc:
        yield Check("daemon", probe.FAILED, exc.message, exc.hint, "daemon")
    except errors.XshmError as exc:
        yield Check("daemon", probe.FAILED, exc.message, exc.hint)
    else:
        yield Check("daemon", probe.OK, f"xshmd answers at {socket_path}")
        for finding in host["findings"]:
            yield Check(
                finding["topic"], finding["verdict"], finding["text"], finding.get("hint") or ""
            )


def _status(found: Sequence[Check]) -> int:
    failed = [check for check in found if check.verdict not in (probe.OK, probe.WARNING)]
    if any(check.about == "xen" for check in failed):
        return errors.EXIT_NO_XEN
    if not failed:
        return errors.EXIT_OK
    if all(check.about == "daemon" for check in failed):
        return errors.EXIT_UNREACHABLE
    return errors.EXIT_FAILED


def _fields(check: Check) -> dict[str, str]:
    fields = {"topic": check.topic, "verdict": check.verdict, "text": check.text}
    return {**fields, "hint": check.hint} if check.hint else fields


def _print(found: Sequence[Check]) -> None:
    for check in found:
        print(render.printable(f"{check.verdict:<8} {check.topic}: {check.text}"))
        if check.hint:
            print(render.printable(f"{'':<8} hint: {check.hint}"))
