# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every ``xl create`` that runs just now was asked for, by its process and command line.

xl keeps neither the text nor the path of a configuration; for as long as it makes the domain, its
arguments say both.
"""

from __future__ import annotations

import dataclasses
import getopt
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from xshmd.config.files import read_regular
from xshmd.errors import ConfigUnreadable

MAX_COMMAND_BYTES: Final = 1 << 17
"""As much of a command line as is read: what Linux allows one argument."""

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


def being_created(proc: Path, xl_uid: int) -> Iterator[tuple[bytes, str]]:
    """Yield what each running ``xl create`` reads, and what to call it, the latest process first.

    The process that made a domain stays to watch it, with the same command line: the latest is the
    one at work.

    Args:
        proc: The proc file system.
        xl_uid: Only processes of this user are believed to be xl.
    """
    found: list[tuple[int, Path, CreateArguments]] = []
    for process, raw in _xl_processes(proc):
        asked = create_arguments([os.fsdecode(word) for word in raw.split(b"\0")[:-1]])
        if asked is None:
            continue
        try:
            if process.stat().st_uid != xl_uid:
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


def _xl_processes(proc: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield each process whose program is called xl, and its command line.

    Every new domain of the host pays for this look at every process, so it costs two system
    calls for those that are something else.
    """
    try:
        directory = os.open(proc, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        for pid in os.listdir(directory):
            if not pid.isdecimal():
                continue
            try:
                fd = os.open(f"{pid}/cmdline", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
            except OSError:
                continue
            try:
                raw = os.read(fd, MAX_COMMAND_BYTES)
            except OSError:
                continue
            finally:
                os.close(fd)
            if raw.partition(b"\0")[0].rpartition(b"/")[2] == b"xl":
                yield proc / pid, raw
    finally:
        os.close(directory)


def _text_of_process(process: Path, asked: CreateArguments) -> tuple[bytes, str] | None:
    extra = os.fsencode(asked.extra_config)
    file = asked.config_file
    if file == "/dev/null":
        # xl's own special case: everything is on the command line.
        return extra, "xl command line"
    if file.startswith("/"):
        # Through root, as our service may not see the /tmp or /home that xl sees.
        paths = [process / "root" / file.lstrip("/"), Path(file)]
    else:
        paths = [process / "cwd" / file]
    for path in paths:
        try:
            data = read_regular(path)
        except ConfigUnreadable:
            continue
        return data + extra, file
    return None


def _start_time(process_stat: bytes) -> int:
    """Return field 22 of /proc/PID/stat; the name in field 2 may hold anything."""
    fields = process_stat.rpartition(b")")[2].split()
    try:
        return int(fields[19])
    except (IndexError, ValueError):
        return 0
