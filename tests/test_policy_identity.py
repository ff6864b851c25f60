# SPDX-License-Identifier: LGPL-2.1-or-later
"""A holder is known for what it is, and nothing else is taken for one."""

from __future__ import annotations

import uuid as uuid_module

from hypothesis import given, settings
from hypothesis import strategies as st

from xshmd.policy.identity import is_holder_uuid, new_generation, new_holder_uuid


def test_holders_are_recognised_and_all_different() -> None:
    made = {new_holder_uuid() for _ in range(1000)}
    assert len(made) == 1000
    for text in made:
        assert is_holder_uuid(text)
        assert is_holder_uuid(text.upper())
        parsed = uuid_module.UUID(text)
        assert parsed.version == 8
        assert parsed.variant == uuid_module.RFC_4122
        assert parsed.bytes.startswith(b"xshmd\x01")


@settings(deadline=None)
@given(st.uuids())
def test_other_uuids_are_not(other: uuid_module.UUID) -> None:
    assert not is_holder_uuid(str(other))


@settings(deadline=None)
@given(st.integers(0, 127))
def test_every_bit_of_the_mark_counts(bit: int) -> None:
    raw = int(uuid_module.UUID(new_holder_uuid()))
    changed = str(uuid_module.UUID(int=raw ^ (1 << bit)))
    fixed = bit >= 80 or 76 <= bit < 80 or bit in (62, 63)
    assert is_holder_uuid(changed) == (not fixed)


def test_dom0_is_no_holder() -> None:
    assert not is_holder_uuid("00000000-0000-0000-0000-000000000000")


def test_generations_are_fresh_words_that_may_be_in_a_path() -> None:
    made = {new_generation() for _ in range(1000)}
    assert len(made) == 1000
    assert all(word.isalnum() and len(word) == 16 for word in made)
