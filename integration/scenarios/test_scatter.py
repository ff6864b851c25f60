# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that have different parts of a region exchange what each puts up; dom0 copies it.

And what else of dom0's memory serves others: hypercall buffers of the daemon's clients.
"""

from __future__ import annotations

from typing import Any

import pytest

from integration.scenarios.guest import FILLED, PAGE, Entry, filled
from integration.scenarios.host import Host, add, remove

PAGES = 16
PART = PAGES * PAGE


def bytes_at(offset: int, count: int) -> dict[str, int]:
    return {"offsetBytes": offset, "byteCount": count}


def ask(host: Host, method: str, **parameters: Any) -> dict[str, Any]:
    answer: dict[str, Any] = host.ask("call", method, parameters)
    return answer


def pair(host: Host, region: str, maker_does: str, taker_does: str) -> tuple[Any, Any]:
    """Two guests that have the two halves of a region of the system's, and run."""
    host.apply(add(region, 2 * PART))
    halves = [
        Entry(region, host.at, PART, "borrower", f"offset={half * PART:#x}") for half in (0, 1)
    ]
    maker = host.guest("maker", halves[0], do=maker_does)
    taker = host.guest("taker", halves[1], do=taker_does, slot=1)
    host.create(maker)
    host.create(taker)
    return maker, taker


def test_guests_with_different_parts_exchange_data(host: Host) -> None:
    """A bare-metal guest fills its half; by lists, and in odd pieces, it all gets into the other
    half, whose guest finds every word of it right - and not before it is told."""
    region = host.unique("halves")
    maker, taker = pair(host, region, "fill", "await-fill,check")
    host.wait_said(maker, "filled pages=16 seed=7")
    # All but the word by which the other guest knows that it is all there.
    room = [bytes_at(0, FILLED), bytes_at(FILLED + 8, 3 * PAGE), bytes_at(FILLED + 8 + 3 * PAGE,
            PART - FILLED - 8 - 3 * PAGE)]  # fmt: skip
    odd = [bytes_at(0, FILLED)]
    at = FILLED + 8
    for count in (1, 4095, 4097, 12289):
        odd.append(bytes_at(at, count))
        at += count
    odd.append(bytes_at(at, PART - at))
    first = ask(
        host, "RegisterList", region=region, guest=taker.name, direction="input", ranges=room
    )["list"]
    second = ask(
        host, "RegisterList", region=region, guest=taker.name, direction="input",
        ranges=[bytes_at(FILLED, 8)],
    )["list"]  # fmt: skip
    moved = ask(
        host, "Transfer", region=region, guest=maker.name, peer=taker.name, direction="output",
        ranges=odd,
    )  # fmt: skip
    assert moved["byteCount"] == PART - 8
    assert ask(host, "AwaitList", list=first, timeoutSeconds=0)["byteCount"] == PART - 8
    assert not any(line.startswith("checked") for line in host.said(taker))
    ask(
        host, "Transfer", region=region, guest=maker.name, peer=taker.name, direction="output",
        ranges=[bytes_at(FILLED, 8)], list=second,
    )  # fmt: skip
    host.wait_said(taker, f"checked pages={PAGES} bad=0 seed=7")
    assert host.peek(region, PAGES, FILLED) == filled(7)
    host.destroy(maker, taker)
    host.apply(remove(region))


def test_guests_ask_for_it_themselves(host: Host) -> None:
    """Two bare-metal guests and nobody else, once dom0 has opened their request pages: one posts
    a list and waits for its count, the other transfers, and every page arrives."""
    region = host.unique("halves")
    maker, taker = pair(host, region, "offer", "accept")
    for guest in (maker, taker):
        ask(host, "OpenRequestPage", region=region, guest=guest.name, offsetBytes=PART - PAGE)
    moved = (PAGES - 2) * PAGE
    host.wait_said(taker, r"posted list=\d+")
    host.wait_said(maker, f"offered bytes={moved}")
    host.wait_said(taker, f"accepted bytes={moved} bad=0")
    host.destroy(maker, taker)
    host.apply(remove(region))


@pytest.mark.alike
def test_lists_of_a_guest_that_leaves(host: Host) -> None:
    """A guest is destroyed with a list posted: who waits for it is told, nothing is written where
    it was, and what is asked for beyond a guest's own part is refused by name."""
    region = host.unique("halves")
    maker, taker = pair(host, region, "fill", "stay")
    host.wait_said(maker, "filled .*")
    posted = ask(
        host, "RegisterList", region=region, guest=taker.name, direction="input",
        ranges=[bytes_at(0, PART)], countOffsetBytes=None,
    )["list"]  # fmt: skip
    for offset, count in ((PART - 1, 2), (1 << 62, 1 << 62), (-1, 2)):
        for direction in ("input", "output"):
            with pytest.raises(AssertionError, match="OutOfRange"):
                ask(
                    host, "Transfer", region=region, guest=maker.name, peer=taker.name,
                    direction=direction, ranges=[bytes_at(offset, count)],
                )  # fmt: skip
    host.destroy(taker)
    with pytest.raises(AssertionError, match=rf"ListCancelled.*guest {taker.name} left"):
        ask(host, "AwaitList", list=posted, timeoutSeconds=60)
    with pytest.raises(AssertionError, match="NoSuch"):
        ask(
            host, "Transfer", region=region, guest=maker.name, peer=taker.name,
            direction="output", ranges=[bytes_at(0, PART)],
        )  # fmt: skip
    frames = host.region(region)
    taken = frames["holderDomainId"], frames["holderFirstFrame"] + PAGES, PAGES
    assert host.ask("nonzero_bytes", *taken) == 0
    host.destroy(maker)
    host.apply(remove(region))


HOLD = """
import sys
from xshmd.varlink.client import Client
client = Client()
memory = client.call("AllocateMemory", buffer=client.call(
    "AllocateBuffer", pageCount=5)["buffer"], byteCount=1024)["reference"]
client.call("CallXen", call="capabilities", reference=memory)
import base64
data = client.call("ReadMemory", reference=memory, offsetBytes=0, byteCount=1024)["data"]
print(base64.b64decode(data).decode().strip(chr(0)), flush=True)
sys.stdin.read()
"""


@pytest.mark.alike
def test_hypercall_buffers_of_a_client_that_is_killed(host: Host) -> None:
    """A client of the daemon has a hypercall buffer, has Xen fill it, and is killed: its pages are
    unmapped from the daemon, which had them from /dev/xen/hypercall."""

    def buffers() -> list[str]:
        maps = host.dom0.run(f"grep /dev/xen/hypercall /proc/{host.daemon_pid}/maps").text
        return sorted(line.split()[0] for line in maps.splitlines())

    before = buffers()
    heard = bytearray()
    client = host.dom0.spawn(
        ["python3", "-I", "-c", HOLD], stdin=True, on_output=lambda _, data: heard.extend(data)
    )
    host.wait(lambda: b"\n" in heard, "the client has its memory filled")
    wanted = host.dom0.run("xl info xen_caps").text.split()
    assert heard.decode().split() == wanted
    new = set(buffers()) - set(before)
    sizes = [int(end, 16) - int(start, 16) for start, end in (one.split("-") for one in new)]
    assert sizes == [5 * PAGE]
    client.kill(9)
    host.wait(lambda: buffers() == before, "its buffer is unmapped")


@pytest.mark.alike
def test_the_copy_itself_checks_every_range(host: Host) -> None:
    """A thousand pairs of lists, a third of them with offsets and lengths that no caller would let
    through: the C code copies what it should, or refuses all of it; nothing else is written."""
    done = host.dom0.run(
        ["python3", "-m", "tests.contract.copy_in_c", "1000"], cwd="/rig", check=False
    )
    assert done.status == 0, done.describe()
