# SPDX-License-Identifier: LGPL-2.1-or-later
"""A region of memory is only shared if guests see it: the rig's guests are built here.

What they are is in integration/guests/; its build.py makes them with the tool root's compilers.
"""

from __future__ import annotations

from pathlib import Path

from integration.arch import Arch
from integration.cache import Cache, Entry, Recipe
from integration.images import Image
from integration.sources import read_sources
from integration.toolroot import ToolRoot

GUESTS = "integration/guests"


def get_guests(arch: Arch, tools: ToolRoot, image: Image, cache: Cache) -> Entry | None:
    """The guests' files from the cache, built first if need be; None if there are no sources."""
    sources = read_sources(GUESTS)
    if not sources.files:
        return None
    recipe = Recipe(
        f"guests-{arch.name}",
        f"the {arch.name} guests",
        2,
        (arch.name, tools.key, image.key, sources.digest),
    )

    def build(content: Path, log: Path) -> None:
        folder = content.with_name("sources")
        sources.write_to(folder)
        tools.run(
            ["python3", f"{GUESTS}/build.py", arch.name, "/rig/out"],
            binds={folder: "/rig/src", content: "/rig/out", image.busybox: "/rig/busybox"},
            cwd="/rig/src",
            env={"BUSYBOX": "/rig/busybox", "PYTHONDONTWRITEBYTECODE": "1"},
            log=log,
            timeout_s=300,
        )

    return cache.get(recipe, build)
