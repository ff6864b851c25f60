# SPDX-License-Identifier: LGPL-2.1-or-later
"""Back-ends of others, to try our vhost-user front-end against: fetched, and kept in the cache.

They are no part of the tool root: whatever is in that names every image, and a back-end more would
have all of them built again.
"""

from __future__ import annotations

import inspect
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from integration.cache import Cache, Entry, Recipe
from integration.toolroot import SUITE, ToolRoot

PACKAGES: Final = (
    "virtiofsd",  # built on rust-vmm's crates
    "librte-vhost25",  # DPDK's
    "librte-mempool-ring25",
)
INSIDE: Final = "/rig/foreign"
"""Where they are for those who run them."""

# The tool root cannot be written, and its package lists may be old: these are fetched anew.
_FETCH: Final = """
mkdir -p /tmp/lists/partial /rig/packages/partial
apt="apt-get -q -o Dir::State::Lists=/tmp/lists -o Dir::Cache=/tmp/apt"
$apt update
$apt -o Dir::Cache::Archives=/rig/packages install -y --download-only --no-install-recommends "$@"
for package in /rig/packages/*.deb; do dpkg-deb -x "$package" /rig/out; done
"""


@dataclass(frozen=True)
class Foreign:
    """Runs programs of the packages, in the tool root."""

    tools: ToolRoot
    entry: Entry

    @classmethod
    def get(cls, cache: Cache | None = None) -> Foreign:
        """The packages from the cache, fetched first if need be."""
        cache = cache or Cache()
        tools = ToolRoot.get(cache)
        recipe = Recipe(
            "foreign", "back-ends of others", 1, (tools.key, SUITE, *PACKAGES, _FETCH,
            inspect.getsource(_fetch)),
        )  # fmt: skip
        return cls(tools, cache.get(recipe, lambda content, log: _fetch(tools, content, log)))

    def popen(
        self, argv: Sequence[str], *, binds: Mapping[Path, str], **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a program; see :meth:`ToolRoot.popen`."""
        (library,) = self.entry.path.glob("usr/lib/*/librte_vhost.so.*.*")
        folder = f"{INSIDE}/{library.parent.relative_to(self.entry.path)}"
        return self.tools.popen(
            argv,
            binds={**binds, self.entry.path: INSIDE},
            env={"LD_LIBRARY_PATH": folder, "PYTHONDONTWRITEBYTECODE": "1"},
            **options,
        )


def _fetch(tools: ToolRoot, content: Path, log: Path) -> None:
    """Fetch the packages and what they need beyond the tool root, and unpack them."""
    packages = content.with_name("packages")
    packages.mkdir()
    tools.run(
        ["sh", "-ec", _FETCH, "fetch", *PACKAGES],
        binds={content: "/rig/out", packages: "/rig/packages"},
        log=log,
    )
