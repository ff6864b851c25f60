# SPDX-License-Identifier: LGPL-2.1-or-later
"""dom0's memory in the order of its references, whatever that is in the kernel's file."""

from __future__ import annotations

import itertools
import mmap

import pytest

from xshmd.errors import XenUnavailable
from xshmd.units import PAGE_SIZE, DomId, bytes_of
from xshmd.xen import lending
from xshmd.xen.lending import LendingCalls, LentMemory


@pytest.mark.parametrize("made", list(itertools.permutations((8, 9, 12))))
def test_frames_are_in_the_order_of_their_references(made: tuple[int, ...]) -> None:
    view = mmap.mmap(-1, bytes_of(3))
    memory = LentMemory(view, made)
    assert memory.refs == (8, 9, 12)
    text = bytes(itertools.islice(itertools.cycle(range(251)), bytes_of(3)))
    memory.write(0, text)
    assert memory.read(0, bytes_of(3)) == text
    assert memory.read(PAGE_SIZE - 5, PAGE_SIZE + 10) == text[PAGE_SIZE - 5 : 2 * PAGE_SIZE + 5]
    for frame, ref in enumerate(memory.refs):
        at = bytes_of(made.index(ref))
        assert view[at : at + PAGE_SIZE] == text[bytes_of(frame) : bytes_of(frame + 1)]
    memory.wipe()
    assert not any(view[:])
    for offset, count in ((-1, 1), (0, bytes_of(3) + 1), (bytes_of(3), 1)):
        with pytest.raises(ValueError, match="outside"):
            memory.read(offset, count)
    memory.close()
    memory.close()


def test_the_call_is_that_of_the_header() -> None:
    """include/uapi/xen/gntalloc.h: _IOC(_IOC_NONE, 'G', 5, 24)."""
    assert lending.ALLOC_GREF == 0x184705


def test_a_kernel_that_cannot(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(lending, "DEVICE", f"{tmp_path}/gntalloc")
    with pytest.raises(XenUnavailable, match="cannot open") as caught:
        LendingCalls().lend_pages(DomId(1), 1, readonly=False)
    assert caught.value.hint == "modprobe xen-gntalloc"
