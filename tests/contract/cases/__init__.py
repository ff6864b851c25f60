# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cases, a module a topic.  Each makes what it needs and leaves nothing, in any order."""

from __future__ import annotations

from ..registry import CASES, Case
from . import (
    buffers,
    contents,
    crashes,
    ends,
    fresh_domains,
    grants,
    host_memory,
    mappings,
    memory_maps,
    pages,
    paging_pools,
    pauses,
    scatter,
    seals,
    tables,
    targets,
    unknown_domains,
    zombies,
)

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
