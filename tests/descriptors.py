# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many file descriptors there are, and that a test leaves none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def no_descriptor_is_left() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before
