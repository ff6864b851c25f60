# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a new domain's ``static_shm`` is written: the only module of this package that reads files.

xl ignores keys it does not know and keeps neither the text nor the path of a configuration, so it
has to be found: in a file of ours, by the arguments of the ``xl create`` that is running just now,
or in the usual directories.  Two rules hold for all files but our own: one that does not mention
``static_shm`` can never be an error, and neither can one that is not the wanted guest's.
"""

from __future__ import annotations

import dataclasses
import getopt
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from xshmd.config import static_shm
from xshmd.config.findings import config_error
from xshmd.config.guest import from_xl, normalised_uuid
from xshmd.config.xlcfg import MAX_BYTES, XlConfig, parse
from xshmd.errors import ConfigError, ConfigUnreadable, XshmError
from xshmd.model import NOWHERE, Arch, GuestConfig, RegionRequest

OWN_DIRECTORY: Final = Path("/etc/xshmd/guests.d")
XL_DIRECTORIES: Final = (Path("/etc/xen"), Path("/etc/xen/auto"))
MAX_FILES: Final = 4096
"""How many entries of one directory are looked at."""

MAX_COMMAND_BYTES: Final = 1 << 17
"""As much of a command line as is read: what Linux allows one argument."""

_SUFFIX: Final = ".cfg"
_LEFTOVERS: Final = (
    "~", ".bak", ".old", ".orig", ".rej", ".save", ".rpmsave", ".rpmnew",
    ".dpkg-old", ".dpkg-new", ".dpkg-dist", ".ucf-old", ".ucf-dist",
)  # fmt: skip
"""What editors and package managers leave beside a configuration: never one itself."""
_MENTIONS: Final = (static_shm.KEY.encode(), static_shm.OLD_KEY.encode())

_XL_OPTIONS: Final = "vftTN"
"""xl's own options, before the verb (tools/xl/xl.c main): none takes a value."""
_CREATE_OPTIONS: Final = "hAFVcdef:inpq"
"""Those of ``xl create`` (tools/xl/xl_vmcontrol.c main_create)."""
_CREATE_LONG_OPTIONS: Final = (
    "help", "defconfig=", "dryrun", "ignore-global-affinity-masks", "quiet", "vncviewer",
    "vncviewer-autopass",
)  # fmt: skip
_NO_DOMAIN: Final = frozenset({"-h", "--help", "-n", "--dryrun"})
"""With these ``xl create`` makes no domain."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CreateArguments:
    """What an ``xl create`` was asked for."""

    config_file: str
    """As given; may be relative to the process's directory."""
    extra_config: str
    """The ``key=value`` arguments, as xl appends them to the file's text."""


def create_arguments(argv: Sequence[str]) -> CreateArguments | None:
    """Read a command line as xl does; None unless it makes a domain from a configuration.

    Args:
        argv: The whole command line, the program first.
    """
    if not argv or os.path.basename(argv[0]) != "xl":
        return None
    try:
        options, rest = getopt.getopt(list(argv[1:]), _XL_OPTIONS)
        # xl takes any unambiguous beginning of a verb; what else begins with "c" has no "r" next.
        if (
            ("-N", "") in options
            or not rest
            or rest[0] not in ("cr", "cre", "crea", "creat", "create")
        ):
            return None
        config_file, arguments = "", rest[1:]
        if arguments and not arguments[0].startswith("-") and "=" not in arguments[0]:
            config_file, arguments = arguments[0], arguments[1:]
        options, rest = getopt.gnu_getopt(arguments, _CREATE_OPTIONS, list(_CREATE_LONG_OPTIONS))
    except getopt.GetoptError:
        return None
    if any(option in _NO_DOMAIN for option, _ in options):
        return None
    for option, value in options:
        if option in ("-f", "--defconfig"):
            config_file = value
    extra_config = ""
    for argument in rest:
        if "=" in argument:
            extra_config += argument + "\n"
        elif config_file:
            return None
        else:
            config_file = argument
    if not config_file:
        return None
    return CreateArguments(
        config_file=config_file, extra_config=f"\n{extra_config}\n" if extra_config else ""
    )


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


class Finder:
    """Finds configurations; implements :class:`xshmd.ports.ConfigFinder`.

    Args:
        arch: What xl's default guest type depends on.
        own_directory: Our own files, ``<name>.cfg`` or ``<uuid>.cfg``.
        xl_directories: Where administrators keep xl configurations, first found first.
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
        xl_directories: Sequence[Path] = XL_DIRECTORIES,
        proc: Path = Path("/proc"),
        xl_uid: int = 0,
        on_skip: Callable[[str, str], None] = lambda file, reason: None,
    ) -> None:
        self._arch = arch
        self._own_directory = own_directory
        self._xl_directories = tuple(xl_directories)
        self._proc = proc
        self._xl_uid = xl_uid
        self._on_skip = on_skip
        self._parsed: dict[_Text, XlConfig | ConfigUnreadable] = {}

    def find(self, *, name: str, uuid: str) -> GuestConfig | None:
        """Return the configuration of the guest of this name, or None if nobody has one.

        A result without requests means that the configuration was found and has none.

        Raises:
            ConfigError, ConfigUnreadable: it was found, and is wrong.
        """
        own = self._own(name, uuid)
        if own is not None:
            return own
        for text in self._being_created():
            config = self._if_wanted(text, name, uuid)
            if config is not None:
                return config
        return self._agreed(
            [
                config
                for text in self._xl_texts()
                if (config := self._if_wanted(text, name, uuid)) is not None
            ]
        )

    def known(self) -> tuple[GuestConfig, ...]:
        """Return every readable configuration with shared memory in the usual places."""
        own = [
            _with_uuid_of(path, config)
            for path in self._files(self._own_directory)
            if path.suffix == _SUFFIX
            and (text := self._read(path)) is not None
            and (config := self._if_good(text, own_name=path.stem)) is not None
        ]
        names = {config.name for config in own}
        others: list[GuestConfig] = []
        for text in self._xl_texts():
            if not text.has_shared_memory:
                continue
            config = self._if_good(text)
            if config is None or not config.requests or config.name in names:
                continue
            if not any(_same_guest(config, other) for other in others):
                others.append(config)
        return tuple(config for config in own if config.requests) + tuple(others)

    def _own(self, name: str, uuid: str) -> GuestConfig | None:
        for stem in (name, normalised_uuid(uuid)):
            # A name is any string to xl: only one that stays in the directory can have a file.
            if not stem or "/" in stem:
                continue
            path = self._own_directory / (stem + _SUFFIX)
            if not os.path.lexists(path):
                continue
            text = _read_text(path)
            config = from_xl(parse(text.data, text.file), arch=self._arch, own_name=name)
            if config.name != name:
                what = f"name is '{config.name}', but the file is that of guest '{name}'"
                hint = f"rename the file to {config.name}{_SUFFIX}, or leave name out"
                raise config_error(config.place, what, hint=hint)
            return _with_uuid_of(path, config)
        return None

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
        if text not in self._parsed:
            if len(self._parsed) >= MAX_FILES:
                self._parsed.clear()
            try:
                # xl does not mind the encoding, so it is no reason not to know whose this is.
                self._parsed[text] = parse(text.data.decode("utf-8", "replace"), text.file)
            except ConfigUnreadable as err:
                self._parsed[text] = err
        result = self._parsed[text]
        if isinstance(result, ConfigUnreadable):
            raise ConfigUnreadable(result.message, hint=result.hint, **result.facts)
        return result

    def _if_good(self, text: _Text, own_name: str = "") -> GuestConfig | None:
        try:
            parsed = self._parse(text) if text.is_utf8 else parse(text.data, text.file)
            return from_xl(parsed, arch=self._arch, own_name=own_name)
        except XshmError as err:
            self._on_skip(text.file, err.one_line())
            return None

    def _agreed(self, configs: Sequence[GuestConfig]) -> GuestConfig | None:
        if not configs:
            return None
        first = configs[0]
        for other in configs[1:]:
            if _without_places(other.requests) != _without_places(first.requests):
                raise ConfigError(
                    f"{first.place.file} and {other.place.file} are both for guest"
                    f" '{first.name}' and say different {static_shm.KEY}",
                    hint=f"remove one, or decide in {self._own_directory / first.name}{_SUFFIX}",
                    file=first.place.file,
                    place=static_shm.KEY,
                    other_file=other.place.file,
                )
        return first

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

    def _files(self, directory: Path) -> list[Path]:
        try:
            with os.scandir(directory) as entries:
                names = [entry.name for entry, _ in zip(entries, range(MAX_FILES), strict=False)]
        except OSError:
            return []
        return [
            directory / name
            for name in sorted(names)
            if not name.startswith(".") and not name.endswith(_LEFTOVERS)
        ]

    def _read(self, path: Path) -> _Text | None:
        try:
            return _read_text(path)
        except _NotRegularError:
            return None
        except ConfigUnreadable as err:
            self._on_skip(os.fspath(path), err.one_line())
            return None

    def _being_created(self) -> Iterator[_Text]:
        """Yield what each running ``xl create`` reads, the latest process first.

        The process that made a domain stays to watch it, with the same command line: the latest is
        the one at work.
        """
        found: list[tuple[int, Path, CreateArguments]] = []
        for process, raw in self._xl_processes():
            asked = create_arguments([os.fsdecode(word) for word in raw.split(b"\0")[:-1]])
            if asked is None:
                continue
            try:
                if process.stat().st_uid != self._xl_uid:
                    continue
                started = _start_time((process / "stat").read_bytes())
            except OSError:
                continue
            found.append((started, process, asked))
        found.sort(key=lambda item: item[0], reverse=True)
        for _, process, asked in found:
            text = _text_of_process(process, asked)
            if text is not None:
                yield text

    def _xl_processes(self) -> Iterator[tuple[Path, bytes]]:
        """Yield each process whose program is called xl, and its command line.

        Every new domain of the host pays for this look at every process, so it costs two system
        calls for those that are something else.
        """
        try:
            proc = os.open(self._proc, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            for pid in os.listdir(proc):
                if not pid.isdecimal():
                    continue
                try:
                    fd = os.open(f"{pid}/cmdline", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
                except OSError:
                    continue
                try:
                    raw = os.read(fd, MAX_COMMAND_BYTES)
                except OSError:
                    continue
                finally:
                    os.close(fd)
                if raw.partition(b"\0")[0].rpartition(b"/")[2] == b"xl":
                    yield self._proc / pid, raw
        finally:
            os.close(proc)


class _NotRegularError(ConfigUnreadable):
    """It is a directory, a FIFO or a device: nothing to read, and nothing to wait for."""


def _text_of_process(process: Path, asked: CreateArguments) -> _Text | None:
    extra = os.fsencode(asked.extra_config)
    file = asked.config_file
    if file == "/dev/null":
        # xl's own special case: everything is on the command line.
        return _Text(extra, "xl command line")
    if file.startswith("/"):
        # Through root, as our service may not see the /tmp or /home that xl sees.
        paths = [process / "root" / file.lstrip("/"), Path(file)]
    else:
        paths = [process / "cwd" / file]
    for path in paths:
        try:
            data = _read_text(path).data
        except ConfigUnreadable:
            continue
        return _Text(data + extra, file)
    return None


def _read_text(path: Path) -> _Text:
    file = os.fspath(path)
    try:
        # Looked at before it is opened, as opening a device can have effects, and after, as it may
        # have been replaced in between.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _NotRegularError(f"{file}: it is not a file", file=file)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(fd, "rb") as stream:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise _NotRegularError(f"{file}: it is not a file", file=file)
            return _Text(stream.read(MAX_BYTES + 1), file)
    except OSError as err:
        raise ConfigUnreadable(
            f"{file}: it cannot be read: {err.strerror}", hint="check its permissions", file=file
        ) from err


def _with_uuid_of(path: Path, config: GuestConfig) -> GuestConfig:
    """Return the configuration with the UUID that its file is named by, if it is and says none."""
    uuid = config.uuid or normalised_uuid(path.stem)
    return dataclasses.replace(config, uuid=uuid)


def _start_time(process_stat: bytes) -> int:
    """Return field 22 of /proc/PID/stat; the name in field 2 may hold anything."""
    fields = process_stat.rpartition(b")")[2].split()
    try:
        return int(fields[19])
    except (IndexError, ValueError):
        return 0


def _without_places(requests: Sequence[RegionRequest]) -> tuple[RegionRequest, ...]:
    return tuple(dataclasses.replace(request, place=NOWHERE) for request in requests)


def _same_guest(one: GuestConfig, other: GuestConfig) -> bool:
    return one.name == other.name and _without_places(one.requests) == _without_places(
        other.requests
    )
