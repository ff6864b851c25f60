# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether something must be built again depends on the clone's files: they are listed here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
_NOT_SOURCES = ("__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache")


def source_files(folder: Path) -> list[Path]:
    """All files below a folder that a person wrote, in a fixed order; none if it is not there."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not set(path.parts) & set(_NOT_SOURCES)
    )


def sources_digest(files: Iterable[Path]) -> str:
    """A hash of the files' names, modes and contents; it does not depend on where the clone is."""
    digest = hashlib.sha256()
    for path in files:
        name = path.relative_to(PROJECT)
        executable = bool(path.stat().st_mode & 0o100)
        data = path.read_bytes()
        digest.update(f"{name}\0{executable}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()
