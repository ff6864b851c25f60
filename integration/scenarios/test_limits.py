# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an administrator does not let guests have is refused by the daemon that runs, and told."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest

from integration.scenarios.guest import MIB, Entry, Guest
from integration.scenarios.host import POLICY, Host, attach

ALL = 'regions = ["*"]'


@dataclass(frozen=True)
class Case:
    """Something that is too much.

    Attributes:
        rule: what refuses it.
        policy: what xshmd.toml says, with `{first}` and `{second}` for the names of two guests.
        why: what is said of it, a regular expression.
        joins: whether it is a second guest of a region that is too much, and not a first of two.
    """

    rule: str
    policy: str
    why: str
    joins: bool = False

    def __str__(self) -> str:
        return self.rule


CASES = (
    Case("too-many-regions", "[limits]\nregions = 1", "there would be 2 regions, and at most 1"),
    Case(
        "too-much-memory", '[limits]\nmemory = "1 MiB"',
        "regions would have 2 MiB of the host's memory, and at most 1 MiB",
    ),
    Case(
        "too-many-regions-of-guest", "[limits]\nregions_per_guest = 1",
        "guest '.*' would have 2 regions, and a guest is allowed 1",
    ),
    Case(
        "too-much-memory-of-guest", '[limits]\nmemory_per_guest = "1 MiB"',
        "guest '.*' would have 2 MiB of regions, and a guest is allowed 1 MiB",
    ),
    Case(
        "free-memory-floor", '[limits]\nfree_memory = "1 TiB"',
        "2 MiB for regions would leave .* of the host's memory free, and 1 TiB stay free",
    ),
    Case(
        "not-allowed", '[allow.x]\nguests = ["{first}"]\nregions = ["other"]',
        "guest '.*' is not allowed to have region",
    ),
    Case(
        "too-many-members", "[limits]\nmembers = 1",
        "region '.*' would have 2 guests, and a region is allowed 1", joins=True,
    ),
    Case(
        "not-allowed-together",
        '[allow.x]\nguests = ["{first}"]\n[allow.y]\nguests = ["{second}"]',
        "guests '.*' and '.*' are not allowed to share region", joins=True,
    ),
)  # fmt: skip


def check_told(host: Host, guest: Guest, case: Case, since: int) -> None:
    """One line says who is refused, by which rule, why, and what can be done about it where."""
    host.wait_log(rf"guest refused guest='{guest.name}' .*rule=\['{case.rule}'", since)
    ((name, reason),) = host.refusals(since)
    assert name == guest.name
    assert re.search(case.why, reason), reason
    assert POLICY in reason, reason


def count_of(host: Host, rule: str) -> int:
    """How often the daemon has refused something by a rule."""
    counters = json.loads(host.xshmctl("-j", "status").text)["status"]["counters"]
    return int(counters.get(f"refusals_{rule}", 0))


@pytest.mark.alike
def test_what_is_too_much_is_not_made(host: Host) -> None:
    """`xl create` fails for each limit and list, from the moment when it is written; as soon as it
    is gone the same guests are made."""
    one, two = host.unique("one"), host.unique("two")
    first = host.guest("first", Entry(one, host.at), Entry(two, host.at_elsewhere))
    second = host.guest("second", Entry(one, host.at, role="borrower"))
    for case in sorted(CASES, key=lambda case: case.joins):
        if case.joins and host.domid(first) is None:
            host.create(first)
        since, guest = host.mark, second if case.joins else first
        before = count_of(host, case.rule)
        with host.policy(case.policy.format(first=first.name, second=second.name)):
            assert host.create(guest, check=False).status, case
            check_told(host, guest, case, since)
        assert count_of(host, case.rule) == before + 1
        assert host.domid(guest) is None
        assert bool(host.regions()) == case.joins, "nothing was made for it"
    host.create(second)
    assert len(host.region(one)["members"]) == 2
    host.destroy(first, second)


@pytest.mark.alike
def test_guests_that_run_get_no_more_either(host: Host) -> None:
    """Attaching is refused by the same words, and what is there stays; so is a lease."""
    region = host.unique("demo")
    member = host.guest("member", Entry(region, host.at))
    late = host.guest("late", do="stay")
    host.create_all(member, late)
    domid = host.domid(late)
    assert domid is not None
    since = host.mark
    with host.policy(f'[limits]\nleases = 0\n[allow.x]\nguests = ["{late.name}"]\n{ALL}\n'):
        said = host.refused(attach(domid, region, host.at, MIB))
        assert f"guests '{late.name}' and '{member.name}' are not allowed to share" in said
        host.wait_log(r"client asked .*outcome=.refused: .*rule=.*'not-allowed-together'", since)
        leasing = f"from xshmd import client; client.connect().region('{region}').map().__enter__()"
        done = host.dom0.run(["python3", "-c", leasing], check=False)
        assert "would have 1 leases, and at most 0 are allowed" in done.stderr.decode()
        host.wait_log(r"client asked .*outcome=.refused: .*rule=.*'too-many-leases'", since)
    assert [found["guest"] for found in host.region(region)["members"]] == [member.name]
    host.destroy(member, late)
