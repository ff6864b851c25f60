# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `make soak` makes of what it has seen: a leak must not pass for noise, nor noise for one."""

from __future__ import annotations

import pytest

from integration.soak.__main__ import _errors
from integration.soak.rests import MAY_RISE, WARM_RESTS, Rest, growth, longest_life, risen


def rests(life: int, *objects: int) -> list[Rest]:
    """A daemon's rests, half an hour apart, with so many objects each."""
    return [
        Rest(1800.0 * number, life, 0, {"objects": many, "rss_kib": 30000, "pss_kib": 20000})
        for number, many in enumerate(objects)
    ]


def test_what_rises_all_the_time_is_seen() -> None:
    grown = growth(rests(1, 1000, 1300, 1600, 1900))
    assert grown["objects"].an_hour == pytest.approx(600)
    assert grown["objects"].in_all == pytest.approx(900)
    assert grown["rss_kib"].in_all == 0
    (said,) = risen(grown)
    assert said == "objects rises by +600 an hour, +900 in all; 500 is allowed"


def test_what_goes_up_and_down_is_not() -> None:
    swing = MAY_RISE["objects"] / 2
    assert not risen(growth(rests(1, *(int(5000 + swing * (n % 2)) for n in range(20)))))


def test_only_a_daemon_that_is_warm_is_judged() -> None:
    """What it allocates at first is no growth, and neither is the difference to the one before."""
    early, late = rests(1, 1, 2, 3), rests(2, 10, 9000, 9500, 9500, 9500, 9500)
    judged = longest_life([*early, *late])
    assert [rest.life for rest in judged] == [2] * (6 - WARM_RESTS)
    assert not risen(growth(judged))


def test_too_few_rests_tell_nothing() -> None:
    assert growth(rests(1, 1, 2000)) == {}


def test_an_error_in_the_log_is_found_unless_it_was_to_come() -> None:
    log = (
        "<6>guest attached guest='a'\n<3>guest refused guest='refused7' domid=3\n"
        "<4>something rare\n<3>contents lost region='r'\nTraceback (most recent call last):\n"
    )
    assert _errors(log, ["guest refused guest='refused7'"]) == [
        "contents lost region='r'", "Traceback (most recent call last):",
    ]  # fmt: skip
