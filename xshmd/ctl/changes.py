# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xshmctl attach``, ``detach``, ``remove`` and ``reload``: change what guests that run have."""

from __future__ import annotations

from typing import Any, Final

from xshmd.ctl import render
from xshmd.varlink.client import Client

CHANGE_S: Final = 600
"""How long a change may take: large regions are zeroed first, and others may be before us."""


def run(options: Any) -> int:
    """Make the change that the verb stands for."""
    match options.verb:
        case "attach":
            parameters = {"guest": options.guest, "entries": _entries(options.entries)}
            return _call(options, "Attach", **parameters)
        case "detach":
            return _call(options, "Detach", guest=options.guest, regions=options.ids)
        case "remove":
            removals = [{"region": each, "force": options.force} for each in options.ids]
            return apply(options, [{"remove": removal} for removal in removals])
        case _:
            return _call(options, "Reload")


def apply(options: Any, changes: list[dict[str, Any]]) -> int:
    """Make several changes, all or none, and print the steps."""
    return _call(options, "Apply", changes=changes)


def _call(options: Any, method: str, **parameters: Any) -> int:
    dry_run = options.dry_run or None
    with Client(options.socket) as client:
        reply = client.call_within(CHANGE_S, method, **parameters, dryRun=dry_run)
    if options.json != "off":
        render.print_json(reply, options.json)
        return 0
    would = "would " if dry_run else ""
    for step in reply["steps"]:
        print(render.printable(f"{would}{step['text']}"))
    if not reply["steps"] and options.legend:
        print("nothing to do.")
    return 0


def _entries(texts: list[str]) -> list[dict[str, Any]]:
    """Return what entries of static_shm say, as the interface says it.

    Raises:
        ConfigError: Some of them are wrong; all that is.
    """
    # Only here: reading configurations takes longer to import than all the rest.
    from xshmd.config.static_shm import parse_entry
    from xshmd.errors import ConfigError, combined
    from xshmd.model import Place
    from xshmd.varlink.records import entry_fields

    wrong: list[ConfigError] = []
    found = []
    for number, text in enumerate(texts, 1):
        key = f"entry {number}" if len(texts) > 1 else ""
        request = parse_entry(text, Place(file="command line", key=key), wrong)
        if request is not None:
            found.append(request)
    if wrong:
        raise combined(wrong)
    return [entry_fields(request) for request in found]
