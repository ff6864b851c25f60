# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hypercall buffers on the memory and hypercalls there are: the four problems, each solved.

The problems are those for which registered buffers were once given up: users who disturb one
another, data that span pages, a size that must be known beforehand, and processes that die.
"""

from __future__ import annotations

import errno
import threading
import uuid
from pathlib import Path
from typing import Protocol, cast

from xshmd.errors import (
    AlreadyFreed,
    BufferBusy,
    ForeignBuffer,
    HypercallFailed,
    OutOfRange,
    QuotaExceeded,
    XshmError,
)
from xshmd.ports import Hypervisor
from xshmd.units import PAGE_SIZE, DomId
from xshmd.xen.buffers import ALIGN_BYTES, Buffers, Lent, MemRef, Owner
from xshmd.xen.safe_calls import make_safe_call

from ..host import ContractHost, equal, expect, raises
from ..registry import case

XENFEAT_DOM0 = 11


class Calls(Protocol):
    """What has buffers and makes hypercalls with them: the real one, and the fake."""

    @property
    def buffers(self) -> Buffers: ...

    def xen_version(self, subcall: int, memory: Lent | None) -> int: ...


def calls_of(xen: Hypervisor) -> Calls:
    return cast(Calls, xen)


def text_of(calls: Calls, owner: Owner, name: str, reference: MemRef, size_bytes: int) -> str:
    """Have Xen write a text into the memory, and return it."""
    make_safe_call(calls, owner, name, reference)
    return owner.read(reference, 0, size_bytes).partition(b"\0")[0].decode("utf-8", "replace")


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, end = line.split()[0].partition("-")
        if int(first, 16) <= address < int(end, 16):
            return True
    return False


@case
def a_hypercall_writes_into_a_buffer(xen: Hypervisor, make: ContractHost) -> None:
    calls, host = calls_of(xen), xen.host_info()
    with calls.buffers.owner("case") as owner:
        reference = owner.alloc_mem(owner.alloc_buf(1), 1024)
        equal(owner.read(reference, 0, 1024), bytes(1024), "fresh memory")
        equal(text_of(calls, owner, "extraversion", reference, 16), host.xen_extra, "version")
        equal(text_of(calls, owner, "command_line", reference, 1024), host.xen_command_line, "line")
        major, minor = host.xen_version
        equal(make_safe_call(calls, owner, "version", None), major << 16 | minor, "number")
        equal(make_safe_call(calls, owner, "page_size", None), PAGE_SIZE, "page size")


@case
def a_hypercall_reads_from_a_buffer(xen: Hypervisor, make: ContractHost) -> None:
    calls = calls_of(xen)
    with calls.buffers.owner("case") as owner:
        reference = owner.alloc_mem(owner.alloc_buf(1), 8)
        owner.write(reference, 4, b"\xff" * 4)
        equal(make_safe_call(calls, owner, "features", reference), 0, "features")
        submap = int.from_bytes(owner.read(reference, 4, 4), "little")
        expect(bool(submap >> XENFEAT_DOM0 & 1), f"dom0's bit in {submap:#x}")
        owner.write(reference, 0, (99).to_bytes(4, "little"))
        with raises(HypercallFailed, errno.EINVAL):
            make_safe_call(calls, owner, "features", reference)


@case
def the_callers_own_handle(xen: Hypervisor, make: ContractHost) -> None:
    calls = calls_of(xen)
    with calls.buffers.owner("case") as owner:
        reference = owner.alloc_mem(owner.alloc_buf(1), 16)
        make_safe_call(calls, owner, "guest_handle", reference)
        handle = str(uuid.UUID(bytes=owner.read(reference, 0, 16)))
        equal(handle, make.info(DomId(0)).uuid, "dom0's handle")


@case
def a_length_that_the_client_says_is_checked(xen: Hypervisor, make: ContractHost) -> None:
    calls = calls_of(xen)
    with calls.buffers.owner("case") as owner:
        buffer = owner.alloc_buf(1)
        reference, behind = owner.alloc_mem(buffer, 64), owner.alloc_mem(buffer, 64)
        for says in (61, 0x7FFFFFFF, 0xFFFFFFFF):
            owner.write(reference, 0, says.to_bytes(4, "little"))
            with raises(OutOfRange):
                make_safe_call(calls, owner, "build_id", reference)
        owner.write(reference, 0, (60).to_bytes(4, "little"))
        nr_bytes = make_safe_call(calls, owner, "build_id", reference)
        expect(0 < nr_bytes <= 60, f"a build id of {nr_bytes} bytes")
        expect(any(owner.read(reference, 4, nr_bytes)), "a build id")
        equal(owner.read(behind, 0, 64), bytes(64), "the memory behind")
        owner.write(reference, 0, (nr_bytes - 1).to_bytes(4, "little"))
        with raises(HypercallFailed, errno.ENOBUFS):
            make_safe_call(calls, owner, "build_id", reference)


@case
def too_small_for_what_xen_writes(xen: Hypervisor, make: ContractHost) -> None:
    calls = calls_of(xen)
    with calls.buffers.owner("case") as owner:
        buffer = owner.alloc_buf(1)
        reference, behind = owner.alloc_mem(buffer, 1023), owner.alloc_mem(buffer, 64)
        for name in ("capabilities", "command_line"):
            with raises(OutOfRange):
                make_safe_call(calls, owner, name, reference)
        equal(owner.read(reference, 0, 1023), bytes(1023), "the memory")
        equal(owner.read(behind, 0, 64), bytes(64), "the memory behind")


@case
def problem_1_users_do_not_disturb_each_other(xen: Hypervisor, make: ContractHost) -> None:
    calls = calls_of(xen)
    tool, balloon = calls.buffers.owner("tool"), calls.buffers.owner("balloon driver")
    with tool, balloon:
        first = tool.alloc_buf(2)
        reference = tool.alloc_mem(first, 1024)
        second = balloon.alloc_buf(2)
        other = balloon.alloc_mem(second, 64)
        tool.write(reference, 0, b"mine")
        with raises(ForeignBuffer):
            tool.free_buf(second)
        with raises(ForeignBuffer):
            tool.read(other, 0, 1)
        with raises(ForeignBuffer):
            make_safe_call(calls, tool, "changeset", other)
        balloon.free_buf(second)
        with raises(AlreadyFreed):
            balloon.read(other, 0, 1)
        equal(tool.read(reference, 0, 4), b"mine", "what the first user wrote")
        make_safe_call(calls, tool, "capabilities", reference)
        expect(any(tool.read(reference, 0, 1024)), "the first user's hypercall")
        tool.free_buf(first)


@case
def problem_1_many_users_at_once(xen: Hypervisor, make: ContractHost) -> None:
    calls, wrong = calls_of(xen), list[str]()
    wanted = xen.host_info().xen_extra

    def user(number: int) -> None:
        try:
            with calls.buffers.owner(f"user {number}") as owner:
                for turn in range(8):
                    buffer = owner.alloc_buf(1 + (number + turn) % 3)
                    filler = owner.alloc_mem(buffer, ALIGN_BYTES * (1 + number))
                    reference = owner.alloc_mem(buffer, 16)
                    owner.write(filler, 0, bytes([number]) * ALIGN_BYTES)
                    if text_of(calls, owner, "extraversion", reference, 16) != wanted:
                        wrong.append(f"user {number}: another text")
                    if owner.read(filler, 0, ALIGN_BYTES) != bytes([number]) * ALIGN_BYTES:
                        wrong.append(f"user {number}: another's bytes")
                    owner.free_buf(buffer)
        except XshmError as error:
            wrong.append(f"user {number}: {error}")

    users = [threading.Thread(target=user, args=(number,)) for number in range(4)]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join()
    equal(wrong, [], "what went wrong")


@case
def problem_2_data_may_span_pages(xen: Hypervisor, make: ContractHost) -> None:
    calls, host = calls_of(xen), xen.host_info()
    with calls.buffers.owner("case") as owner:
        buffer = owner.alloc_buf(3)
        whole = owner.alloc_mem(buffer, 1024)
        make_safe_call(calls, owner, "capabilities", whole)
        wanted = owner.read(whole, 0, 1024)
        # 64 bytes of it in one page, the rest in the next; then a length in one, a text in both.
        owner.alloc_mem(buffer, PAGE_SIZE - 1024 - ALIGN_BYTES)
        across = owner.alloc_mem(buffer, 1024)
        equal((across & 0xFFFFFF) % PAGE_SIZE, PAGE_SIZE - ALIGN_BYTES, "its place in the page")
        make_safe_call(calls, owner, "capabilities", across)
        equal(owner.read(across, 0, 1024), wanted, "what Xen wrote across two pages")
        equal(text_of(calls, owner, "command_line", across, 1024), host.xen_command_line, "line")


@case
def problem_3_a_buffer_never_grows(xen: Hypervisor, make: ContractHost) -> None:
    calls = calls_of(xen)
    with calls.buffers.owner("case") as owner:
        buffer = owner.alloc_buf(1)
        with raises(QuotaExceeded):
            owner.alloc_mem(buffer, PAGE_SIZE + 1)
        reference = owner.alloc_mem(buffer, PAGE_SIZE)
        with raises(QuotaExceeded):
            owner.alloc_mem(buffer, 1)
        owner.write(reference, PAGE_SIZE - 1, b"!")
        with raises(OutOfRange):
            owner.write(reference, PAGE_SIZE, b"!")
        owner.free_mem(reference)
        with raises(AlreadyFreed):
            owner.free_mem(reference)
        again = owner.alloc_mem(buffer, PAGE_SIZE)
        expect(again != reference, "a reference of its own")
        equal(owner.read(again, 0, PAGE_SIZE), bytes(PAGE_SIZE), "memory that was freed")


@case
def problem_4_an_owners_end_frees_its_buffers(xen: Hypervisor, make: ContractHost) -> None:
    calls = calls_of(xen)
    pages_before, buffers_before = calls.buffers.nr_pages, calls.buffers.nr_buffers
    owner = calls.buffers.owner("a client")
    reference = owner.alloc_mem(owner.alloc_buf(3), 16)
    owner.alloc_buf(5)
    with owner.use(reference) as lent:
        address, real = lent.address, is_mapped(lent.address)
        with raises(BufferBusy):
            owner.free_mem(reference)
        owner.close()
        equal(calls.buffers.nr_pages, pages_before + 3, "pages while Xen has some of them")
        expect(is_mapped(address) == real, "the pages that Xen has stay")
    equal(calls.buffers.nr_pages, pages_before, "pages afterwards")
    equal(calls.buffers.nr_buffers, buffers_before, "buffers afterwards")
    expect(not is_mapped(address), "the pages are unmapped")
    with raises(AlreadyFreed):
        owner.read(reference, 0, 1)
