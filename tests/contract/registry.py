# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the cases of the contract are listed, so that each of their modules is about one topic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from xshmd.ports import Hypervisor

from .host import ContractHost

Case = Callable[[Hypervisor, ContractHost], None]
CASES: Final[list[tuple[str, Case]]] = []
"""Filled by importing :mod:`contract.cases`."""


def case(function: Case) -> Case:
    """Add a case under its function's name."""
    CASES.append((function.__name__, function))
    return function
