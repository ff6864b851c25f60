# SPDX-License-Identifier: LGPL-2.1-or-later
"""A region of memory is only shared if guests see it: the rig's guests are built here.

What they are is in integration/guests/; its build.py makes them with the tool root's compilers.
"""

from __future__ import annotations

import lzma
from pathlib import Path

from integration.arch import Arch
from integration.cache import Cache, Entry, Recipe
from integration.images import Image
from integration.sources import read_sources
from integration.toolroot import ToolRoot

GUESTS = "integration/guests"
HELPER = "xshmd/resources/guest"
MODULES = ("xen-gntdev.ko", "xen-privcmd.ko")
"""Modules of Debian's kernel, without which nothing in a guest maps grants or calls Xen."""


def get_guests(arch: Arch, tools: ToolRoot, image: Image, cache: Cache) -> Entry | None:
    """The guests' files from the cache, built first if need be; None if there are no sources."""
    sources = read_sources(GUESTS, HELPER)
    if not sources.files:
        return None
    recipe = Recipe(
        f"guests-{image.name}",
        f"the {image.name} guests",
        2,
        (arch.name, tools.key, image.key, sources.digest, Path(__file__).read_text()),
    )

    def build(content: Path, log: Path) -> None:
        folder = content.with_name("sources")
        sources.write_to(folder)
        (folder / "modules").mkdir()
        for name in MODULES:
            (folder / "modules" / name).write_bytes(_module(name, tools, image, folder, log))
        tools.run(
            ["python3", f"{GUESTS}/build.py", arch.name, "/rig/out"],
            binds={folder: "/rig/src", content: "/rig/out", image.busybox: "/rig/busybox"},
            cwd="/rig/src",
            env={
                "BUSYBOX": "/rig/busybox",
                "MODULES": "/rig/src/modules",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            log=log,
            timeout_s=300,
        )

    return cache.get(recipe, build)


def _module(name: str, tools: ToolRoot, image: Image, folder: Path, log: Path) -> bytes:
    """A module, out of dom0's disk; busybox cannot load one that is compressed."""

    def ask(request: str) -> str:
        return tools.run(
            ["debugfs", "-R", request, "/rig/image/root.img"],
            binds={image.root.parent: "/rig/image", folder: "/rig/out"},
            log=log,
            capture=True,
        )

    # /INODE/MODE/UID/GID/NAME/SIZE/, the first two being . and ..
    names = [line.split("/")[5] for line in ask("ls -p /usr/lib/modules").split() if line]
    version = next(name for name in names if name.strip("."))
    packed = f"/usr/lib/modules/{version}/kernel/drivers/xen/{name}.xz"
    ask(f"dump {packed} /rig/out/packed")
    return lzma.decompress((folder / "packed").read_bytes())
