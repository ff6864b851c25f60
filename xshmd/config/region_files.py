# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files of ``xshmd/regions.d``, read again each time and parsed again when they changed."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from xshmd.config.files import read_regular
from xshmd.config.lookup import DIRECTORIES, TOML_SUFFIX, Found, find_files
from xshmd.config.toml import read_toml
from xshmd.config.toml_tree import Source
from xshmd.declarations import Declarations
from xshmd.errors import XshmError


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """One configuration, its drop-ins included."""

    file: str
    sources: tuple[Source, ...]
    result: Declarations | XshmError
    """What it says, or why that cannot be known."""

    def mentions(self, guest: str) -> bool:
        """Return whether a name is anywhere in the text: all there is to go by if it is broken."""
        name = re.escape(guest.encode("utf-8", "surrogateescape"))
        word = re.compile(rb"(?<![A-Za-z0-9_])" + name + rb"(?![A-Za-z0-9_])")
        return bool(guest) and any(word.search(source.data) for source in self.sources)


class RegionFiles:
    """Reads them; see :mod:`xshmd.config.lookup` for which count."""

    def __init__(self, directories: Sequence[Path] = DIRECTORIES) -> None:
        self._directories = tuple(directories)
        self._parsed: dict[tuple[Source, ...], Declarations] = {}

    def read(self) -> tuple[Reading, ...]:
        """Return every configuration there is, in the order of their names."""
        readings = tuple(self._reading(found) for found in find_files(self._directories))
        # What a file said before is of no more use; what is wrong is looked at again, as it may
        # have been the want of a program.
        self._parsed = {
            reading.sources: reading.result
            for reading in readings
            if isinstance(reading.result, Declarations)
        }
        return readings

    def _reading(self, found: Found) -> Reading:
        file = os.fspath(found.paths[0])
        try:
            sources = tuple(Source(os.fspath(path), read_regular(path)) for path in found.paths)
        except XshmError as error:
            return Reading(file, (), error)
        return Reading(file, sources, self._parsed.get(sources) or _parsed(sources, found.name))


def _parsed(sources: tuple[Source, ...], name: str) -> Declarations | XshmError:
    first, *drop_ins = sources
    try:
        if name.endswith(TOML_SUFFIX):
            return read_toml(first.data, file=first.file, drop_ins=drop_ins)
        # Loaded only where there is such a file: few hosts have one.
        from xshmd.config.devicetree import read_devicetree

        return read_devicetree(first.data, file=first.file)
    except XshmError as error:
        return error
