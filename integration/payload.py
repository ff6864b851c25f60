# SPDX-License-Identifier: LGPL-2.1-or-later
"""xshmd changes at every run and dom0 does not: what is ours goes to dom0 as one tar, on a disk.

The tar is a raw second disk of the machine. The initramfs unpacks it over dom0's root, so its
paths are those of an installed xshmd, and the rig's own files are below /rig.
"""

from __future__ import annotations

import io
import stat
import tarfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from integration.arch import Arch
from integration.cache import Cache, Entry, Recipe
from integration.extensions import get_extensions
from integration.guests import get_guests
from integration.images import Image
from integration.sources import PROJECT, source_files, sources_digest
from integration.toolroot import ToolRoot

TAR = "payload.tar"
PACKAGES = PurePosixPath("usr/lib/python3/dist-packages")
UNITS = PurePosixPath("usr/lib/systemd/system")
RIG = PurePosixPath("rig")
AGENT_UNIT = "xshmd-rig-agent.service"
# A disk has whole sectors, and an empty tail costs nothing.
_ROUND_BYTES = 1 << 20


def get_payload(arch: Arch, tools: ToolRoot, image: Image, cache: Cache) -> Path:
    """The payload's tar from the cache, built first if need be."""
    extensions = get_extensions(arch, tools, cache)
    guests = get_guests(arch, tools, image, cache)
    built = [entry for entry in (extensions, guests) if entry is not None]
    own = [
        PROJECT / "pyproject.toml",
        PROJECT / "integration/agent.py",
        Path(__file__),
        *source_files(PROJECT / "integration/dom0"),
        *source_files(PROJECT / "xshmd"),
        *source_files(PROJECT / "systemd"),
        *source_files(PROJECT / "tests"),
    ]
    recipe = Recipe(
        f"payload-{arch.name}",
        f"the {arch.name} payload",
        1,
        (tools.key, sources_digest(own), *(entry.recipe.key for entry in built)),
    )
    entry = cache.get(
        recipe,
        lambda content, log: _build(tools, extensions, guests, content, log),
    )
    return entry.path / TAR


def _build(
    tools: ToolRoot, extensions: Entry | None, guests: Entry | None, content: Path, log: Path
) -> None:
    tree = content / "tree"
    for path, place, mode in _files(extensions, guests):
        target = tree / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        target.chmod(mode)
    for name, text in _entry_points():
        target = tree / "usr/bin" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(0o755)
    # Compiling is slow in an emulated machine, and bytecode is the same on every architecture.
    tools.run(
        [
            *("python3", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"),
            *("-s", "/rig/tree", f"/rig/tree/{PACKAGES}"),
        ],
        binds={tree: "/rig/tree"},
        log=log,
    )
    data = _tar(tree)
    (content / TAR).write_bytes(data + b"\0" * (-len(data) % _ROUND_BYTES))
    tools.run(["rm", "-rf", "/rig/content/tree"], binds={content: "/rig/content"}, log=log)


def _files(
    extensions: Entry | None, guests: Entry | None
) -> Iterator[tuple[Path, PurePosixPath, int]]:
    """Every file of the payload: where it comes from, where it goes, its mode."""
    package = PROJECT / "xshmd"
    for path in source_files(package):
        yield path, PACKAGES / "xshmd" / path.relative_to(package), 0o644
    if extensions is not None:
        for path in sorted(extensions.path.rglob("*.so")):
            yield path, PACKAGES / path.relative_to(extensions.path), 0o644
    for path in source_files(PROJECT / "systemd"):
        yield path, UNITS / path.name, 0o644
    dom0 = PROJECT / "integration/dom0"
    for path in source_files(dom0):
        place = RIG / path.relative_to(dom0)
        yield path, UNITS / path.name if path.name == AGENT_UNIT else place, _mode(path)
    yield PROJECT / "integration/agent.py", RIG / "agent.py", 0o755
    for path in source_files(PROJECT / "tests"):
        yield path, RIG / path.relative_to(PROJECT), _mode(path)
    yield PROJECT / "pyproject.toml", RIG / "pyproject.toml", 0o644
    if guests is not None:
        for path in source_files(guests.path):
            yield path, RIG / "guests" / path.relative_to(guests.path), _mode(path)


def _mode(path: Path) -> int:
    executable = path.stat().st_mode & stat.S_IXUSR or path.read_bytes()[:2] == b"#!"
    return 0o755 if executable else 0o644


def _entry_points() -> Iterator[tuple[str, str]]:
    """The programs pyproject.toml promises, as an installer would write them."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    for name, target in project.get("project", {}).get("scripts", {}).items():
        module, function = target.split(":")
        lines = ("#!/usr/bin/python3 -I", "import sys", f"from {module} import {function}")
        yield name, "\n".join((*lines, f"sys.exit({function}())", ""))


def _tar(tree: Path) -> bytes:
    """The tree as a tar that is the same whenever and wherever it is made."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = "root"
        return member

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(tree.rglob("*")):
            if not path.is_dir():  # folders of dom0 keep the modes they have there
                archive.add(path, path.relative_to(tree), recursive=False, filter=plain)
        _add_link(
            archive,
            f"etc/systemd/system/multi-user.target.wants/{AGENT_UNIT}",
            f"/{UNITS}/{AGENT_UNIT}",
            plain,
        )
        for folder in ("rig/guests",):
            member = tarfile.TarInfo(folder)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(plain(member))
        _add_link(archive, "rig/guests/vmlinuz", "../vmlinuz", plain)
    return buffer.getvalue()


def _add_link(
    archive: tarfile.TarFile,
    name: str,
    target: str,
    plain: Callable[[tarfile.TarInfo], tarfile.TarInfo],
) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mode = tarfile.SYMTYPE, target, 0o777
    archive.addfile(plain(member))
