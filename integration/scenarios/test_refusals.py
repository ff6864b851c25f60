# SPDX-License-Identifier: LGPL-2.1-or-later
"""What cannot be given is refused: the guest does not run, and somebody is told why, and where."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from integration.scenarios.guest import MIB, PAGE, Entry, Guest
from integration.scenarios.host import Host

GIB = 1 << 30


@dataclass(frozen=True)
class Case:
    """A configuration that is wrong.

    Attributes:
        entries: its static_shm, for a machine and the id of a region nobody else has.
        phrase: what has to be said of it, a regular expression.
        index: the entry that is to blame.
        more: anything else of the guest (see `Guest`).
    """

    name: str
    entries: Callable[[Host, str], tuple[Entry, ...]]
    phrase: str
    index: int = 0
    more: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.name


def _one(at: int | None = None, size: int = MIB, role: str = "owner", more: str = "") -> Any:
    return lambda host, region: (Entry(region, host.at if at is None else at, size, role, more),)


def _in_ram(host: Host, region: str) -> tuple[Entry, ...]:
    return (Entry(region, 0x40400000 if host.arch == "arm64" else 0x400000),)


def _on_reserved(host: Host, region: str) -> tuple[Entry, ...]:
    return (Entry(region, 0x38000000 if host.arch == "arm64" else 0xFEE00000, PAGE),)


def _too_large(host: Host, region: str) -> tuple[Entry, ...]:
    return (Entry(region, host.at_large, 2 * GIB),)


def _overlapping(host: Host, region: str) -> tuple[Entry, ...]:
    return (Entry(region, host.at), Entry(f"{region}b", host.at + MIB - PAGE))


def _twice(host: Host, region: str) -> tuple[Entry, ...]:
    return (Entry(region, host.at), Entry(region, host.at + MIB))


CASES = (
    Case("in RAM", _in_ram, r"region '\w+' at 0x\w+-0x\w+ is inside the guest's RAM at 0x\w+"),
    Case("on a reserved range", _on_reserved, r"region '\w+' at .* is on the (grant table|local)"),
    Case("larger than free memory", _too_large, r"region '?\w+'? needs 2 GiB"),
    Case("undefined region", _one(role="borrower"), r"borrows region '\w+', which nobody defines"),
)
# What is wrong with these has nothing to do with the machine.
CASES_ALIKE = (
    Case("unknown key", _one(more="colour=red"), "unknown key 'colour'"),
    Case("unaligned size", _one(size=0x1001), r"size=0x1001 is not a multiple of 4 KiB"),
    Case("size zero", _one(size=0), "size=0: a region has at least one page"),
    Case("prot=ro", _one(more="prot=ro"), r"asks for prot=ro, which Xen cannot enforce"),
    Case("overlapping", _overlapping, r"region '\w+' at .* overlaps region '\w+' at", 1),
    Case("same id twice", _twice, r"region '\w+' is already in static_shm\[0\]", 1),
)
X86_CASES = (
    Case("PV", _one(), "is a PV guest", more=(("type", "pv"), ("linux", True))),
    Case("altp2m", _one(), "has altp2m", more=(("lines", ('altp2m = "external"',)),)),
)
# The Xen of the rig makes no such domain, so plain `xl create` fails before anybody can see one.
# (And each time it refuses hap=0, it loses two pages by itself: that one is not even tried.)
X86_CASES_XEN_REFUSES_TOO = (
    Case("hap=0", _one(), "has hap=0", more=(("lines", ("hap = 0",)),)),
    Case("nested HVM", _one(), "has nestedhvm=1", more=(("lines", ("nestedhvm = 1",)),)),
)


def _guest(host: Host, case: Case) -> tuple[Guest, str]:
    """The guest of a case, and how a message about it begins."""
    entries = case.entries(host, host.unique("bad"))
    guest = host.guest("refused", *entries, **dict(case.more))
    line = guest.entry_line(case.index)
    place = f"{host.config_path(guest)}:{line}: static_shm[{case.index}]: "
    return guest, re.escape(place)


def _assert_xl_create_fails(host: Host, *wrong: tuple[Guest, str]) -> None:
    """Of each guest it fails, and the log says so in a sentence; then nothing of any is left."""
    nodes: list[str] = []
    for guest, sentence in wrong:
        since = host.mark
        done = host.create(guest, check=False)
        assert done.status != 0, done.describe()
        assert host.domid(guest) is None
        host.wait_log(rf"guest refused guest='{guest.name}'", since)
        refusals = host.refusals(since)
        assert [name for name, _ in refusals] == [guest.name]
        reason = refusals[0][1]
        assert re.match(sentence, reason), f"{reason!r} does not begin with {sentence!r}"
        assert "\n" not in reason
        domid = re.search(rf"guest='{guest.name}' domid=(\d+)", host.log(since))
        assert domid is not None
        nodes += [f"/local/domain/{domid[1]}", f"/libxl/{domid[1]}"]
    for node in nodes:
        host.wait_node_gone(node)


def _wrong(host: Host, case: Case) -> tuple[Guest, str]:
    """The guest of a case, and what is said of it."""
    guest, place = _guest(host, case)
    return guest, place + ".*" + case.phrase


@pytest.mark.alike
@pytest.mark.parametrize("case", CASES, ids=str)
def test_xl_create_fails(host: Host, case: Case) -> None:
    """Plain `xl create` of what cannot be given fails, the domain is gone without a trace, and the
    log says in one sentence why, with file, line and entry."""
    _assert_xl_create_fails(host, _wrong(host, case))


@pytest.mark.alike
def test_xl_create_of_what_is_wrong_in_itself(host: Host) -> None:
    """So it does for configurations that no machine could give; one after the other, as what libxl
    leaves of them is left alone for ten seconds."""
    _assert_xl_create_fails(host, *(_wrong(host, case) for case in CASES_ALIKE))


@pytest.mark.arch("x86_64")
@pytest.mark.parametrize("case", X86_CASES, ids=str)
def test_xl_create_fails_x86(host: Host, case: Case) -> None:
    """Guests that Xen can make and that cannot have foreign memory."""
    _assert_xl_create_fails(host, _wrong(host, case))


@pytest.mark.arch("arm64")
def test_grants_under_silo(host: Host, noted_xl: str) -> None:
    """Xen on Arm lets guests map grants of dom0 alone, unless its command line says otherwise."""
    region = Entry(host.unique("bad"), host.at, more="transport=grant")
    guest = host.guest("refused", region)
    sentence = ".*but this Xen runs with silo, its own choice, and lets guests map grants of dom0"
    _assert_xl_create_fails(host, (guest, sentence))
    since = host.mark
    done = host.xshmctl("create", host.config_path(guest), check=False, env={"PATH": noted_xl})
    assert done.status == 5, done.describe()
    assert "hint: boot Xen with xsm=dummy" in done.stderr.decode()
    assert "holder created" not in host.log(since)


@pytest.fixture
def noted_xl(host: Host) -> str:
    """A PATH on which an `xl` first notes that it was run."""
    script = '#!/bin/sh\n[ "$1" = create ] && echo ran >> /run/xl-ran\nexec /usr/sbin/xl "$@"\n'
    host.dom0.run("rm -f /run/xl-ran")
    host.dom0.put("/run/noted/xl", script, 0o755)
    return "/run/noted:/usr/sbin:/usr/bin:/sbin:/bin"


def _assert_xshmctl_refuses(host: Host, path: str, guest: Guest, sentence: str) -> None:
    since = host.mark
    done = host.xshmctl("create", host.config_path(guest), check=False, env={"PATH": path})
    assert done.status == 5, done.describe()
    assert done.stdout == b""
    said = done.stderr.decode()
    assert re.match(r"xshmctl: " + sentence, said), said
    assert re.search(r"^hint: \S", said, re.M), said
    ran = host.dom0.run(["test", "-e", "/run/xl-ran"], check=False)
    assert ran.status == 1, f"xl was run:\n{said}"
    assert host.domid(guest) is None
    assert "Traceback" not in host.log(since)


@pytest.mark.alike
@pytest.mark.parametrize("case", CASES + CASES_ALIKE, ids=str)
def test_xshmctl_create_refuses(host: Host, noted_xl: str, case: Case) -> None:
    """`xshmctl create` says the same on the caller's terminal, with a hint, and runs no xl."""
    _assert_xshmctl_refuses(host, noted_xl, *_wrong(host, case))


@pytest.mark.arch("x86_64")
@pytest.mark.parametrize("case", X86_CASES + X86_CASES_XEN_REFUSES_TOO, ids=str)
def test_xshmctl_create_refuses_x86(host: Host, noted_xl: str, case: Case) -> None:
    """So it does for what only x86 has."""
    _assert_xshmctl_refuses(host, noted_xl, *_wrong(host, case))


@pytest.mark.alike
def test_two_owners(host: Host, noted_xl: str) -> None:
    """A second guest that defines a region which a first one has is refused, either way, and the
    first goes on."""
    region = host.unique("demo")
    first = host.guest("first", Entry(region, host.at), do="fill,beat")
    second = host.guest("second", Entry(region, host.at), do="fill", slot=1)
    host.create(first)
    host.wait_said(first, "filled .*")
    place = re.escape(f"{host.config_path(second)}:{second.entry_line(0)}: static_shm[0]: ")
    sentence = place + f"region '{region}' has two owners"
    _assert_xl_create_fails(host, (second, sentence))
    _assert_xshmctl_refuses(host, noted_xl, second, sentence)
    assert [member["guest"] for member in host.region(region)["members"]] == [first.name]
    host.destroy(first)


@pytest.mark.alike
def test_owner_of_another_size(host: Host) -> None:
    """A region keeps its size while it exists: its owner, back with another one, is refused."""
    region = host.unique("demo")
    owner = host.guest("owner", Entry(region, host.at), do="beat")
    borrower = host.guest("borrower", Entry(region, host.at, role="borrower"), slot=1)
    host.create(owner)
    host.create(borrower)
    host.destroy(owner)
    host.wait(lambda: len(host.guests()) == 1, "the owner is forgotten")
    larger = Guest(owner.name, host.arch, (Entry(region, host.at, 2 * MIB),))
    host.dom0.put(host.config_path(larger), larger.config())
    _assert_xl_create_fails(host, (larger, ".*is to have 2 MiB, but it exists with 1 MiB"))
    host.destroy(borrower)


@pytest.mark.alike
def test_offset_beyond_the_end(host: Host) -> None:
    """A borrower can only have what the region has."""
    region = host.unique("demo")
    owner = host.guest("owner", Entry(region, host.at), do="beat")
    host.create(owner)
    beyond = host.guest("beyond", Entry(region, host.at, MIB, "borrower", "offset=0x1000"))
    _assert_xl_create_fails(host, (beyond, ".*ends at offset 0x101000 of the region, but"))
    host.destroy(owner)


@pytest.mark.alike
def test_refused_guest_kept_for_a_look(host: Host) -> None:
    """With --on-failure=keep-paused the guest is not destroyed, and does not run either."""
    guest = host.guest("kept", Entry(host.unique("bad"), host.at, role="borrower"))
    with host.daemon_with("--on-failure", "keep-paused"):
        since = host.mark
        host.create(guest)
        host.wait_log(rf"guest refused guest='{guest.name}'", since)
        domid = host.domid(guest)
        assert domid is not None
        info = host.domain(domid)
        assert info is not None
        assert info["paused"]
        assert info["cpu_time_ns"] == 0
        host.destroy(guest)
        host.wait(lambda: not host.guests(), "it is forgotten")
