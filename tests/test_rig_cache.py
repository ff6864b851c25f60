# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cache must never hand out half an entry, nor a damaged one, nor build one twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from integration import cache as cache_module
from integration.cache import BuildError, Cache, Entry, Recipe, cache_root
from integration.sources import PROJECT

RECIPE = Recipe("thing", "the thing", 1, ("a", "b"))


def build(content: Path, log: Path) -> None:
    (content / "sub").mkdir()
    (content / "sub/file").write_text("what was built")
    (content / "empty").touch()
    (content / "link").symlink_to("nowhere")
    log.write_text("built it\n")


def must_not_build(content: Path, log: Path) -> None:
    raise AssertionError("it was built again")


def forget(cache: Cache) -> None:
    """What another process would know of the cache: nothing."""
    for path, lock in list(cache_module._in_use.items()):
        if path.is_relative_to(cache.root):
            lock.release()
            del cache_module._in_use[path]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "not yet there")


def content_of(entry: Entry) -> str:
    return (entry.path / "sub/file").read_text()


def test_every_input_makes_another_key() -> None:
    keys = {
        RECIPE.key,
        Recipe("other", "the thing", 1, ("a", "b")).key,
        Recipe("thing", "the thing", 2, ("a", "b")).key,
        Recipe("thing", "the thing", 1, ("a", "c")).key,
        Recipe("thing", "the thing", 1, ("ab",)).key,
        Recipe("thing", "the thing", 1, ("a", "b", "")).key,
    }
    assert len(keys) == 6


def test_how_it_is_called_makes_no_other_key() -> None:
    assert Recipe("thing", "The Thing!", 1, ("a", "b")).key == RECIPE.key


@pytest.mark.parametrize(
    ("environment", "root"),
    [
        ({"XSHMD_CACHE": "/c", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/c"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/xshmd"),
        ({"XSHMD_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/xshmd"),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], root: str
) -> None:
    for name in ("XSHMD_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == Path(root)


def test_an_empty_cache_is_filled_and_then_used(cache: Cache) -> None:
    assert cache.find(RECIPE) is None
    assert content_of(cache.get(RECIPE, build)) == "what was built"
    assert content_of(cache.get(RECIPE, must_not_build)) == "what was built"
    assert cache.log_path(RECIPE).read_text() == "built it\n"
    assert not list((cache.root / "tmp").iterdir())


def remove_stamp(entry: Path) -> None:
    (entry / "stamp.json").unlink()


def tear_stamp(entry: Path) -> None:
    text = (entry / "stamp.json").read_text()
    (entry / "stamp.json").write_text(text[: len(text) // 2])


def misshape_stamp(entry: Path) -> None:
    (entry / "stamp.json").write_text("[]")


def truncate_file(entry: Path) -> None:
    os.truncate(entry / "content/sub/file", 3)


def change_file(entry: Path) -> None:
    """Same size, and as its mtime says not changed."""
    path = entry / "content/sub/file"
    times = path.stat()
    path.write_text("what was BUILT")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def remove_file(entry: Path) -> None:
    (entry / "content/empty").unlink()


def replace_by_folder(entry: Path) -> None:
    (entry / "content/empty").unlink()
    (entry / "content/empty").mkdir()


DAMAGES = [
    remove_stamp,
    tear_stamp,
    misshape_stamp,
    truncate_file,
    change_file,
    remove_file,
    replace_by_folder,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_entry_is_built_again(cache: Cache, damage: object) -> None:
    assert callable(damage)
    cache.get(RECIPE, build)
    forget(cache)
    damage(cache.root / RECIPE.folder)
    assert cache.find(RECIPE) is None
    assert content_of(cache.get(RECIPE, build)) == "what was built"
    assert content_of(cache.get(RECIPE, must_not_build)) == "what was built"
    assert not list((cache.root / "tmp").iterdir())


def restamp(entry: Path, boot: str) -> None:
    stamp = json.loads((entry / "stamp.json").read_text())
    stamp["boot"] = boot
    (entry / "stamp.json").write_text(json.dumps(stamp))


def test_after_a_reboot_everything_is_read_once_more(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data that a power cut lost may still have its old ctime."""
    entry = cache.get(RECIPE, build)
    read: list[str] = []
    honest = cache_module._sha256

    def watched(path: Path) -> str:
        read.append(path.name)
        return honest(path)

    monkeypatch.setattr(cache_module, "_sha256", watched)
    cache.get(RECIPE, must_not_build)
    assert read == []
    restamp(entry.path.parent, "another boot")
    cache.get(RECIPE, must_not_build)
    assert sorted(read) == ["empty", "file"]
    cache.get(RECIPE, must_not_build)
    assert len(read) == 2


def test_a_failed_build_leaves_nothing_and_says_why(cache: Cache) -> None:
    def fail(content: Path, log: Path) -> None:
        (content / "half").touch()
        log.write_text("the compiler says no\n")
        raise RuntimeError("it did not work")

    with pytest.raises(BuildError, match=r"(?s)the thing.*did not work.*compiler says no"):
        cache.get(RECIPE, fail)
    assert cache.find(RECIPE) is None
    assert not list((cache.root / "tmp").iterdir())
    assert content_of(cache.get(RECIPE, build)) == "what was built"


def test_old_entries_of_the_same_name_are_removed(cache: Cache) -> None:
    """But not one that somebody uses, nor another kind whose name only begins alike."""
    old = Recipe("thing", "the thing", 0)
    alike = Recipe("thing-like", "a like thing", 0)
    for recipe in (old, alike):
        cache.get(recipe, build)
    forget(cache)
    used = Recipe("thing", "the thing", 7)
    cache.get(used, build)  # still locked by this process
    cache.get(RECIPE, build)
    left = {p.name for p in cache.root.glob("thing*")}
    assert left == {RECIPE.folder, used.folder, alike.folder}


def build_slowly_and_say_so(content: Path, log: Path) -> None:
    with (content.parents[2] / "builds").open("a") as file:
        file.write("x")
    time.sleep(0.3)
    build(content, log)


def get_with_others(root: Path, barrier: Barrier) -> None:
    barrier.wait(30)
    sys.exit(content_of(Cache(root).get(RECIPE, build_slowly_and_say_so)) != "what was built")


def test_two_runs_do_not_build_the_same_thing_twice(cache: Cache) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    runs = [context.Process(target=get_with_others, args=(cache.root, barrier)) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0, 0, 0]
    assert (cache.root / "builds").read_text() == "x"


KILLED = """
import sys, time
from pathlib import Path
from integration.cache import Cache
from tests.test_rig_cache import RECIPE
def build(content, log):
    (content / "half").touch()
    print("building", flush=True)
    time.sleep(60)
Cache(Path(sys.argv[1])).get(RECIPE, build)
"""


def test_a_killed_build_leaves_no_entry_and_is_cleared_away(cache: Cache) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(cache.root)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"building\n"
        run.send_signal(signal.SIGKILL)
    assert list((cache.root / "tmp").iterdir())
    assert cache.find(RECIPE) is None
    assert content_of(cache.get(RECIPE, build)) == "what was built"
    assert not list((cache.root / "tmp").iterdir())
