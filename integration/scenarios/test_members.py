# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a member's kernel can do to its holder by itself, in an open group and in a sealed one.

Root of a Linux guest asks Xen for what nobody but a kernel could ask for.  What is refused is what
is promised; what is not is what the README says is not.
"""

from __future__ import annotations

import errno
import itertools
import signal

import pytest

from integration.scenarios.guest import MIB, Entry, Guest, tag
from integration.scenarios.host import Host, detach, remove

ANCHOR_GFN = 0x40000
NR_PAGES = 2 * 256 + 1
"""What a holder has in these scenarios: two regions, and its anchor."""
NR_EXTENTS = 8
"""Frames asked for one by one, at places in the holder."""
_numbers = itertools.count(1)


class Member:
    """A Linux guest that is asked to do what it should not."""

    def __init__(self, host: Host, guest: Guest) -> None:
        self._host, self._guest = host, guest
        self._domid = host.domid(guest)

    def ask(self, verb: str, *numbers: int) -> int:
        """What Xen answered: a negative errno, or something done."""
        return int(self._say(verb, *numbers))

    def look(self, address: int) -> int:
        """The word at an address of the guest."""
        return int(self._say("look", address), 0)

    def store(self, address: int, word: int) -> None:
        """Write the word at an address of the guest."""
        assert self._say("store", address, word) == "0"

    def _say(self, *words: object) -> str:
        number = next(_numbers)
        node = f"/local/domain/{self._domid}/data/member"
        text = " ".join(map(str, (number, *words)))
        self._host.dom0.run(["xenstore-write", node, text])
        return self._host.wait_said(self._guest, rf"member {number}: .*").partition(": ")[2]


def make_group(host: Host, more: str = "") -> tuple[Guest, Guest, Member, str, str]:
    """A group of two regions: an owner has both, a Linux guest one of them, to read at the most."""
    own, other = host.unique("own"), host.unique("other")
    advisory = ", ".join(("prot_enforcement=advisory", *filter(None, [more])))
    owner = host.guest(
        "owner", Entry(own, host.at, more=advisory), Entry(other, host.at_elsewhere, more=more),
        do="fill:1",
    )  # fmt: skip
    linux = host.guest(
        "member", Entry(own, host.at, role="borrower", more="prot=ro"), do="member", linux=True,
        slot=1,
    )  # fmt: skip
    host.create(owner)
    host.wait_said(owner, "filled .*")
    host.create(linux)
    return owner, linux, Member(host, linux), own, other


def hole(host: Host) -> int:
    """An address at which the Linux guest has nothing."""
    return host.at + 16 * MIB


def check_the_rest(host: Host, member: Member, holder: int) -> None:
    """What is refused in either kind of group, and the holder as Xen shows it."""
    assert member.ask("port", holder) == -errno.ENOSPC
    if host.arch == "x86_64":
        assert member.ask("ioreq-server", holder) == -errno.ENOSPC
    assert member.ask("grant-frame", holder, 1, hole(host) >> 12) < 0
    assert member.ask("grant-table", holder, 2) < 0
    for _ in range(NR_EXTENTS):
        gfn = ANCHOR_GFN + 0x100000 + next(_numbers)
        assert member.ask("populate", holder, gfn) == 0
        assert member.ask("increase", holder, gfn) == 0
    found = host.domain(holder)
    assert found is not None
    assert found["uuid"] == host.regions()[0]["holderUuid"]
    assert found["paused"]
    assert found["max_pages"] == 0
    assert found["tot_pages"] == NR_PAGES
    assert found["max_vcpu_id"] == 0


@pytest.mark.counts_as(2)
def test_an_open_group_is_one_of_trust(host: Host) -> None:
    """The members of an open group can reach, and take from its holder, whatever is in it: what the
    README says they can.  What was taken is noticed."""
    owner, linux, member, own, other = make_group(host)
    region = host.region(other)
    holder, gfn, at = region["holderDomainId"], region["holderFirstFrame"], hole(host)
    assert member.ask("map", holder, gfn + 1, at >> 12) == 0
    assert member.look(at + 8) == tag(1, 7)
    assert member.ask("unmap", holder, at >> 12) == 0
    check_the_rest(host, member, holder)
    # What it was given to read it maps again and writes.
    assert member.ask("map", holder, host.region(own)["holderFirstFrame"] + 1, at >> 12) == 0
    member.store(at + 16, 0x5EC2E7)
    assert host.peek(own, 1, 16) == 0x5EC2E7
    since = host.mark
    assert member.ask("free", holder, gfn + 2) == 1
    assert member.ask("hide", holder, gfn + 3) == 0
    assert host.ask("populated", holder, [gfn + 1, gfn + 2, gfn + 3]) == [gfn + 1]
    late = host.guest("late", Entry(other, host.at, role="borrower"))
    assert host.create(late, check=False).status
    ((name, reason),) = host.refusals(since)
    assert name == late.name
    assert "refused to map" in reason
    since = host.mark
    host.apply(remove(own, force=True))
    assert member.look(at + 16) == 0, "what a member keeps is wiped"
    host.wait_log("holder suspect .*why='4 KiB of regions that were freed is still there", since)
    host.destroy(owner, linux)
    host.wait(lambda: not host.regions(), f"{own} and {other} are gone")


@pytest.mark.counts_as(2)
def test_a_sealed_group_is_not(host: Host) -> None:
    """In a sealed group there is nothing to reach: no region of others, no second map of its own,
    nothing to free or to hide, while it is joined to and while it stands."""
    owner, linux, member, own, other = make_group(host, "isolation=sealed")
    at = hole(host)
    for region_id in (own, other):
        region = host.region(region_id)
        holder, first = region["holderDomainId"], region["holderFirstFrame"]
        for gfn in (first, first + 1, first + region["frameCount"] - 1):
            assert member.ask("map", holder, gfn, at >> 12) == -errno.EINVAL
            assert member.ask("free", holder, gfn) == 0
            assert member.ask("hide", holder, gfn) == -errno.ENOENT
            assert host.ask("populated", holder, [gfn]) == []
    check_the_rest(host, member, holder)
    # Its own region again, at another frame, through its own p2m: not even that.
    late = host.guest("late", Entry(other, host.at, role="borrower"), do="check", slot=2)
    host.create(late)
    host.wait_said(late, "checked pages=256 bad=0 seed=7")
    assert member.ask("map", holder, host.region(other)["holderFirstFrame"], at >> 12) < 0
    host.apply(detach(linux, own))
    found = host.domain(holder)
    assert found is not None
    assert found["tot_pages"] == NR_PAGES, "what was taken from it is free"
    host.destroy(owner, linux, late)


@pytest.mark.alike
def test_what_a_member_does_to_a_sealed_holder_is_noticed(host: Host) -> None:
    """The anchor is all there is to take; who takes it is told of, and has changed nothing: not
    even a new daemon takes the group for lost."""
    owner, linux, member, own, second = make_group(host, "isolation=sealed")
    holder = host.region(own)["holderDomainId"]
    since = host.mark
    assert member.ask("free", holder, ANCHOR_GFN) == 1
    other = host.guest("other")
    host.create(other)  # any guest's coming has the daemon look
    host.wait_log(r"holder suspect .*why='its anchor was taken out of it", since)
    host.stop_daemon(signal.SIGKILL)
    host.start_daemon()
    late = host.guest("late", Entry(second, host.at, role="borrower"), do="check", slot=2)
    host.create(late)
    host.wait_said(late, "checked pages=256 bad=0 seed=7")
    host.destroy(owner, linux, other, late)
