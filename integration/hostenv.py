# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes the Python the host's tests run under: a cached venv with PyPI's newest of everything.

The other column, Debian 13's own versions, is the tool root's Python.  Printed by
``python3 -m integration.hostenv`` is the path of the venv's interpreter.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from integration.cache import Cache
from integration.progress import step

PROJECT = Path(__file__).resolve().parent.parent


def requirements() -> list[str]:
    """Return what pyproject.toml says the package and its tests need."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["test"], "setuptools"]


def python() -> Path:
    """Return the interpreter of a venv that has all requirements, made if it is not there.

    A venv knows its own path, so it is built in place and only counts once its stamp is there.
    """
    wanted = requirements()
    key = hashlib.sha256(repr((wanted, sys.version, 1)).encode()).hexdigest()[:20]
    folder = Cache().root / f"venv-{key}"
    interpreter, stamp = folder / "bin" / "python", folder / "stamp"
    if stamp.exists() and subprocess.run(
        [interpreter, "-c", "import trio, cffi, pyxs, structlog, pytest, mypy"], timeout=60,
        stdin=subprocess.DEVNULL, check=False, capture_output=True,
    ).returncode == 0:  # fmt: skip
        return interpreter
    with step("making the venv for the host's tests"):
        _make(folder)
        command = [str(interpreter), "-m", "pip", "install", "--quiet", *wanted]
        subprocess.run(
            command, check=True, timeout=900, stdin=subprocess.DEVNULL, stdout=sys.stderr
        )
        stamp.touch()
    return interpreter


def _make(folder: Path) -> None:
    command = [sys.executable, "-m", "venv", "--clear", os.fspath(folder)]
    done = subprocess.run(
        command, timeout=300, stdin=subprocess.DEVNULL, check=False, capture_output=True
    )
    if done.returncode:
        # Debian's python3 comes without ensurepip.
        install = ["apt-get", "install", "-y", "--no-install-recommends", "python3-venv"]
        subprocess.run(["apt-get", "update"], check=True, timeout=300, stdin=subprocess.DEVNULL,
                       stdout=sys.stderr)  # fmt: skip
        subprocess.run(install, check=True, timeout=600, stdin=subprocess.DEVNULL,
                       stdout=sys.stderr)  # fmt: skip
        subprocess.run(command, check=True, timeout=300, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    print(python())
