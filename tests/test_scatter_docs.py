# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/scatter.md, docs/buffers.md, the interface and the C header say what the code does."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

from xshmd.errors import all_errors
from xshmd.ranges import MAX_LIST_BYTES, MAX_RANGES
from xshmd.share import lists, mediator, request_page
from xshmd.share.request_page import Operation
from xshmd.varlink import idl
from xshmd.xen.buffers import MAX_BUFFER_PAGES, Limits
from xshmd.xen.safe_calls import SAFE_CALLS

ROOT = Path(__file__).parent.parent
SCATTER = (ROOT / "docs/scatter.md").read_text()
BUFFERS = (ROOT / "docs/buffers.md").read_text()
HEADER = (ROOT / "integration/guests/lists.h").read_text()
CONTRACT = idl.load("io.xshmd.Regions")
SIZES = {"uint8_t": 1, "uint32_t": 4, "uint64_t": 8}


def test_the_examples_are_calls_and_replies_of_the_interface() -> None:
    examples = re.findall(
        r"io\.xshmd\.Regions\.(\w+) \\\n +'(.*)'\n((?:    [ {}\t].*\n)+)", SCATTER
    )
    assert [method for method, _, _ in examples] == ["RegisterList", "Transfer"]
    for method, call, reply in examples:
        CONTRACT.check(CONTRACT.methods[method].takes, json.loads(call))
        CONTRACT.check(CONTRACT.methods[method].gives, json.loads(reply))
    (opening,) = re.findall(r"`OpenRequestPage` opens \(`(.*)`\)", SCATTER)
    CONTRACT.check(CONTRACT.methods["OpenRequestPage"].takes, json.loads(opening))


def test_the_errors_that_are_named_are_errors() -> None:
    known = {kind.varlink_error for kind in all_errors()}
    for text in (SCATTER, BUFFERS):
        rows = re.findall(r"^\| .* \| (`\w+`(?:; `\w+`)?) \|$", text, re.M)
        named = {name for row in rows for name in re.findall(r"\w+", row)}
        assert len(named) >= 6
        assert named <= known


def test_the_interface_has_the_words_of_the_code() -> None:
    direction, calls = CONTRACT.types["Direction"], CONTRACT.types["SafeCall"]
    assert isinstance(direction, idl.Enumeration)
    assert isinstance(calls, idl.Enumeration)
    assert set(direction.values) == set(lists.Direction)
    assert set(calls.values) == set(SAFE_CALLS)


def test_the_limits_that_are_said() -> None:
    usual = Limits()
    for said in (
        f"up to {MAX_RANGES} ranges, {MAX_LIST_BYTES >> 20} MiB together",
        f"a {lists.MAX_LISTS_OF_ONE + 1}th list of one guest",
        f"a {lists.MAX_LISTS + 1}th of all",
        f"every {mediator.LEAST_S * 1000:.0f} ms while",
        f"every {mediator.MOST_S * 1000:.0f} ms while",
        f"moves {mediator.MAX_REQUEST_BYTES >> 20} MiB at the most",
    ):
        assert said in " ".join(SCATTER.split()), said
    for said in (
        f"up to {usual.buffers_per_owner} buffers and {usual.pages_per_owner} pages, all "
        f"together {usual.total_pages} pages",
        f"1 to {usual.pages_per_owner} pages",
    ):
        assert said in " ".join(BUFFERS.split()), said
    assert usual.pages_per_owner <= MAX_BUFFER_PAGES


def members() -> dict[str, tuple[int, int]]:
    """Offset and size of each member of ``struct lists_page``."""
    (body,) = re.findall(r"struct lists_page \{\n(.*?)\n\};", HEADER, re.S)
    found, at = {}, 0
    for kind, names in re.findall(r"^    (uint\w+) ([\w, \[\]]+);", body, re.M):
        for name in names.split(", "):
            name, _, number = name.rstrip("]").partition("[")
            size = SIZES[kind] * int(number or 1)
            at = -(-at // SIZES[kind]) * SIZES[kind]
            found[name], at = (at, size), at + size
    return found | {"range": (at, 16)}


def test_the_header_the_table_and_the_code_agree_where_things_are() -> None:
    rows = re.findall(r"^\| (0x\w\w) \| (\d+)(?: each)? \| ", SCATTER, re.M)
    where = members()
    del where["spare"]
    assert [(int(at, 16), int(size)) for at, size in rows] == list(where.values())
    assert where["answered"][0] == request_page.ANSWERED_AT
    assert where["status"][0] == request_page.STATUS_AT
    assert where["result"][0] == request_page.RESULT_AT
    assert where["range"][0] == request_page.RANGES_AT
    page = bytearray(request_page.READ_BYTES)
    for number, name in enumerate(("asked", "operation", "list", "nr_ranges"), start=1):
        struct.pack_into("<I", page, where[name][0], number)
    struct.pack_into("<Q", page, where["count_place"][0], 9)
    struct.pack_into("<QQQQ", page, where["range"][0], 5, 6, 7, 8)
    for nr_ranges in (2, 4):
        struct.pack_into("<I", page, where["nr_ranges"][0], nr_ranges)
        found = request_page.newest(bytes(page), 0)
        assert found is not None
        assert (found.number, found.operation, found.list_id, found.count_at) == (1, 2, 3, 8)
        assert [(each.offset_bytes, each.nr_bytes) for each in found.ranges[:2]] == [(5, 6), (7, 8)]
        assert len(found.ranges) == nr_ranges


def test_the_header_the_table_and_the_code_agree_on_numbers() -> None:
    in_c = dict(re.findall(r"LISTS_(\w+) = (\d+)", HEADER))
    assert {name: int(number) for name, number in in_c.items()} == {
        each.name: each.value for each in Operation
    }
    (said,) = re.findall(r"\| (1 register a list .*) \|", SCATTER)
    assert re.findall(r"\d", said) == [str(each.value) for each in Operation]
    magic = int(re.findall(r"LISTS_MAGIC (0x\w+)u", HEADER)[0], 16)
    assert magic.to_bytes(4, "little") == request_page.MAGIC
    assert f"LISTS_RANGES {MAX_RANGES}u" in HEADER
