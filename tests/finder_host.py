# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host's directories and processes, as far as finding a configuration reads them."""

import dataclasses
import os
from pathlib import Path

import pytest

from xshmd.config.finder import Finder
from xshmd.machine import Arch
from xshmd.model import GuestConfig

UUID = "01234567-89ab-cdef-0123-456789abcdef"
OTHER_UUID = "f" * 8 + UUID[8:]


def text_of(name: str, region_id: str = "r", *more: str) -> str:
    entry = f"id={region_id}, begin=0x1000000000, size=0x1000, role=owner"
    return "\n".join([f"name = '{name}'", "type = 'pvh'", *more, f"static_shm = ['{entry}']", ""])


@dataclasses.dataclass
class Host:
    """The directories of a dom0."""

    root: Path

    def __post_init__(self) -> None:
        self.own, self.xen, self.proc = (self.root / name for name in ("own", "xen", "proc"))
        self.auto = self.xen / "auto"
        self.regions, self.usr_regions = (self.root / name for name in ("regions.d", "usr.d"))
        self.skipped: list[tuple[str, str]] = []
        for directory in (self.own, self.auto, self.proc, self.regions, self.usr_regions):
            directory.mkdir(parents=True)
        self.finder = Finder(
            arch=Arch.X86_64,
            own_directory=self.own,
            region_directories=[self.regions, self.usr_regions],
            xl_directories=[self.xen, self.auto],
            proc=self.proc,
            xl_uid=os.getuid(),
            on_skip=lambda file, reason: self.skipped.append((file, reason)),
        )

    def process(self, pid: int, *argv: str, started: int = 1, cwd: Path | None = None) -> Path:
        process = self.proc / str(pid)
        process.mkdir()
        (process / "cmdline").write_bytes(b"".join(os.fsencode(word) + b"\0" for word in argv))
        fields = " ".join(["S", *["0"] * 18, str(started), "0"])
        (process / "stat").write_text(f"{pid} (x) l) {fields}\n")
        (process / "cwd").symlink_to(cwd or self.root)
        return process

    def find(self, name: str = "vm", uuid: str = "") -> GuestConfig | None:
        return self.finder.find(name=name, uuid=uuid)

    def region(self, name: str = "vm", uuid: str = "") -> str | None:
        """Return the id of the one region found, "" for a guest without, None for no guest."""
        config = self.find(name, uuid)
        if config is None:
            return None
        return ",".join(request.region_id for request in config.requests)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)
