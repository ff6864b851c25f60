# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the unit tests as Debian 13 would: its Python, its library versions, our compiled modules.

The host's own run (``make unit``) has PyPI's newest of everything and no compiled module; between
the two is every version this project promises to work with.  Where an operation is played for each
of its steps, once is enough: those tests are the host's alone.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from integration.arch import ARCHES
from integration.cache import Cache
from integration.extensions import get_extensions
from integration.progress import step
from integration.toolroot import ToolRoot

PROJECT: Final = Path(__file__).resolve().parent.parent
COPIED: Final = (
    "xshmd", "tests", "integration", "docs", "systemd", "pyproject.toml", "setup.py",
    "cffi_build.py", "MANIFEST.in", "README.md", "CONTRIBUTING.md", "Makefile",
)  # fmt: skip
PYTEST: Final = ("python3", "-m", "pytest", "-p", "no:cacheprovider", "-m", "not sweep")
LIMIT_S: Final = 1200


def run_unit_tests(arguments: list[str]) -> int:
    """Run pytest on a copy of the tree inside the tool root; its exit status."""
    cache = Cache()
    tools = ToolRoot.get(cache)
    extensions = get_extensions(ARCHES["x86_64"], tools, cache)
    with tempfile.TemporaryDirectory(prefix="xshmd-unit-") as folder:
        tree = Path(folder)
        with step("copying the tree for Debian 13's Python"):
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            for name in COPIED:
                source = PROJECT / name
                if source.is_dir():
                    shutil.copytree(source, tree / name, ignore=ignore)
                else:
                    shutil.copy2(source, tree / name)
            if extensions is not None:
                shutil.copytree(extensions.path / "xshmd", tree / "xshmd", dirs_exist_ok=True)
        process = tools.popen(
            [*PYTEST, "tests", *arguments],
            binds={tree: "/rig/tree"},
            cwd="/rig/tree",
            env={"PYTHONDONTWRITEBYTECODE": "1", "XSHMD_EXPECT_LIBXLUTIL": "1"},
            stdin=subprocess.DEVNULL,
        )
        try:
            return process.wait(timeout=LIMIT_S)
        finally:
            process.kill()
            process.wait(timeout=30)


if __name__ == "__main__":
    sys.exit(run_unit_tests(sys.argv[1:]))
