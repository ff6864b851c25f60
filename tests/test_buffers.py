# SPDX-License-Identifier: LGPL-2.1-or-later
"""Buffers and the memory in them: whatever is asked for in whatever order, none of it overlaps,
none of it is lost, and what is not somebody's is refused by its name.

What Xen does with them is shown by ``contract/cases/buffers.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fakes.hypercalls import FakeMemory, SimulatedCalls
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xshmd.errors import (
    AlreadyFreed,
    BufferBusy,
    ForeignBuffer,
    NoSuchBuffer,
    OutOfMemory,
    OutOfRange,
    QuotaExceeded,
    UsageError,
    XshmError,
)
from xshmd.units import PAGE_SIZE
from xshmd.xen.buffers import (
    ALIGN_BYTES,
    MAX_BUFFER_PAGES,
    BufferId,
    Buffers,
    Limits,
    MemRef,
    Owner,
    pages_for,
)
from xshmd.xen.safe_calls import SAFE_CALLS, make_safe_call

LIMITS = Limits(total_pages=12, pages_per_owner=8, buffers_per_owner=3, pieces_per_buffer=4)


@pytest.fixture
def memory() -> FakeMemory:
    return FakeMemory()


@pytest.fixture
def buffers(memory: FakeMemory) -> Buffers:
    return Buffers(memory, LIMITS)


@pytest.fixture
def owner(buffers: Buffers) -> Owner:
    return buffers.owner("one")


def test_a_reference_names_its_buffer(owner: Owner) -> None:
    first, second = owner.alloc_buf(1), owner.alloc_buf(1)
    for buffer in (first, second):
        assert owner.alloc_mem(buffer, 8) >> 32 == buffer
        assert owner.alloc_mem(buffer, 8) & 0xFFFFFF == ALIGN_BYTES


def test_the_largest_buffer_fits_its_references() -> None:
    owner = Buffers(FakeMemory(), Limits(total_pages=1 << 16, pages_per_owner=1 << 16)).owner("a")
    buffer = owner.alloc_buf(MAX_BUFFER_PAGES)
    size = MAX_BUFFER_PAGES * PAGE_SIZE
    owner.alloc_mem(buffer, size - ALIGN_BYTES)
    last = owner.alloc_mem(buffer, ALIGN_BYTES)
    owner.write(last, ALIGN_BYTES - 1, b"x")
    assert last & 0xFFFFFF == size - ALIGN_BYTES


UNKNOWN = BufferId(77)
UNKNOWN_REF = MemRef(77 << 32)


@pytest.mark.parametrize(
    "use",
    [
        lambda one: one.alloc_mem(UNKNOWN, 1),
        lambda one: one.free_buf(UNKNOWN),
        lambda one: one.free_buf(BufferId(0)),
        lambda one: one.free_buf(BufferId(-1)),
        lambda one: one.free_mem(UNKNOWN_REF),
        lambda one: one.read(MemRef(-1), 0, 1),
        lambda one: one.write(MemRef(1 << 200), 0, b"x"),
        lambda one: one.use(UNKNOWN_REF).__enter__(),
    ],
)
def test_a_buffer_that_never_was(owner: Owner, use: Callable[[Owner], object]) -> None:
    with pytest.raises(NoSuchBuffer):
        use(owner)


def test_a_foreign_buffer_is_refused_and_unharmed(buffers: Buffers, owner: Owner) -> None:
    other = buffers.owner("other")
    buffer = owner.alloc_buf(1)
    reference = owner.alloc_mem(buffer, 8)
    owner.write(reference, 0, b"mine")
    uses: list[Callable[[], Any]] = [
        lambda: other.alloc_mem(buffer, 1),
        lambda: other.free_buf(buffer),
        lambda: other.free_mem(reference),
        lambda: other.read(reference, 0, 1),
        lambda: other.write(reference, 0, b"x"),
        lambda: other.use(reference).__enter__(),
    ]
    for use in uses:
        with pytest.raises(ForeignBuffer):
            use()
    assert owner.read(reference, 0, 4) == b"mine"


def test_a_double_free_and_a_late_use(owner: Owner) -> None:
    buffer = owner.alloc_buf(1)
    reference = owner.alloc_mem(buffer, 8)
    owner.free_mem(reference)
    for use in (owner.free_mem, lambda ref: owner.read(ref, 0, 1)):
        with pytest.raises(AlreadyFreed):
            use(reference)
    owner.free_buf(buffer)
    for again in (owner.free_buf, lambda buf: owner.alloc_mem(buf, 1)):
        with pytest.raises(AlreadyFreed):
            again(buffer)
    with pytest.raises(AlreadyFreed):
        owner.free_mem(reference)


def test_a_reference_comes_again_after_256_allocations_and_no_sooner(owner: Owner) -> None:
    buffer = owner.alloc_buf(1)
    references = []
    for _ in range(257):
        references.append(owner.alloc_mem(buffer, 8))
        owner.free_mem(references[-1])
    assert len(set(references[:256])) == 256
    assert references[256] == references[0]


def test_an_invented_reference(owner: Owner) -> None:
    buffer = owner.alloc_buf(1)
    reference = owner.alloc_mem(buffer, 200)
    for invented in (reference + ALIGN_BYTES, reference + 1, reference + (1 << 24)):
        with pytest.raises(OutOfRange):
            owner.read(MemRef(invented), 0, 1)


@pytest.mark.parametrize(
    ("offset", "count"), [(0, 101), (100, 1), (-1, 1), (1 << 64, 1), (0, -1), (99, 1 << 64)]
)
def test_outside_of_the_memory(owner: Owner, offset: int, count: int) -> None:
    reference = owner.alloc_mem(owner.alloc_buf(1), 100)
    with pytest.raises(OutOfRange):
        owner.read(reference, offset, count)
    if 0 < count < 1000:
        with pytest.raises(OutOfRange):
            owner.write(reference, offset, bytes(count))


def test_busy_is_busy_for_everything(owner: Owner) -> None:
    buffer = owner.alloc_buf(1)
    reference, idle = owner.alloc_mem(buffer, 8), owner.alloc_mem(buffer, 8)
    uses: list[Callable[[], Any]] = [
        lambda: owner.free_buf(buffer),
        lambda: owner.free_mem(reference),
        lambda: owner.read(reference, 0, 1),
        lambda: owner.write(reference, 0, b"x"),
        lambda: owner.use(reference).__enter__(),
    ]
    with owner.use(reference):
        for use in uses:
            with pytest.raises(BufferBusy):
                use()
        owner.write(idle, 0, b"y")
    for use in reversed(uses):
        use()


@pytest.mark.parametrize(
    ("wanted", "what"),
    [([4, 5], "pages of one"), ([1, 1, 1, 1], "buffers of one"), ([8, 1], "pages of one")],
)
def test_what_one_owner_may_have(
    buffers: Buffers, owner: Owner, wanted: list[int], what: str
) -> None:
    for nr_pages in wanted[:-1]:
        owner.alloc_buf(nr_pages)
    with pytest.raises(QuotaExceeded, match=what):
        owner.alloc_buf(wanted[-1])
    buffers.owner("other").alloc_buf(1)


def test_what_all_of_them_may_have(buffers: Buffers, owner: Owner) -> None:
    buffer, other = owner.alloc_buf(8), buffers.owner("other")
    other.alloc_buf(4)
    with pytest.raises(QuotaExceeded, match="pages of all buffers"):
        other.alloc_buf(1)
    owner.free_buf(buffer)
    other.alloc_buf(1)


@pytest.mark.parametrize("nr_pages", [0, -1, MAX_BUFFER_PAGES + 1, 1 << 64])
def test_no_buffer_has_so_many_pages(owner: Owner, nr_pages: int) -> None:
    with pytest.raises(OutOfRange):
        owner.alloc_buf(nr_pages)


def test_pieces_are_counted(owner: Owner) -> None:
    buffer = owner.alloc_buf(1)
    for _ in range(4):
        owner.alloc_mem(buffer, 1)
    with pytest.raises(QuotaExceeded, match="4 pieces"):
        owner.alloc_mem(buffer, 1)


@pytest.mark.parametrize("nr_bytes", [0, -1])
def test_no_bytes(owner: Owner, nr_bytes: int) -> None:
    with pytest.raises(OutOfRange):
        owner.alloc_mem(owner.alloc_buf(1), nr_bytes)


def test_an_owner_that_has_ended_gets_nothing(buffers: Buffers, memory: FakeMemory) -> None:
    owner = buffers.owner("one")
    buffer = owner.alloc_buf(2)
    owner.close()
    owner.close()
    assert memory.pages == {}
    assert buffers.nr_buffers == 0
    with pytest.raises(AlreadyFreed):
        owner.alloc_mem(buffer, 1)
    with pytest.raises(NoSuchBuffer):
        owner.alloc_buf(1)


def test_pages_stay_until_the_hypercall_has_returned(buffers: Buffers, memory: FakeMemory) -> None:
    owner = buffers.owner("one")
    buffer = owner.alloc_buf(1)
    first, second = owner.alloc_mem(buffer, 8), owner.alloc_mem(buffer, 8)
    with owner.use(first):
        with owner.use(second):
            owner.close()
        assert memory.nr_pages == 1
    assert memory.pages == {}


def test_dom0_without_memory_costs_nothing() -> None:
    buffers = Buffers(FakeMemory(total_pages=3), LIMITS)
    owner = buffers.owner("one")
    with pytest.raises(OutOfMemory):
        owner.alloc_buf(4)
    assert (buffers.nr_pages, buffers.nr_buffers) == (0, 0)
    assert owner.alloc_buf(3) == 1


@given(st.integers(1, 1 << 40))
def test_pages_for_is_enough_and_no_more(nr_bytes: int) -> None:
    assert (pages_for(nr_bytes) - 1) * PAGE_SIZE < nr_bytes <= pages_for(nr_bytes) * PAGE_SIZE


@pytest.mark.parametrize("name", SAFE_CALLS)
def test_a_call_has_memory_if_and_only_if_it_takes_some(name: str) -> None:
    calls = SimulatedCalls()
    owner = calls.buffers.owner("one")
    reference = owner.alloc_mem(owner.alloc_buf(1), 2048)
    wrong = None if SAFE_CALLS[name].size_bytes else reference
    with pytest.raises(UsageError):
        make_safe_call(calls, owner, name, wrong)
    owner.free_mem(reference)


@pytest.mark.parametrize("name", ["", "domctl", "memory_op", "VERSION", "platform_parameters"])
def test_no_other_call_is_made(name: str) -> None:
    calls = SimulatedCalls()
    with pytest.raises(UsageError, match="no hypercall that xshmd makes"):
        make_safe_call(calls, calls.buffers.owner("one"), name, None)


class AnyOrder(RuleBasedStateMachine):
    """Two owners allocate, fill and free; what each wrote is what each reads."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = FakeMemory()
        self.buffers = Buffers(self.memory, LIMITS)
        self.owners = [self.buffers.owner("a"), self.buffers.owner("b")]
        self.held: list[tuple[Owner, BufferId]] = []
        self.filled: dict[MemRef, tuple[Owner, bytes]] = {}

    @rule(who=st.integers(0, 1), nr_pages=st.integers(1, 5))
    def alloc_buf(self, who: int, nr_pages: int) -> None:
        try:
            self.held.append((self.owners[who], self.owners[who].alloc_buf(nr_pages)))
        except QuotaExceeded:
            own = [1 for owner, _ in self.held if owner is self.owners[who]]
            assert self.buffers.nr_pages + nr_pages > 8 or len(own) == 3

    @precondition(lambda self: self.held)
    @rule(data=st.data(), nr_bytes=st.integers(1, 3 * PAGE_SIZE), fill=st.integers(1, 255))
    def alloc_mem(self, data: st.DataObject, nr_bytes: int, fill: int) -> None:
        owner, buffer = data.draw(st.sampled_from(self.held))
        try:
            reference = owner.alloc_mem(buffer, nr_bytes)
        except QuotaExceeded:
            return
        assert reference not in self.filled
        assert not any(owner.read(reference, 0, nr_bytes))
        owner.write(reference, 0, bytes([fill]) * nr_bytes)
        self.filled[reference] = (owner, bytes([fill]) * nr_bytes)

    @precondition(lambda self: self.filled)
    @rule(data=st.data())
    def free_mem(self, data: st.DataObject) -> None:
        reference = data.draw(st.sampled_from(sorted(self.filled)))
        self.filled.pop(reference)[0].free_mem(reference)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free_buf(self, data: st.DataObject) -> None:
        owner, buffer = data.draw(st.sampled_from(self.held))
        owner.free_buf(buffer)
        self.held.remove((owner, buffer))
        self._forget(lambda reference: reference >> 32 == buffer)

    @rule(who=st.integers(0, 1))
    def end(self, who: int) -> None:
        ended, self.owners[who] = self.owners[who], self.buffers.owner("again")
        ended.close()
        self.held = [pair for pair in self.held if pair[0] is not ended]
        self._forget(lambda reference: self.filled[reference][0] is ended)

    def _forget(self, gone: Callable[[MemRef], bool]) -> None:
        for reference in [each for each in self.filled if gone(each)]:
            owner, _ = self.filled.pop(reference)
            with pytest.raises(XshmError):
                owner.read(reference, 0, 1)

    @invariant()
    def everybody_has_what_he_wrote(self) -> None:
        for reference, (owner, wanted) in self.filled.items():
            assert owner.read(reference, 0, len(wanted)) == wanted

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        assert self.memory.nr_pages == self.buffers.nr_pages <= LIMITS.total_pages
        assert self.buffers.nr_buffers == len(self.held)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
