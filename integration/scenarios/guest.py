# SPDX-License-Identifier: LGPL-2.1-or-later
"""A scenario says what its guests are, not how an xl configuration is written: that is here."""

from __future__ import annotations

from dataclasses import dataclass, field

PAGE = 4096
MIB = 1 << 20
BUILT = "/rig/guests"
"""Where dom0 has what integration/guests makes."""
MASK = (1 << 64) - 1


def tag(page: int, seed: int) -> int:
    """What the guests' `fill` writes twice into a page (region_tag in guests/region.h)."""
    return (((seed << 32) + page + 1) * 0x9E3779B97F4A7C15) & MASK


FREE_WORD = 0
"""Offset in a region that no guest writes; `peek` says what is there."""
FILLED = 64
"""Offset of the word by which `await-fill` knows that `fill` is done."""


def filled(seed: int) -> int:
    """What is at FILLED then."""
    return 0x5853484D << 32 | seed


@dataclass(frozen=True)
class Entry:
    """One entry of static_shm."""

    region: str
    at: int
    size: int = MIB
    role: str = "owner"
    more: str = ""
    lifetime: str = "members"
    """What an owner says of it; empty for the default, by which it ends with its owner."""

    def __str__(self) -> str:
        text = f"id={self.region}, begin={self.at:#x}, size={self.size:#x}, role={self.role}"
        if self.role == "owner" and self.lifetime:
            text += f", lifetime={self.lifetime}"
        return f"{text}, {self.more}" if self.more else text


@dataclass(frozen=True)
class Guest:
    """A guest, as its configuration file says it.

    Attributes:
        name: unique in a session, so that its log is its own.
        entries: its static_shm; a text is taken as it is.
        do: the verbs of integration/guests/README.md.
        linux: whether it is Linux instead of the bare-metal guest.
        shm: what it is told of its regions, if not what its entries say.
        lines: further lines of the configuration.
    """

    name: str
    arch: str
    entries: tuple[Entry | str, ...] = ()
    do: str = "stay"
    slot: int = 0
    peer_slot: int | None = None
    seed: int = 7
    ticks: int = 100
    linux: bool = False
    memory_mib: int = 0
    type: str = "pvh"
    shm: str | None = None
    lines: tuple[str, ...] = field(default=())

    @property
    def words(self) -> str:
        """Its command line."""
        told = self.shm
        if told is None:
            regions = [e for e in self.entries if isinstance(e, Entry)]
            told = " ".join(f"shm={e.at:#x},{e.size:#x}" for e in regions)
        words = [f"name={self.name}", told, f"do={self.do}", f"slot={self.slot}"]
        words += [f"seed={self.seed}", f"ticks={self.ticks}"]
        if self.peer_slot is not None:
            words.append(f"peer-slot={self.peer_slot}")
        if self.linux:
            words = ["console=hvc0", "iomem=relaxed", "loglevel=3", *words]
        return " ".join(word for word in words if word)

    @property
    def files(self) -> dict[str, str]:
        """What it is booted from: its kernel, and its ramdisk if it has one."""
        if self.linux:
            return {"kernel": f"{BUILT}/vmlinuz", "ramdisk": f"{BUILT}/linux.cpio.gz"}
        return {"kernel": f"{BUILT}/baremetal"}

    @property
    def ram_mib(self) -> int:
        """How much RAM it gets."""
        return self.memory_mib or (160 if self.linux else 8)

    def config(self) -> str:
        """The text of its xl configuration."""
        lines = [f'name = "{self.name}"', f'type = "{self.type}"']
        lines += [f'{key} = "{path}"' for key, path in self.files.items()]
        lines += [f'extra = "{self.words}"', f"memory = {self.ram_mib}", "vcpus = 1"]
        if self.arch == "arm64":
            lines += ['vuart = "sbsa_uart"']
        else:
            # Emulated SVM: RDTSCP cannot be intercepted, and dom0 has CPU 0 to itself.
            lines += ['tsc_mode = "native"', 'cpus = "1"']
        return "\n".join((*lines, *self.lines, *self._static_shm(), ""))

    def own_file(self) -> str:
        """The least that a file of xshmd's own says of it."""
        return "\n".join((f'name = "{self.name}"', *self._static_shm(), ""))

    def _static_shm(self) -> tuple[str, ...]:
        if not self.entries:
            return ()
        return ("static_shm = [", *(f'    "{entry}",' for entry in self.entries), "]")

    def entry_line(self, index: int) -> int:
        """The line of the configuration that has this entry of static_shm."""
        before = self.config().splitlines().index("static_shm = [") + 1
        return before + 1 + index
