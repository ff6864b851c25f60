# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `make scale-on-xen` makes of what it has counted."""

from __future__ import annotations

from integration.scale import Cost, said


def test_what_is_flat_is_well_and_what_is_linear_is_not() -> None:
    lines, well = said("k-th guest", [Cost(k, 46, 20) for k in (6, 50, 100)])
    assert well
    assert lines[0] == "k-th guest: calls from 46 (k=6) to 46 (k=100), as k to the power of 0.000"
    _, well = said("k-th guest", [Cost(k, 46, 20 + k) for k in (6, 50, 100)])
    assert not well


def test_a_recovery_may_be_linear_and_no_worse() -> None:
    assert said("recovery of k guests", [Cost(k, 3 * k, 5 * k) for k in (12, 25, 100)])[1]
    assert not said("recovery of k guests", [Cost(k, k * k, 5 * k) for k in (12, 25, 100)])[1]
