# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on what promises more than plain memory: sealed, granted, lent, with doorbells."""

from __future__ import annotations

from collections.abc import Callable

from integration.crash.operations import SIZE, Begun, Operation, Scene, asked, created, destroyed
from integration.scenarios.guest import Entry, Guest, filled
from integration.scenarios.host import add, attach

CHECKED = r"checked pages=16 bad=0 seed=7"
FILL_WORD = 64 // 8
"""Which 64-bit word of a region says that it is filled."""


def _sealed_owner(scene: Scene) -> tuple[Guest, str]:
    """A guest that has filled its sealed region, which nobody can see in the holder."""
    region = scene.host.unique("sealed")
    entry = Entry(region, scene.host.at, SIZE, more="isolation=sealed")
    guest = scene.up(scene.guest("owner", entry, do="fill,stay"))
    scene.host.wait_said(guest, "filled .*")
    return guest, region


def _is_filled(scene: Scene, region: str) -> bool:
    words = ["--offset", str(8 * FILL_WORD), "--length", "8"]
    data = scene.host.xshmctl("dump", *words, region).stdout
    return int.from_bytes(data, "little") == filled(7)


def _second(scene: Scene, region: str) -> Guest:
    entry = Entry(region, scene.host.at, SIZE, "borrower")
    return scene.guest("second", entry, do="check,stay", slot=1)


def join_sealed(scene: Scene) -> Callable[[], Begun]:
    """A guest joins a sealed group: both stand still while all pages are exchanged."""
    _, region = _sealed_owner(scene)
    guest = _second(scene, region)

    def begin() -> Begun:
        end = created(scene, guest, CHECKED)

        def whole() -> None:
            end()
            assert _is_filled(scene, region)

        return whole

    return begin


def leave_sealed(scene: Scene) -> Callable[[], Begun]:
    """One of a sealed group is destroyed: the other gets pages that it never had."""
    _, region = _sealed_owner(scene)
    goes = scene.up(_second(scene, region))
    scene.host.wait_said(goes, CHECKED)

    def end() -> None:
        scene.host.wait_gone(goes)
        assert _is_filled(scene, region)

    return lambda: destroyed(scene, goes, end)


def reboot_sealed(scene: Scene) -> Callable[[], Begun]:
    """The only member reboots: for a moment nobody but the keeper has what is in the region."""
    host = scene.host
    entry = Entry(host.unique("sealed"), host.at, SIZE, more="isolation=sealed")
    guest = scene.guest("again", entry, do="boots,reboot-once")

    def end() -> None:
        host.wait_said(guest, "boots=2")

    def begin() -> Begun:
        host.xl("unpause", guest.name)
        return end

    host.create(guest, "-p")
    scene.guests.append(guest)
    return begin


def _of_the_system(scene: Scene, name: str, **terms: object) -> str:
    region = scene.host.unique(name)
    change = add(region, SIZE)
    change["add"]["terms"] = terms
    scene.host.apply(change)
    scene.regions.append(region)
    return region


def _given(scene: Scene, region: str) -> str:
    return f"id={region},begin={scene.host.at:#x},size={SIZE:#x},role=borrower"


def create_granted(scene: Scene) -> Callable[[], Begun]:
    """A new guest is given grant references."""
    host, region = scene.host, _of_the_system(scene, "granted", transport="grant")
    guest = scene.guest("granted", Entry(region, host.at, SIZE, "borrower"))
    return lambda: created(scene, guest, "hello .*")


def attach_granted(scene: Scene) -> Callable[[], Begun]:
    """A guest that runs is given grant references."""
    region = _of_the_system(scene, "granted", transport="grant")
    guest = scene.up(scene.guest("gets"))
    return lambda: asked(scene, "attach", guest.name, _given(scene, region))


def detach_granted(scene: Scene) -> Callable[[], Begun]:
    """Grant references are withdrawn from a guest that runs."""
    attach_granted(scene)()()
    return lambda: asked(scene, "detach", scene.guests[-1].name, scene.regions[-1])


def create_lent(scene: Scene) -> Callable[[], Begun]:
    """A new guest is lent dom0's own memory, which the keeper has."""
    host, region = scene.host, _of_the_system(scene, "lent", transport="grant", backing="dom0")
    guest = scene.guest("borrows", Entry(region, host.at, SIZE, "borrower"))
    return lambda: created(scene, guest, "hello .*")


def detach_lent(scene: Scene) -> Callable[[], Begun]:
    """It is withdrawn from a guest that runs; what is in it stays, on other pages."""
    host, region = scene.host, _of_the_system(scene, "lent", transport="grant", backing="dom0")
    guest = scene.up(scene.guest("borrows"))
    host.apply(attach(guest, region, host.at, SIZE))
    host.dom0.run(f"printf kept | xshmctl load {region}")

    def begin() -> Begun:
        end = asked(scene, "detach", guest.name, region)

        def whole() -> None:
            end()
            assert host.xshmctl("dump", "--length", "4", region).stdout == b"kept"

        return whole

    return begin


def join_doorbells(scene: Scene) -> Callable[[], Begun]:
    """A guest joins one with doorbells: each has a port for the other, and they ring."""
    host, region = scene.host, scene.host.unique("bells")
    waits = scene.up(
        scene.guest("zero", Entry(region, host.at, SIZE, more="doorbells=3"), do="peers,bell-pong")
    )
    joins = scene.guest(
        "one", Entry(region, host.at, SIZE, "borrower"), do="peers,bell-ping", slot=1
    )

    def begin() -> Begun:
        end = created(scene, joins, r"bell-ping rounds=100 .*")

        def whole() -> None:
            end()
            if any(line.startswith("bell-ping") for line in host.said(joins)):
                host.wait_said(waits, r"bell-pong rounds=100 .*")

        return whole

    return begin


def leave_doorbells(scene: Scene) -> Callable[[], Begun]:
    """One of two with doorbells is destroyed: its ports are the next one's."""
    begin = join_doorbells(scene)
    begin()()
    goes = scene.guests[-1]
    return lambda: destroyed(scene, goes, lambda: scene.host.wait_gone(goes))


PROMISES: tuple[Operation, ...] = (
    join_sealed, leave_sealed, reboot_sealed, create_granted, attach_granted, detach_granted,
    create_lent, detach_lent, join_doorbells, leave_doorbells,
)  # fmt: skip
