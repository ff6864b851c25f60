# SPDX-License-Identifier: LGPL-2.1-or-later
"""What sealed regions ask of their share group."""

from __future__ import annotations

import pytest

from xshmd.errors import Conflict, Refused
from xshmd.host_policy import Limit
from xshmd.model import Backing, Isolation, Place, RegionTerms, Transport
from xshmd.policy.sealing import FIRST_MAP_S, Pace, check_alike, check_pause, mixed

OPEN, SEALED = RegionTerms(), RegionTerms(isolation=Isolation.SEALED)
HOST = RegionTerms(backing=Backing.HOST, host_first_mfn=1, isolation=Isolation.SEALED)
GRANTED = RegionTerms(transport=Transport.GRANT, isolation=Isolation.REGION)


def test_a_holder_has_one_kind() -> None:
    assert mixed([("a", OPEN), ("b", SEALED), ("c", OPEN)]) == ("b", "a")
    for alike in ([], [("a", OPEN), ("b", OPEN)], [("a", SEALED), ("b", SEALED)]):
        assert mixed(alike) is None
    # What is in no holder that is a target, nobody can take out of one.
    assert mixed([("a", OPEN), ("h", HOST), ("g", GRANTED)]) is None
    assert mixed([("a", SEALED), ("h", HOST), ("g", GRANTED)]) is None
    with pytest.raises(Conflict, match="regions b, which is sealed, and a, which is not"):
        check_alike([("a", OPEN), ("b", SEALED)])


def test_host_memory_and_grants_are_never_sealed() -> None:
    assert SEALED.is_sealed
    assert not OPEN.is_sealed
    assert not HOST.is_sealed
    assert not GRANTED.is_sealed


def test_a_pause_is_refused_only_if_somebody_waits() -> None:
    two = Limit(value=2000, place=Place(file="xshmd.toml", line=4))
    check_pause("r", 2.0, two, 256, 3)
    check_pause("r", 99.0, two, 256, 0)
    with pytest.raises(Refused, match=r"r: 1 guest of its group would stand still for about 2.1 s"):
        check_pause("r", 2.1, two, 256, 1)
    with pytest.raises(Refused, match=r"3 guests of its group .* while 1 MiB are put") as caught:
        check_pause("r", 2.1, two, 256, 3)
    assert caught.value.hint.endswith("raise xshmd.toml:4")


def test_where_nobody_says_how_long_it_is_ten_seconds() -> None:
    check_pause("r", 10.0, None, 256, 1)
    with pytest.raises(Refused, match="10 s is the most it may") as caught:
        check_pause("r", 10.1, None, 256, 1)
    assert "[limits] pause in /etc/xshmd/xshmd.toml" in caught.value.hint


def test_the_best_time_decides_beforehand_and_the_worst_of_late_for_the_rest() -> None:
    pace = Pace()
    assert pace.rest_s(0, 1000) == pytest.approx(1000 * FIRST_MAP_S)
    for seconds in (4.0, 1.0, 2.0):
        pace.learn_fresh(1000, seconds)
        pace.learn_map(1000, seconds)
    assert pace.rest_s(1000, 0) == pytest.approx(1.0)
    assert pace.rest_s(0, 1000) == pytest.approx(4.0 * 0.75 * 0.75)
    pace.learn_map(1000, 3.0)
    assert pace.rest_s(0, 1000) == pytest.approx(3.0)
    assert pace.rest_s(1000, 1000) == pytest.approx(4.0)
