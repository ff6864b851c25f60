# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which files of ``xshmd/regions.d`` count: those of the administrator before those of packages.

The rules are those of UAPI.6 "Configuration Files Specification": of several files of one name the
one in the first directory counts; ``NAME.toml.d/*.toml`` are dropped into ``NAME.toml``, in the
order of their names whichever directory they are in, and each as well the first of its name; an
empty file, or a link to ``/dev/null``, masks those of its name in the directories after it.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from xshmd.config.files import names_in

DIRECTORIES: Final = tuple(
    Path(root, "xshmd/regions.d") for root in ("/etc", "/run", "/usr/local/lib", "/usr/lib")
)
"""Where regions are defined, those that count most first."""
TOML_SUFFIX: Final = ".toml"
SUFFIXES: Final = (TOML_SUFFIX, ".dts", ".dtb")

_DROP_INS: Final = ".d"
_NULL_DEVICE: Final = os.makedev(1, 3)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The files that together are one configuration."""

    name: str
    """The file's name without its directory."""
    path: Path | None
    """The file itself; None if it is masked, or there are only drop-ins."""
    drop_ins: tuple[Path, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files in the order in which they are read."""
        return (*((self.path,) if self.path else ()), *self.drop_ins)


def find_files(directories: Sequence[Path] = DIRECTORIES) -> tuple[Found, ...]:
    """Return the configurations there are, in the order of their names.

    Args:
        directories: Where to look; what is in one counts more than what is in those after it.
    """
    files: dict[str, Path] = {}
    drop_ins: dict[str, dict[str, Path]] = {}
    for directory in directories:
        for name in names_in(directory):
            if name.endswith(SUFFIXES):
                files.setdefault(name, directory / name)
            elif name.endswith(TOML_SUFFIX + _DROP_INS):
                dropped = drop_ins.setdefault(name.removesuffix(_DROP_INS), {})
                for path in _toml_files(directory / name):
                    dropped.setdefault(path.name, path)
    return tuple(
        found for name in sorted({*files, *drop_ins})
        if (found := _found(name, files.get(name), drop_ins.get(name, {}))).paths
    )  # fmt: skip


def drop_ins_beside(path: Path) -> tuple[Path, ...]:
    """Return what is dropped into a file, wherever it is, by the directory beside it."""
    files = _toml_files(path.with_name(path.name + _DROP_INS))
    return tuple(dropped for dropped in files if not _is_mask(dropped))


def _found(name: str, path: Path | None, drop_ins: dict[str, Path]) -> Found:
    return Found(
        name=name,
        path=None if path is None or _is_mask(path) else path,
        drop_ins=tuple(drop_ins[key] for key in sorted(drop_ins) if not _is_mask(drop_ins[key])),
    )


def _toml_files(directory: Path) -> Iterator[Path]:
    for name in names_in(directory):
        if name.endswith(TOML_SUFFIX):
            yield directory / name


def _is_mask(path: Path) -> bool:
    try:
        status = path.stat()
    except OSError:
        # Whoever reads it will say what is wrong with it.
        return False
    if stat.S_ISCHR(status.st_mode):
        return status.st_rdev == _NULL_DEVICE
    return stat.S_ISREG(status.st_mode) and status.st_size == 0
