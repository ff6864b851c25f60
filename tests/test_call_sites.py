# SPDX-License-Identifier: LGPL-2.1-or-later
"""The list of places where an error can strike is complete, and strikes are put down to them."""

from __future__ import annotations

import re

from call_sites import ENGINE, call_sites
from faults import Fault, play
from test_engine_faults import creations

from xshmd.xen.errno_table import failure

NAMED = r"\bxen\.((?:un)?map\w+|populate|set_target|destroy)\b"


def test_what_is_asked_of_a_port_is_a_call_site() -> None:
    """Counted in another way: every method of Xen's that the engine names."""
    found = {(site.file, site.kind) for site in call_sites()}
    for path in ENGINE.glob("*.py"):
        for name in re.findall(
            r"\bxen\.((?:un)?map\w+|populate|set_target|destroy)\b", path.read_text()
        ):
            assert (path.name, name) in found


def test_a_strike_is_put_down_to_its_place() -> None:
    sites = {(site.file, site.kind): site for site in call_sites()}
    seen = next(site for site in play(creations).seen if site.kind == "set_target")
    fault = Fault(seen, failure("set_target", None, 12), for_ever=False)
    ((file, line, kind),) = play(creations, fault).struck_at
    assert kind == "set_target"
    site = sites[file, kind]
    assert site.first_line <= line <= site.last_line
