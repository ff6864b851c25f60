# SPDX-License-Identifier: LGPL-2.1-or-later
"""xshmd changes at every run and dom0 does not: what is ours goes to dom0 as one tar, on a disk.

The tar is a raw second disk of the machine. The initramfs unpacks it over dom0's root, so its
paths are those of an installed xshmd, and the rig's own files are below /rig.
"""

from __future__ import annotations

import io
import shutil
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from integration.arch import Arch
from integration.cache import Cache, Recipe
from integration.extensions import C_FOLDER, get_extensions
from integration.guests import get_guests
from integration.images import Image
from integration.sources import File, Sources, read_sources, write
from integration.toolroot import ToolRoot

TAR = "payload.tar"
PACKAGES = PurePosixPath("usr/lib/python3/dist-packages")
UNITS = PurePosixPath("usr/lib/systemd/system")
RIG = PurePosixPath("rig")
AGENT_UNIT = "xshmd-rig-agent.service"
ENABLED_UNITS = ("xen.service", "xendomains.service", AGENT_UNIT)
# Units that only cost time on a machine that lives for a minute and whose console is a log file.
# The devices that udev would trigger are all there already, in devtmpfs.
MASKED_UNITS = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty.target",
    "kmod-static-nodes.service",
    "ldconfig.service",
    *(
        f"modprobe@{of}.service"
        for of in ("configfs", "dm_mod", "drm", "efi_pstore", "fuse", "loop")
    ),
    "proc-sys-fs-binfmt_misc.automount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-binfmt.service",
    "systemd-firstboot.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-logind.service",
    "systemd-networkd.service",
    "systemd-pcrphase.service",
    "systemd-random-seed.service",
    "systemd-remount-fs.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-udev-load-credentials.service",
    "systemd-udev-settle.service",
    "systemd-udev-trigger.service",
    "systemd-update-done.service",
    "systemd-update-utmp.service",
    "systemd-user-sessions.service",
)
# Where files of integration/dom0 go that do not go to /rig.
ELSEWHERE = {
    AGENT_UNIT: UNITS / AGENT_UNIT,
    "default-xen": PurePosixPath("etc/default/xen"),
}
_OWN_UNITS = PurePosixPath("etc/systemd/system")
LINKS = {
    **{f"{_OWN_UNITS}/multi-user.target.wants/{u}": f"/{UNITS}/{u}" for u in ENABLED_UNITS},
    **{f"{_OWN_UNITS}/{u}": "/dev/null" for u in MASKED_UNITS},
    "rig/guests/vmlinuz": "../vmlinuz",
}
_UNIT_SUFFIXES = {".service", ".socket", ".target", ".mount", ".path", ".timer"}
_SOURCES = (
    "pyproject.toml",
    "integration/agent.py",
    "integration/dom0",
    "integration/payload.py",
    "integration/virtio_driver.py",
    "systemd",
    "tests",
    "xshmd",
)
# A disk has whole sectors, and an empty tail costs nothing.
_ROUND_BYTES = 1 << 20


def get_payload(arch: Arch, tools: ToolRoot, image: Image, cache: Cache) -> Path:
    """The payload's tar from the cache, built first if need be."""
    built: list[tuple[PurePosixPath, Sources]] = []
    extensions = get_extensions(arch, tools, cache)
    if extensions is not None:
        built.append((PACKAGES, read_sources("xshmd", tree=extensions.path)))
    guests = get_guests(arch, tools, image, cache)
    if guests is not None:
        built.append((RIG / "guests", read_sources(".", tree=guests.path)))
    sources = read_sources(*_SOURCES)
    recipe = Recipe(
        f"payload-{image.name}",
        f"the {image.name} payload",
        3,
        (tools.key, sources.digest, *(files.digest for _, files in built)),
    )

    def build(content: Path, log: Path) -> None:
        tree = content / "tree"
        for place, file in _ours(sources):
            write(tree / place, file.data, file.mode)
        for place, files in built:
            files.write_to(tree / place)
        for name, text in _programs(sources):
            write(tree / "usr/bin" / name, text.encode(), 0o755)
        _compile(tools, tree, log)
        data = _tar(tree)
        (content / TAR).write_bytes(data + b"\0" * (-len(data) % _ROUND_BYTES))
        shutil.rmtree(tree)

    return cache.get(recipe, build).path / TAR


def _ours(sources: Sources) -> Iterator[tuple[PurePosixPath, File]]:
    """The clone's own files, and where each goes."""
    for name, file in sources.below("xshmd"):
        if not ("xshmd" / name).is_relative_to(C_FOLDER):  # as in a wheel
            yield PACKAGES / "xshmd" / name, file
    for name, file in sources.below("systemd"):
        if name.suffix in _UNIT_SUFFIXES:
            yield UNITS / name.name, file
    for name, file in sources.below("integration/dom0"):
        if name.name != "initramfs-init":  # that one is the image's
            yield ELSEWHERE.get(name.name, RIG / name), file
    for name, file in sources.below("tests"):
        yield RIG / "tests" / name, file
    for file in sources.files:
        if str(file.name) in ("pyproject.toml", "integration/agent.py"):
            yield RIG / file.name.name, file
        if str(file.name) == "integration/virtio_driver.py":  # tests in dom0 use it as others do
            yield RIG / file.name, file


def _programs(sources: Sources) -> Iterator[tuple[str, str]]:
    """The programs pyproject.toml promises, as an installer would write them."""
    text = next(f.data for f in sources.files if str(f.name) == "pyproject.toml").decode()
    for name, target in tomllib.loads(text).get("project", {}).get("scripts", {}).items():
        module, function = target.split(":")
        lines = ("#!/usr/bin/python3 -I", "import sys", f"from {module} import {function}")
        yield name, "\n".join((*lines, f"sys.exit({function}())", ""))


def _compile(tools: ToolRoot, tree: Path, log: Path) -> None:
    """Add bytecode: compiling takes seconds in an emulated machine, and it is the same on all."""
    tools.run(
        [
            *("python3", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"),
            *("-s", "/rig/tree", f"/rig/tree/{PACKAGES}"),
        ],
        binds={tree: "/rig/tree"},
        log=log,
    )


def _tar(tree: Path) -> bytes:
    """The tree as a tar that is the same whenever and wherever it is made."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(tree.rglob("*")):
            if path.is_file():  # no folders: dom0's keep the modes they have there
                data = path.read_bytes()
                member = tarfile.TarInfo(str(path.relative_to(tree)))
                member.size, member.mode = len(data), path.stat().st_mode & 0o777
                archive.addfile(member, io.BytesIO(data))
        for name, target in LINKS.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = tarfile.SYMTYPE, target, 0o777
            archive.addfile(member)
    return buffer.getvalue()
