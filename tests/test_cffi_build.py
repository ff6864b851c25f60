# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the compiled modules are made of: all of it is in the cache key and in the sdist."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from integration import extensions
from integration.arch import ARCHES
from integration.cache import Build, Cache, Entry, Recipe
from integration.extensions import C_FOLDER, SCRIPT, build_sources, get_extensions
from integration.payload import PACKAGES, _ours
from integration.sources import PROJECT, read_sources
from integration.toolroot import ToolRoot

SOURCES = [str(file.name) for file in build_sources().files]
MODULES = ("stable", "xenctrl", "evtchn")
SDIST = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"


class EmptyCache(Cache):
    """Builds nothing."""

    def get(self, recipe: Recipe, build: Build) -> Entry:
        return Entry(recipe, self.root)


def key(tree: Path) -> str:
    """Under which key the rig looks for the modules of a tree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extensions, "build_sources", lambda: build_sources(tree))
        entry = get_extensions(ARCHES["arm64"], ToolRoot(tree), EmptyCache(tree))
    assert entry is not None
    return entry.recipe.key


def emit(tree: Path, folder: Path) -> dict[str, str]:
    """The C that is made of a tree, by the names of its files."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "emit", folder], cwd=tree, check=True, stdout=subprocess.PIPE
    )
    return {Path(each["c_file"]).name: Path(each["c_file"]).read_text()
            for each in json.loads(done.stdout)}  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files of the key, and nothing else."""
    build_sources().write_to(tmp_path / "tree")
    return tmp_path / "tree"


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return emit(PROJECT, tmp_path_factory.mktemp("emitted"))


def test_the_sources_are_the_script_and_two_files_a_module() -> None:
    files = {f"{C_FOLDER}/{module}{kind}" for module in MODULES for kind in (".c", ".cdef.h")}
    assert sorted(SOURCES) == sorted({SCRIPT, *files})


@pytest.mark.parametrize("name", SOURCES)
def test_every_change_of_a_source_changes_the_cache_key(tree: Path, name: str) -> None:
    before = key(tree)
    assert before == key(PROJECT)
    path = tree / name
    path.write_text(path.read_text() + "\n")
    assert key(tree) != before


def test_the_cache_key_has_all_that_is_read(
    tree: Path, tmp_path: Path, emitted: dict[str, str]
) -> None:
    assert set(emitted) == {f"_{module}.c" for module in MODULES}
    assert emit(tree, tmp_path / "c") == emitted


@pytest.mark.parametrize("module", MODULES)
def test_the_c_gets_into_the_module_as_it_is(emitted: dict[str, str], module: str) -> None:
    assert (PROJECT / C_FOLDER / f"{module}.c").read_text() in emitted[f"_{module}.c"]


def test_the_modules_can_be_built_from_an_sdist(tmp_path: Path, emitted: dict[str, str]) -> None:
    project = tmp_path / "project"
    shutil.copytree(PROJECT / "xshmd", project / "xshmd")
    shutil.copytree(PROJECT / "systemd", project / "systemd")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", SCRIPT):
        shutil.copy(PROJECT / name, project)
    done = subprocess.run(
        [sys.executable, "-c", SDIST, tmp_path],
        cwd=project, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    (archive,) = tmp_path.glob("*.tar.gz")
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    subprocess.run(["tar", "xf", archive, "-C", unpacked, "--strip-components=1"], check=True)
    assert key(unpacked) == key(PROJECT)
    units = sorted(unit.name for unit in (PROJECT / "systemd").iterdir())
    assert sorted(unit.name for unit in (unpacked / "systemd").iterdir()) == units
    assert emit(unpacked, tmp_path / "c") == emitted


def test_dom0_has_the_modules_but_not_their_c() -> None:
    places = {str(place) for place, _ in _ours(read_sources("xshmd"))}
    assert not any(place.startswith(f"{PACKAGES}/{C_FOLDER}/") for place in places)
    assert f"{PACKAGES}/xshmd/xen/_ffi.py" in places
