# SPDX-License-Identifier: LGPL-2.1-or-later
"""Building what the rig boots takes minutes: it is done once and kept, outside the clone.

An entry is named by the hash of its recipe, so a changed recipe is another entry and nothing is
ever stale. It is built in a temporary folder and published by one rename, so an entry is never
half there. A stamp in it records every file; a damaged entry is built again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from integration.progress import note, step

FORMAT = 1
STAMP = "stamp.json"
CONTENT = "content"
_BUFFER_BYTES = 1 << 20


def cache_root() -> Path:
    """The folder that holds all entries."""
    own = os.environ.get("XSHMD_CACHE")
    if own:
        return Path(own).absolute()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "xshmd"


@dataclass(frozen=True)
class Recipe:
    """All that decides what an entry contains.

    Attributes:
        name: says what the entry is, and separates it from entries of other kinds.
        title: how progress messages call it.
        version: raised when the meaning of the recipe changes but its inputs do not.
        inputs: package lists, source text of the building code, keys of other entries...
    """

    name: str
    title: str
    version: int
    inputs: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The content key: recipes that differ in any input have different keys."""
        document = json.dumps([FORMAT, self.name, self.version, *self.inputs])
        return hashlib.sha256(document.encode()).hexdigest()[:20]

    @property
    def folder(self) -> str:
        """The name of the entry's folder."""
        return f"{self.name}-{self.key}"


@dataclass(frozen=True)
class Entry:
    """A complete entry. While the process lives, nobody prunes it."""

    recipe: Recipe
    path: Path


Build = Callable[[Path, Path], None]
"""Fills the first folder (empty, to be published); writes what it has to say to the second, a file.
"""


class Cache:
    """The entries below one folder."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_root()

    def log_path(self, recipe: Recipe) -> Path:
        """Where the log of the recipe's last build is."""
        return self.root / "logs" / f"{recipe.name}.log"

    def find(self, recipe: Recipe) -> Entry | None:
        """The recipe's entry, if it is there and whole."""
        return self._find(recipe)[0]

    def get(self, recipe: Recipe, build: Build) -> Entry:
        """The recipe's entry, built first if it is not there or damaged.

        Raises:
            BuildError: `build` failed. The cache is then as it was before.
        """
        entry, _ = self._find(recipe)
        if entry is not None:
            return entry
        self.root.mkdir(parents=True, exist_ok=True)
        with self._building(recipe):
            entry, damage = self._find(recipe)  # another run may have built it meanwhile
            if entry is None:
                if damage:
                    note(f"{recipe.title}: the cached copy is damaged ({damage})")
                self._build(recipe, build)
                entry, damage = self._find(recipe)
            self._prune(recipe)
        if entry is None:
            raise BuildError(f"{recipe.title}: damaged as soon as it was built: {damage}")
        return entry

    def _find(self, recipe: Recipe) -> tuple[Entry | None, str]:
        """The entry, or None and what is wrong with it ("" if there is none at all)."""
        path = self.root / recipe.folder
        lock = _in_use.get(path)
        if lock is None or not lock.is_on(path):
            try:
                lock = _HeldLock(path, fcntl.LOCK_SH)
            except FileNotFoundError:
                return None, ""
        damage = _damage(path)
        if damage or not lock.is_on(path):
            _in_use.pop(path, None)
            lock.release()
            return None, damage
        _in_use[path] = lock
        return Entry(recipe, path / CONTENT), ""

    @contextmanager
    def _building(self, recipe: Recipe) -> Iterator[None]:
        """One builder of a name at a time, whatever the key."""
        locks = self.root / "locks"
        locks.mkdir(exist_ok=True)
        file = locks / recipe.name
        file.touch()
        try:
            lock = _HeldLock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with step(f"waiting for another run that builds {recipe.title}"):
                lock = _HeldLock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.release()

    def _build(self, recipe: Recipe, build: Build) -> None:
        tmp = self.root / "tmp"
        tmp.mkdir(exist_ok=True)
        for left in tmp.glob(f"{recipe.name}@*"):  # of a run that was killed: we hold the lock
            _remove(left)
        log = self.log_path(recipe)
        log.parent.mkdir(exist_ok=True)
        log.write_bytes(b"")
        work = Path(tempfile.mkdtemp(prefix=f"{recipe.name}@", dir=tmp))
        work.chmod(0o755)
        try:
            with step(f"building {recipe.title}"):
                (work / CONTENT).mkdir()
                try:
                    build(work / CONTENT, log)
                except Exception as error:
                    raise BuildError(_failure(recipe, error, log)) from error
                _write_stamp(work)
            final = self.root / recipe.folder
            if final.exists():
                final.rename(tmp / f"{recipe.name}@damaged-{os.getpid()}")
            work.rename(final)
        finally:
            for left in tmp.glob(f"{recipe.name}@*"):
                _remove(left)

    def _prune(self, recipe: Recipe) -> None:
        """Remove entries of the same name and another key that no process uses."""
        for old in self.root.glob(f"{recipe.name}-*"):
            key = old.name.removeprefix(f"{recipe.name}-")
            if key == recipe.key or len(key) != len(recipe.key) or not _is_hex(key):
                continue
            try:
                lock = _HeldLock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            trash = self.root / "tmp" / f"{recipe.name}@old-{key}"
            trash.parent.mkdir(exist_ok=True)
            old.rename(trash)
            lock.release()
            _remove(trash)


class BuildError(Exception):
    """An entry could not be built; the message has the end of the build log."""


class _HeldLock:
    """A flock(2) on a file or folder, held until released or until the process ends."""

    def __init__(self, path: Path, how: int) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, how)
        except OSError:
            os.close(self._fd)
            raise

    def is_on(self, path: Path) -> bool:
        """Whether `path` is still what was locked: it may have been replaced while we waited."""
        try:
            return os.path.samestat(os.fstat(self._fd), path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        os.close(self._fd)


# Entries this process uses, each locked until the process ends. By path: one lock each is enough.
_in_use: dict[Path, _HeldLock] = {}


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _write_stamp(work: Path) -> None:
    """Record every regular file of the content: size, SHA-256, and when it was last touched."""
    files: dict[str, list[int | str]] = {}
    for path, status in _regular_files(work / CONTENT):
        files[str(path.relative_to(work / CONTENT))] = [
            status.st_size,
            _sha256(path),
            status.st_ctime_ns,
        ]
    (work / STAMP).write_text(json.dumps({"boot": _boot_id(), "files": files}))


def _damage(entry: Path) -> str:
    """What is wrong with an entry, or "".

    Reading gigabytes at each start would be slow. Any write to a file changes its ctime, and no
    program can set that back; so a file whose ctime is the recorded one is not read again. That
    holds within one boot of one machine: after a power cut the kernel may have kept the ctime and
    lost the data. So in another boot, or after a copy, everything is hashed once more.
    """
    try:
        stamp = json.loads((entry / STAMP).read_text())
        boot, files = stamp["boot"], stamp["files"].items()
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return "its stamp is missing or unreadable"
    same_boot = boot == _boot_id()
    restamp = not same_boot
    for name, (size, digest, ctime_ns) in files:
        path = entry / CONTENT / name
        try:
            status = path.lstat()
        except OSError:
            return f"{name} is missing"
        if status.st_size != size:
            return f"{name} has {status.st_size} bytes, not {size}"
        if not same_boot or status.st_ctime_ns != ctime_ns:
            restamp = True
            if not stat.S_ISREG(status.st_mode) or _sha256(path) != digest:
                return f"{name} has other contents"
    if restamp:
        _restamp(entry, stamp)
    return ""


def _restamp(entry: Path, stamp: dict[str, object]) -> None:
    """All hashes were right: record today's ctimes, so that the next run need not read again."""
    files = stamp["files"]
    assert isinstance(files, dict)
    for name, record in files.items():
        record[2] = (entry / CONTENT / name).lstat().st_ctime_ns
    stamp["boot"] = _boot_id()
    new = entry / f"{STAMP}.{os.getpid()}"
    new.write_text(json.dumps(stamp))
    new.rename(entry / STAMP)


def _regular_files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                yield path, status


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BUFFER_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _is_hex(text: str) -> bool:
    return all(c in "0123456789abcdef" for c in text)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _failure(recipe: Recipe, error: Exception, log: Path) -> str:
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    return f"building {recipe.title} failed: {error}\n{tail}\n(the whole log: {log})"
