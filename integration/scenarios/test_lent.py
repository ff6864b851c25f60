# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory of dom0's own, lent to a Linux guest: under Arm's SILO too, where no other grants go."""

from __future__ import annotations

import hashlib
import re
import signal

import pytest

from integration.scenarios.guest import MIB, PAGE, Entry
from integration.scenarios.host import Host, add, detach, remove
from integration.scenarios.test_guest_to_guest import REFUSED, SEED

SIZE = 40 * PAGE


def lent(region: str, size: int = SIZE) -> dict[str, object]:
    """A change: make a region of dom0's own memory."""
    made = add(region, size)
    made["add"]["terms"] = {"backing": "dom0", "transport": "grant"}
    return made


def dumped(host: Host, region: str, offset: int = 0) -> int:
    words = ["--offset", str(offset), "--length", "8"]
    return int.from_bytes(host.xshmctl("dump", *words, region).stdout, "little")


@pytest.mark.counts_as(2)
def test_a_guest_maps_memory_of_dom0s(host: Host) -> None:
    """It writes the one region and reads the other; it reboots, the daemon is killed, the region is
    taken from it: what is in it is there for dom0, and for the next."""
    own, look = host.unique("own"), host.unique("look")
    assert "whose kernel lends 4 MiB in all" in host.refused(lent(own, 5 * MIB))
    host.apply(lent(own), lent(look))
    host.dom0.run(f"printf '\\{SEED}\\0\\0\\0' | xshmctl load {look}")
    guest = host.guest(
        "borrows",
        Entry(own, host.at, SIZE, role="borrower"),
        Entry(look, host.at + MIB, SIZE, role="borrower", more="prot=ro"),
        linux=True, shm="", seed=SEED,
        do=f"granted-once:{own},granted-list,granted-await:{look},granted-get:{look},"
        f"granted-try:{look},granted-sum:{look},granted-hold:{own}",
    )  # fmt: skip
    host.create(guest)
    host.wait_said(guest, "reboot")
    host.wait_said(guest, f"got {SEED:#x}")
    told = host.wait_said(guest, rf"{own} begin=.*")
    assert re.search(r"backing=dom0 .*grants=0:\d+\+\d+", told), told
    host.wait_said(guest, r"xshm-guest: Xen refuses references .* to be written: Invalid argument")
    host.wait_said(guest, REFUSED[host.arch])
    content = SEED.to_bytes(4, "little") + bytes(SIZE - 4)
    host.wait_said(guest, f"sum {hashlib.md5(content).hexdigest()} of {look}")
    host.wait_said(guest, f"mapped {own} rw {SIZE}", times=3)  # the last holds it
    assert host.region(own)["holderDomainId"] is None, "no holder is made for it"
    assert dumped(host, own) == SEED
    host.stop_daemon(signal.SIGKILL)
    host.start_daemon()
    assert dumped(host, own) == SEED
    since, second = host.mark, host.guest("second", Entry(own, host.at, SIZE, role="borrower"))
    assert host.create(second, check=False).status
    host.wait_log(r"guest refused .*rule=\['lent-to-one'\]", since)
    host.apply(detach(guest, own))
    assert dumped(host, own) == SEED
    host.destroy(guest)
    assert "memory of dom0, lent to one guest at a time" in host.xshmctl("show", own).text
    host.apply(remove(own), remove(look))
    assert host.regions() == []
