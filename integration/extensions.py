# SPDX-License-Identifier: LGPL-2.1-or-later
"""xshmd has compiled modules, and dom0 has no compiler: they are built here, for either machine."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

from integration.arch import Arch
from integration.cache import Cache, Entry, Recipe
from integration.debian import SUITE, unpack_debian
from integration.sources import PROJECT, Sources, read_sources
from integration.toolroot import ToolRoot

SCRIPT = "cffi_build.py"
C_FOLDER = "xshmd/xen/c"
"""What the script reads."""

SYSROOT_PACKAGES = ("libc6-dev", "libpython3-dev", "libxen-dev")


def get_sysroot(arch: Arch, tools: ToolRoot, cache: Cache | None = None) -> Entry:
    """Headers and libraries of `arch` to build the extension modules against."""
    recipe = Recipe(
        f"sysroot-{arch.name}",
        f"the {arch.name} headers and libraries",
        3,
        (SUITE, arch.debian, *SYSROOT_PACKAGES, inspect.getsource(get_sysroot)),
    )

    def build(content: Path, log: Path) -> None:
        unpack_debian(arch, tools, content, "extract", SYSROOT_PACKAGES, log)
        for needless in ("boot", "etc", "var", "usr/bin", "usr/sbin", "usr/share"):
            shutil.rmtree(content / needless, ignore_errors=True)
        for name in ("lib", "lib64"):  # libc's linker script says /lib, base-files would make it
            if (content / "usr" / name).exists() and not (content / name).exists():
                (content / name).symlink_to(f"usr/{name}")

    return (cache or Cache()).get(recipe, build)


def build_sources(tree: Path = PROJECT) -> Sources:
    """All of xshmd that its compiled modules are made of."""
    return read_sources(SCRIPT, C_FOLDER, tree=tree)


def get_extensions(arch: Arch, tools: ToolRoot, cache: Cache) -> Entry | None:
    """xshmd's compiled modules for `arch`, laid out as in the package."""
    sources = build_sources()
    if not sources.files:
        return None
    sysroot = get_sysroot(arch, tools, cache)
    recipe = Recipe(
        f"extensions-{arch.name}",
        f"xshmd's {arch.name} extension modules",
        1,
        (tools.key, sysroot.recipe.key, sources.digest, Path(__file__).read_text()),
    )

    def build(content: Path, log: Path) -> None:
        sources.write_to(content / "src")  # not among the modules, which are installed as they are
        emitted = tools.run(
            ["python3", SCRIPT, "emit", "/rig/out/c"],
            binds={content: "/rig/out"},
            cwd="/rig/out/src",
            env={"PYTHONDONTWRITEBYTECODE": "1"},
            log=log,
            capture=True,
        )
        # cffi itself says what it does on standard output, before our list
        for module in json.loads(emitted[emitted.index("[\n") :]):
            *package, name = module["module"].split(".")
            target = content.joinpath(*package)
            target.mkdir(parents=True, exist_ok=True)
            # Everything comes from the sysroot: another Xen's headers would compile too, and
            # domain creation would then fail at run time with ESRCH.
            tools.run(
                [
                    *(arch.gcc, "--sysroot=/rig/sysroot", "-shared", "-fPIC", "-O2", "-g0"),
                    # cffi takes these for granted; the limited API of Python >= 3.11 does not
                    # declare them any more
                    *("-include", "string.h", "-include", "alloca.h"),
                    *("-DPy_LIMITED_API=0x030b0000", "-I/rig/sysroot/usr/include/python3.13"),
                    *("-o", "/".join(("/rig/out", *package, f"{name}.abi3.so"))),
                    f"/rig/out/c/{Path(module['c_file']).name}",
                    f"-L/rig/sysroot/usr/lib/{arch.multiarch}",
                    *(f"-l{library}" for library in module["libraries"]),
                ],
                binds={content: "/rig/out", sysroot.path: "/rig/sysroot"},
                log=log,
            )

    return cache.get(recipe, build)
