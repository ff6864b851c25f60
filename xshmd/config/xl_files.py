# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests' configurations in xl's language: files of ours, of a running xl, and of /etc/xen.

xl ignores keys it does not know and keeps neither the text nor the path of a configuration, so it
has to be found.  Two rules hold for all files but our own: one that does not mention ``static_shm``
can never be an error, and neither can one that is not the wanted guest's.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Final

from xshmd.config import static_shm
from xshmd.config.files import NotRegularError, names_in, read_regular
from xshmd.config.findings import config_error
from xshmd.config.guest import from_xl, normalised_uuid
from xshmd.config.joining import agreed, is_same_guest
from xshmd.config.xl_command import being_created
from xshmd.config.xlcfg import XlConfig, parse
from xshmd.errors import ConfigUnreadable, XshmError
from xshmd.machine import Arch
from xshmd.model import GuestConfig

OWN_DIRECTORY: Final = Path("/etc/xshmd/guests.d")
XL_DIRECTORIES: Final = (Path("/etc/xen"), Path("/etc/xen/auto"))

_SUFFIX: Final = ".cfg"
_LEFTOVERS: Final = (
    "~", ".bak", ".old", ".orig", ".rej", ".save", ".rpmsave", ".rpmnew",
    ".dpkg-old", ".dpkg-new", ".dpkg-dist", ".ucf-old", ".ucf-dist",
)  # fmt: skip
"""What editors and package managers leave beside a configuration: never one itself."""
_PASSING: Final = 16
"""How many texts are remembered beside those of twice as many files as there are."""
_MENTIONS: Final = (static_shm.KEY.encode(), static_shm.OLD_KEY.encode())


@dataclasses.dataclass(frozen=True, slots=True)
class _Text:
    """A configuration's text, and what to call it."""

    data: bytes
    file: str

    @property
    def is_utf8(self) -> bool:
        try:
            self.data.decode()
        except UnicodeDecodeError:
            return False
        return True

    @property
    def has_shared_memory(self) -> bool:
        return any(word in self.data for word in _MENTIONS)


class XlFiles:
    """Finds them; the arguments are those of :class:`xshmd.config.finder.Finder`."""

    def __init__(
        self,
        *,
        arch: Arch | None,
        own_directory: Path,
        xl_directories: Sequence[Path],
        proc: Path,
        xl_uid: int,
        on_skip: Callable[[str, str], None],
    ) -> None:
        self._arch = arch
        self._own_directory = own_directory
        self._xl_directories = tuple(xl_directories)
        self._proc = proc
        self._xl_uid = xl_uid
        self._on_skip = on_skip
        self._parsed: dict[_Text, XlConfig | ConfigUnreadable] = {}
        self._nr_files = 0

    def find(self, name: str, uuid: str) -> GuestConfig | None:
        """Return the configuration of the guest of this name, or None if nobody has one.

        Raises:
            ConfigError, ConfigUnreadable: it was found, and is wrong.
        """
        own = self._own_file_of(name, uuid)
        if own is not None:
            return own
        for data, file in being_created(self._proc, self._xl_uid):
            config = self._if_wanted(_Text(data, file), name, uuid)
            if config is not None:
                return config
        found = [
            config
            for text in self._xl_texts()
            if (config := self._if_wanted(text, name, uuid)) is not None
        ]
        decide_in = f"{self._own_directory / name}{_SUFFIX}"
        return agreed(found, decide_in=decide_in) if found else None

    def known(self, wanted: Collection[str]) -> Iterator[GuestConfig]:
        """Yield every readable configuration with shared memory, or of a guest that is wanted."""
        own = []
        for file, found in self.own():
            if isinstance(found, XshmError):
                self._on_skip(file, found.one_line())
            else:
                own.append(found)
        yield from own
        names = {config.name for config in own}
        others: list[GuestConfig] = []
        for text in self._xl_texts():
            if not text.has_shared_memory and not wanted:
                continue
            config = self._if_good(text)
            if config is None or config.name in names:
                continue
            if not config.requests and config.name not in wanted:
                continue
            if not any(is_same_guest(config, other) for other in others):
                others.append(config)
        yield from others

    def own(self) -> Iterator[tuple[str, GuestConfig | XshmError]]:
        """Yield each file of ours with what it says, or why that cannot be known."""
        for path in self._files(self._own_directory):
            if path.suffix == _SUFFIX:
                try:
                    yield os.fspath(path), self._own_config(path, path.stem)
                except XshmError as error:
                    yield os.fspath(path), error

    def _own_file_of(self, name: str, uuid: str) -> GuestConfig | None:
        for stem in (name, normalised_uuid(uuid)):
            # A name is any string to xl: only one that stays in the directory can have a file.
            if not stem or "/" in stem:
                continue
            path = self._own_directory / (stem + _SUFFIX)
            if not os.path.lexists(path):
                continue
            config = self._own_config(path, name)
            if config.name != name:
                what = f"name is '{config.name}', but the file is that of guest '{name}'"
                hint = f"rename the file to {config.name}{_SUFFIX}, or leave name out"
                raise config_error(config.place, what, hint=hint, rule="other-name")
            return config
        return None

    def _own_config(self, path: Path, name: str) -> GuestConfig:
        config = from_xl(parse(read_regular(path), os.fspath(path)), arch=self._arch, own_name=name)
        # The file may be named by the guest's UUID, and say none.
        return dataclasses.replace(config, uuid=config.uuid or normalised_uuid(path.stem))

    def _if_wanted(self, text: _Text, name: str, uuid: str) -> GuestConfig | None:
        """Return the configuration if it is of this guest.

        Raises:
            ConfigError, ConfigUnreadable: it is, and is wrong.
        """
        try:
            parsed = self._parse(text)
        except ConfigUnreadable as err:
            # xl refuses it as well: the wanted guest was not made from it.
            if text.has_shared_memory:
                self._on_skip(text.file, err.one_line())
            return None
        if parsed.text("name") != name:
            return None
        if text.has_shared_memory and not text.is_utf8:
            parse(text.data, text.file)  # says where
        its_uuid = normalised_uuid(parsed.text("uuid") or "")
        if its_uuid and its_uuid != (normalised_uuid(uuid) or its_uuid):
            return None
        return from_xl(parsed, arch=self._arch)

    def _parse(self, text: _Text) -> XlConfig:
        """Parse what was not parsed before: files change seldom, and are asked for every guest."""
        result = self._parsed.get(text)
        if result is None:
            try:
                # xl does not mind the encoding, so it is no reason not to know whose this is.
                result = parse(text.data.decode("utf-8", "replace"), text.file)
            except ConfigUnreadable as err:
                result = err
            # Most others are of an xl that makes one guest, once.  Another thread may do the same:
            # then something is parsed twice.
            if len(self._parsed) >= 2 * self._nr_files + _PASSING:
                self._parsed.clear()
            self._parsed[text] = result
        if isinstance(result, ConfigUnreadable):
            raise ConfigUnreadable(result.message, hint=result.hint, **result.facts)
        return result

    def _if_good(self, text: _Text) -> GuestConfig | None:
        try:
            parsed = self._parse(text) if text.is_utf8 else parse(text.data, text.file)
            return from_xl(parsed, arch=self._arch)
        except XshmError as err:
            if text.has_shared_memory:
                self._on_skip(text.file, err.one_line())
            return None

    def _xl_texts(self) -> Iterator[_Text]:
        seen: set[tuple[int, int]] = set()
        for directory in self._xl_directories:
            for path in self._files(directory):
                try:
                    status = path.stat()
                except OSError:
                    continue
                # /etc/xen/auto is mostly links to /etc/xen.
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                text = self._read(path)
                if text is not None:
                    yield text
        self._nr_files = len(seen)

    def _files(self, directory: Path) -> Iterator[Path]:
        for name in names_in(directory):
            if not name.endswith(_LEFTOVERS):
                yield directory / name

    def _read(self, path: Path) -> _Text | None:
        try:
            return _Text(read_regular(path), os.fspath(path))
        except NotRegularError:
            return None
        except ConfigUnreadable as err:
            self._on_skip(os.fspath(path), err.one_line())
            return None
