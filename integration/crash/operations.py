# SPDX-License-Identifier: LGPL-2.1-or-later
"""An operation to be cut off: what is there before it, how it begins, and what must come of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from integration.dom0 import Running
from integration.scenarios.guest import FILLED, Entry, Guest, filled
from integration.scenarios.host import WAIT_S, Host

SIZE = 64 << 10
RETRIES = 20
"""How often an admin asks again for what was cut off."""


@dataclass
class Scene:
    """What an operation takes place in."""

    host: Host
    guests: list[Guest] = field(default_factory=list)
    regions: list[str] = field(default_factory=list)
    """Those that are the system's."""

    def guest(self, name: str, *entries: Entry, do: str = "stay", slot: int = 0) -> Guest:
        return self.host.guest(name, *entries, do=do, slot=slot)

    def up(self, guest: Guest) -> Guest:
        """Make this guest and wait until it runs."""
        self.host.create(guest)
        self.guests.append(guest)
        self.host.wait_said(guest, "hello .*")
        return guest

    def owner(self) -> tuple[Guest, str]:
        """A guest that has filled its region."""
        region = self.host.unique("shared")
        guest = self.guest("owner", Entry(region, self.host.at, SIZE), do="fill,stay")
        self.up(guest)
        self.host.wait(lambda: self.host.peek(region, 0, FILLED) == filled(7), "it is filled")
        return guest, region

    def ask(self, *words: str) -> Running:
        return self.host.dom0.spawn(["xshmctl", *words], timeout_s=2 * WAIT_S)

    def insist(self, asked: Running, *words: str) -> None:
        """Ask again until it is done: what was cut off must have been done whole, or not at all."""
        for _ in range(RETRIES):
            done = asked.wait(2 * WAIT_S)
            # 4, 5: there is no such thing (any more), or it is there already.
            if done.status in (0, 4, 5):
                return
            self.host.wait(lambda: self.host.daemon_runs, "a daemon to ask")
            asked = self.ask(*words)
        raise AssertionError(f"never done: {done.describe()}")

    def finish(self) -> None:
        """End everything."""
        for guest in self.guests:
            self.host.xl("destroy", guest.name, check=False)
        self.guests.clear()
        for region in self.regions:
            self.insist(self.ask("remove", "--force", region), "remove", "--force", region)
        self.regions.clear()


Begun = Callable[[], None]
"""Waits for the end of an operation, and fails unless all is as it must be."""
Operation = Callable[[Scene], Callable[[], Begun]]
"""Prepares, and returns what begins it."""


def create_owner(scene: Scene) -> Callable[[], Begun]:
    """`xl create` of the first guest of two regions."""
    host = scene.host
    entries = [
        Entry(host.unique("one"), host.at, SIZE),
        Entry(host.unique("two"), host.at_elsewhere, SIZE),
    ]
    guest = scene.guest("first", *entries, do="fill,check,stay")
    return lambda: created(scene, guest, r"checked pages=16 bad=0 seed=7")


def create_borrower(scene: Scene) -> Callable[[], Begun]:
    """`xl create` of a guest that joins a region another guest has filled."""
    _, region = scene.owner()
    entry = Entry(region, scene.host.at, SIZE, "borrower")
    guest = scene.guest("second", entry, do="check,stay", slot=1)
    return lambda: created(scene, guest, r"checked pages=16 bad=0 seed=7")


def created(scene: Scene, guest: Guest, says: str) -> Begun:
    """It is made with its regions; or, seen too late to be held, without them, and that is said.

    Without them it runs into what is not there, on Arm, and may be gone before anybody can say so.
    """
    host, since = scene.host, scene.host.mark
    creating = host.start_creating(guest)
    scene.guests.append(guest)

    def is_over() -> bool:
        if any(re.fullmatch(says, line) for line in host.said(guest)):
            return True
        log = host.log(since)
        if any(line.startswith("fault") for line in host.said(guest)):
            return f"memory granted guest='{guest.name}'" not in log
        alone = rf"(left alone|without its regions).*\bdomid={host.domid(guest)}\b"
        return re.search(alone, log) is not None

    def end() -> None:
        creating.wait(2 * WAIT_S, check=True)
        host.wait(is_over, f"{guest.name} has its region, or not")

    return end


def refuse(scene: Scene) -> Callable[[], Begun]:
    """`xl create` of a guest whose region nobody defines."""
    host = scene.host
    guest = scene.guest("refused", Entry(host.unique("none"), host.at, SIZE, "borrower"))

    def begin() -> Begun:
        creating = host.start_creating(guest)

        def end() -> None:
            creating.wait(2 * WAIT_S)
            host.wait_gone(guest)

        return end

    return begin


def destroy_one_of_two(scene: Scene) -> Callable[[], Begun]:
    """`xl destroy` of a member of a region that another goes on with."""
    _, region = scene.owner()
    entry = Entry(region, scene.host.at, SIZE, "borrower")
    goes = scene.up(scene.guest("goes", entry, slot=1))

    def end() -> None:
        scene.host.wait_gone(goes)
        assert scene.host.peek(region, 0, FILLED) == filled(7)

    return lambda: destroyed(scene, goes, end)


def destroy_the_last(scene: Scene) -> Callable[[], Begun]:
    """`xl destroy` of the only member: its region, holder and records go."""
    goes, _ = scene.owner()
    return lambda: destroyed(scene, goes, lambda: scene.host.wait_gone(goes))


def destroyed(scene: Scene, guest: Guest, end: Begun) -> Begun:
    """`xl destroy`, whose end is waited for so."""
    scene.host.dom0.spawn(["xl", "destroy", guest.name], timeout_s=2 * WAIT_S)
    return end


def reboot(scene: Scene) -> Callable[[], Begun]:
    """A guest reboots by itself, and finds its region with its contents."""
    host = scene.host
    guest = scene.guest("again", Entry(host.unique("kept"), host.at, SIZE), do="boots,reboot-once")

    def end() -> None:
        host.wait_said(guest, "boots=2")

    def begin() -> Begun:
        host.xl("unpause", guest.name)
        return end

    host.create(guest, "-p")
    scene.guests.append(guest)
    return begin


def add_region(scene: Scene) -> Callable[[], Begun]:
    """A region of the system's is made."""
    region = scene.host.unique("added")
    file = f"/run/{region}.toml"
    scene.host.dom0.put(file, f'[region.{region}]\nsize = "64 KiB"\n')
    scene.regions.append(region)
    return lambda: asked(scene, "create", file)


def attach_region(scene: Scene) -> Callable[[], Begun]:
    """A guest that runs is given a region."""
    host = scene.host
    region = host.unique("given")
    file = f"/run/{region}.toml"
    host.dom0.put(file, f'[region.{region}]\nsize = "64 KiB"\n')
    host.xshmctl("create", file)
    scene.regions.append(region)
    guest = scene.up(scene.guest("gets"))
    entry = f"id={region},begin={host.at:#x},size={SIZE:#x},role=borrower"
    return lambda: asked(scene, "attach", guest.name, entry)


def detach_region(scene: Scene) -> Callable[[], Begun]:
    """A region is withdrawn from a guest that runs, and has another."""
    begin = attach_region(scene)
    begin()()
    return lambda: asked(scene, "detach", scene.guests[-1].name, scene.regions[-1])


def remove_region(scene: Scene) -> Callable[[], Begun]:
    """A region that a guest has is withdrawn and freed."""
    begin = attach_region(scene)
    begin()()
    region = scene.regions.pop()
    return lambda: asked(scene, "remove", "--force", region)


def asked(scene: Scene, *words: str) -> Begun:
    """An admin asks for something."""
    running = scene.ask(*words)
    return lambda: scene.insist(running, *words)


OPERATIONS: tuple[Operation, ...] = (
    create_owner, create_borrower, refuse, destroy_one_of_two, destroy_the_last, reboot,
    add_region, attach_region, detach_region, remove_region,
)  # fmt: skip
