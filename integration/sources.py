# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether something must be built again depends on the clone's files: they are read here, once.

What is hashed is what is built from, even if somebody saves a file in between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

PROJECT = Path(__file__).resolve().parent.parent
_NOT_SOURCES = {"__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}


@dataclass(frozen=True)
class File:
    """One file, as it was when it was read.

    Attributes:
        name: its path, relative to what it was read from.
        data: its contents.
        executable: whether it can be run as it is.
    """

    name: PurePosixPath
    data: bytes
    executable: bool

    @property
    def mode(self) -> int:
        """The permissions it should have wherever it goes."""
        return 0o755 if self.executable else 0o644


@dataclass(frozen=True)
class Sources:
    """Some files of a tree, in a fixed order."""

    files: tuple[File, ...]

    @cached_property
    def digest(self) -> str:
        """A hash of names, modes and contents; it does not depend on where the tree is."""
        digest = hashlib.sha256()
        for file in self.files:
            head = f"{file.name}\0{file.executable}\0{len(file.data)}\0"
            digest.update(head.encode() + file.data)
        return digest.hexdigest()

    def below(self, folder: str) -> Iterator[tuple[PurePosixPath, File]]:
        """The files below `folder`, each with its path relative to it."""
        for file in self.files:
            if file.name.is_relative_to(folder):
                yield file.name.relative_to(folder), file

    def write_to(self, folder: Path) -> None:
        """Put the files, under their names, below `folder`."""
        for file in self.files:
            write(folder / file.name, file.data, file.mode)


def read_sources(*names: str, tree: Path = PROJECT) -> Sources:
    """Read files and whole folders of a tree. What is not there is left out, as are caches."""
    files = []
    for name in names:
        start = tree / name
        for path in [start] if start.is_file() else sorted(start.rglob("*")):
            relative = PurePosixPath(path.relative_to(tree))
            if not _NOT_SOURCES & set(relative.parts) and path.is_file():
                data = path.read_bytes()
                executable = bool(path.stat().st_mode & 0o100) or data.startswith(b"#!")
                files.append(File(relative, data, executable))
    return Sources(tuple(files))


def write(path: Path, data: bytes, mode: int) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
