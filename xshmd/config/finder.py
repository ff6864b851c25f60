# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds what a new domain's configuration says about shared memory, wherever it is written.

What a guest is, and regions of it, its configuration in xl's language says
(:mod:`xshmd.config.xl_files`); files in ``xshmd/regions.d`` (:mod:`xshmd.config.region_files`) add
to it, and define regions that belong to no guest.  Where a file leaves the choice to us, it is made
here: all that goes out has frames and sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from xshmd.config.findings import errors_of
from xshmd.config.guest import normalised_uuid
from xshmd.config.host_policy import DIRECTORIES as POLICY_DIRECTORIES
from xshmd.config.host_policy import PolicyFile
from xshmd.config.joining import by_name, is_open, joined, put_together, sizes_of
from xshmd.config.lookup import DIRECTORIES
from xshmd.config.region_files import Reading, RegionFiles
from xshmd.config.xl_files import OWN_DIRECTORY, XL_DIRECTORIES, XlFiles
from xshmd.declarations import Declarations
from xshmd.errors import XshmError, combined
from xshmd.host_policy import HostPolicy
from xshmd.machine import Arch
from xshmd.model import GuestConfig, RegionConfig
from xshmd.policy.placement import placed


class Finder:
    """Finds configurations; implements :class:`xshmd.dom0_ports.ConfigFinder`.

    Args:
        arch: What xl's default guest type depends on, and where regions are put that say nothing;
            None where that is not known, and then they are put nowhere.
        own_directory: Our own files, ``<name>.cfg`` or ``<uuid>.cfg``.
        region_directories: Where regions are defined, see :mod:`xshmd.config.lookup`.
        xl_directories: Where administrators keep xl configurations, first found first.
        policy_directories: Where limits and allow-lists are, see :mod:`xshmd.config.host_policy`.
        proc: The proc file system.
        xl_uid: Only processes of this user are believed to be xl.
        on_skip: Told of each file that mentions shared memory and cannot be used, and why; for
            the log.
    """

    def __init__(
        self,
        *,
        arch: Arch | None = None,
        own_directory: Path = OWN_DIRECTORY,
        region_directories: Sequence[Path] = DIRECTORIES,
        xl_directories: Sequence[Path] = XL_DIRECTORIES,
        policy_directories: Sequence[Path] = POLICY_DIRECTORIES,
        proc: Path = Path("/proc"),
        xl_uid: int = 0,
        on_skip: Callable[[str, str], None] = lambda file, reason: None,
    ) -> None:
        self._arch = arch
        self._regions = RegionFiles(region_directories)
        self._policy = PolicyFile(policy_directories)
        self._xl = XlFiles(
            arch=arch,
            own_directory=own_directory,
            xl_directories=xl_directories,
            proc=proc,
            xl_uid=xl_uid,
            on_skip=on_skip,
        )
        self._on_skip = on_skip

    def find(self, *, name: str, uuid: str) -> GuestConfig | None:
        """Return the configuration of the guest of this name, or None if nobody has one.

        A result without requests means that the configuration was found and has none.  A file in
        ``regions.d`` that is wrong is the guest's if it has its name anywhere: better no guest
        than one without its memory.

        Raises:
            ConfigError, ConfigUnreadable, Conflict: it was found, and is wrong.
        """
        ours = self._ours(name, uuid)
        found = self._xl.find(name, uuid)
        if found is None and not ours:
            return None
        return self._placed(joined([config for config in (found, *ours) if config is not None]))

    def complete(self, config: GuestConfig) -> GuestConfig:
        """Return a configuration that comes from elsewhere with what files of ours add to it.

        Raises:
            ConfigError, ConfigUnreadable, Conflict: what they say is wrong, as for :meth:`find`.
        """
        return self._placed(joined([config, *self._ours(config.name, config.uuid)]))

    def known(self) -> tuple[GuestConfig, ...]:
        """Return every readable configuration with shared memory in the usual places."""
        readings = self._regions.read()
        configs = self._known(self._good(readings))
        sizes = sizes_of(configs, self._good(readings, quiet=True).regions)
        return tuple(self._placed_or_not(config, sizes) for config in configs)

    def regions(self) -> tuple[RegionConfig, ...]:
        """Return every region that a readable file in the usual places defines for the system."""
        return self._good(self._regions.read()).regions

    def policy(self) -> HostPolicy | XshmError:
        """Return what the administrator lets guests have, or what is wrong with the file."""
        try:
            return self._policy.read()
        except XshmError as error:
            return error

    def declarations(self) -> Declarations:
        """Read all files of ours anew, and return what they say, each guest once.

        What xl's files say is not in it, and nothing is placed yet.

        Raises:
            ConfigError, ConfigUnreadable, Conflict: any of them is wrong; all that is wrong with
                all of them.
        """
        broken: list[XshmError] = []
        parts: list[Declarations] = []
        try:
            self._policy.read()
        except XshmError as error:
            broken.append(error)
        for reading in self._regions.read():
            if isinstance(reading.result, XshmError):
                broken.append(reading.result)
            else:
                parts.append(reading.result)
        guests: list[GuestConfig] = []
        for _, own in self._xl.own():
            if isinstance(own, XshmError):
                broken.append(own)
            else:
                guests.append(own)
        found = put_together((Declarations(guests=tuple(guests)), *parts))
        together: list[GuestConfig] = []
        for configs in by_name(found.guests):
            try:
                together.append(joined(configs))
            except XshmError as error:
                broken.append(error)
        if broken:
            raise _all_of(broken)
        return dataclasses.replace(found, guests=tuple(together))

    # -- what all of them say together ---------------------------------------------------------

    def _ours(self, name: str, uuid: str) -> list[GuestConfig]:
        """Return what region files say of a guest; raises what is wrong with those that name it."""
        readings = self._regions.read()
        broken = [
            reading.result
            for reading in readings
            if isinstance(reading.result, XshmError) and reading.mentions(name)
        ]
        if broken:
            raise _all_of(broken)
        return _parts_of(name, uuid, self._good(readings).guests)

    def _good(self, readings: Sequence[Reading], *, quiet: bool = False) -> Declarations:
        """Return what the readable ones of our region files say."""
        parts = []
        for reading in readings:
            if isinstance(reading.result, Declarations):
                parts.append(reading.result)
            elif not quiet:
                self._on_skip(reading.file, reading.result.one_line())
        return put_together(parts)

    def _known(self, ours: Declarations) -> tuple[GuestConfig, ...]:
        """Return what :meth:`known` does, not placed."""
        wanted = {config.name for config in ours.guests if config.requests}
        found: list[GuestConfig] = []
        for config in self._xl.known(frozenset(wanted)):
            parts = _parts_of(config.name, config.uuid, ours.guests)
            if parts:
                wanted.discard(config.name)
            found.append(self._joined_or_first([config, *parts]))
        alone = [config for config in ours.guests if config.name in wanted]
        found += [self._joined_or_first(configs) for configs in by_name(alone)]
        return tuple(config for config in found if config.requests)

    def _joined_or_first(self, configs: Sequence[GuestConfig]) -> GuestConfig:
        try:
            return joined(configs)
        except XshmError as error:
            self._on_skip(str(error.facts["file"]), error.one_line())
            return configs[0]

    def _placed(self, config: GuestConfig) -> GuestConfig:
        if self._arch is None or not is_open(config):
            return config
        ours = self._good(self._regions.read(), quiet=True)
        sizes = sizes_of((*self._known(ours), config), ours.regions)
        return placed(config, self._arch, sizes=sizes)

    def _placed_or_not(self, config: GuestConfig, sizes: dict[str, int]) -> GuestConfig:
        if self._arch is None or not is_open(config):
            return config
        try:
            return placed(config, self._arch, sizes=sizes)
        except XshmError as error:
            # It still counts for the guests that share its regions.
            self._on_skip(config.place.file, error.one_line())
            return config


def _all_of(errors: Iterable[XshmError]) -> XshmError:
    """Return one error for everything that is wrong with several files."""
    return combined([part for error in errors for part in errors_of(error)])


def _parts_of(name: str, uuid: str, configs: Iterable[GuestConfig]) -> list[GuestConfig]:
    """Return those that are the guest's: of its name, and of its UUID if both are known."""
    its = normalised_uuid(uuid)
    return [
        config
        for config in configs
        if config.name == name and (not its or config.uuid in ("", its))
    ]
