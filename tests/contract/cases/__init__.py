# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cases, a module a topic.  Each makes what it needs and leaves nothing, in any order."""

from __future__ import annotations

import importlib
import pkgutil

__all__ = [
    "CASES",
    "Case",
    "buffers",
    "contents",
    "crashes",
    "ends",
    "fresh_domains",
    "grants",
    "host_memory",
    "lending",
    "mappings",
    "memory_maps",
    "pages",
    "paging_pools",
    "pauses",
    "scatter",
    "seals",
    "tables",
    "targets",
    "unknown_domains",
    "zombies",
]
from ..registry import CASES, Case

__all__ = ["CASES", "Case"]

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
