# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the host's administrator lets guests have: ``xshmd/xshmd.toml``, apart from any region.

::

    [limits]                        # each is optional
    regions = 64                    # how many there are
    memory = "4 GiB"                # of all regions together
    members = 8                     # guests that have one region
    leases = 4                      # of processes of the control domain
    regions_per_guest = 8
    memory_per_guest = "256 MiB"
    free_memory = "1 GiB"           # of the host, which regions leave free
    pause = "500 ms"                # for which a sealed group stands still

    [allow.control]                 # without any such table everybody may share with everybody
    guests = ["sensor-*", "ctl"]    # guests that may share with one another
    regions = ["frames*"]           # the regions that they may have; left out: all
    dom0 = true                     # whether processes of the control domain may have them

It counts from when it is written: it is read whenever somebody asks for something.  While it is
wrong nobody gets anything new, and nobody loses anything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from xshmd.config.files import read_regular
from xshmd.config.findings import raise_all
from xshmd.config.lookup import Found, find_files
from xshmd.config.toml_tree import Source, Table, read_tree
from xshmd.config.toml_values import Keys
from xshmd.errors import ConfigError
from xshmd.host_policy import NO_POLICY, Allowed, HostPolicy, Limit, Limits

NAME: Final = "xshmd.toml"
DIRECTORIES: Final = tuple(
    Path(root, "xshmd") for root in ("/etc", "/run", "/usr/local/lib", "/usr/lib")
)
"""Where it is looked for, with the rules of :mod:`xshmd.config.lookup`."""
COUNTS: Final = ("regions", "members", "leases", "regions_per_guest")
SIZES: Final = ("memory", "memory_per_guest", "free_memory")
TIMES: Final = ("pause",)
ALLOW_KEYS: Final = ("guests", "regions", "dom0")


def read_policy(data: bytes, *, file: str, drop_ins: Sequence[Source] = ()) -> HostPolicy:
    """Read the file and what is dropped in to change it.

    Raises:
        ConfigUnreadable: one of them is not TOML.
        ConfigError: all that is wrong with them together.
    """
    errors: list[ConfigError] = []
    root = Keys(read_tree((Source(file, data), *drop_ins)), ("limits", "allow"), errors)
    limits = root.table("limits")
    policy = HostPolicy(
        limits=Limits() if limits is None else _limits(limits, errors),
        allowed=tuple(_allowed(name, table, errors) for name, table in root.tables("allow")),
    )
    raise_all(errors)
    return policy


def _limits(table: Table, errors: list[ConfigError]) -> Limits:
    keys = Keys(table, (*COUNTS, *SIZES, *TIMES), errors)
    values = {key: keys.count(key) for key in COUNTS} | {key: keys.frames(key) for key in SIZES}
    values |= {key: keys.milliseconds(key) for key in TIMES}
    return Limits(
        **{
            key: Limit(value=value, place=keys.place(key))
            for key, value in values.items()
            if value is not None
        }
    )


def _allowed(name: str, table: Table, errors: list[ConfigError]) -> Allowed:
    keys = Keys(table, ALLOW_KEYS, errors)
    guests, regions = keys.texts("guests"), keys.texts("regions")
    if "guests" not in keys:
        hint = 'say which guests may share with one another, as in guests = ["sensor-*", "ctl"]'
        keys.wrong("", "missing-key", "'guests' is missing", hint)
    return Allowed(
        name=name,
        guests=guests or (),
        regions=("*",) if regions is None else regions,
        dom0=keys.flag("dom0", default=False),
        place=keys.place(),
    )


class PolicyFile:
    """Reads it; parses it again only when it has changed."""

    def __init__(self, directories: Sequence[Path] = DIRECTORIES) -> None:
        self._directories = tuple(directories)
        self._sources: tuple[Source, ...] = ()
        self._policy = NO_POLICY

    def read(self) -> HostPolicy:
        """Return what it says now; without one, nothing is limited.

        Raises:
            ConfigError, ConfigUnreadable: it is wrong.
        """
        sources = tuple(Source(os.fspath(path), read_regular(path)) for path in self._found().paths)
        if sources != self._sources:
            first, *drop_ins = sources or (Source("", b""),)
            self._policy = read_policy(first.data, file=first.file, drop_ins=drop_ins)
            self._sources = sources
        return self._policy

    def _found(self) -> Found:
        there = (found for found in find_files(self._directories) if found.name == NAME)
        return next(there, Found(name=NAME, path=None))
