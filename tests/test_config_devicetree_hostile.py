# SPDX-License-Identifier: LGPL-2.1-or-later
"""Device trees that somebody made to do harm: an answer in bounded time, and never a traceback."""

import random
import struct
import time
from pathlib import Path

import pytest
from dts_trees import DATA, compiled, domain, shm, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xshmd.config.devicetree import read_devicetree
from xshmd.config.findings import errors_of
from xshmd.declarations import Declarations
from xshmd.errors import ConfigError, ConfigUnreadable

SECONDS = 20
"""What any answer may take on a slow machine; they take a few at most on a usual one."""
BLOBS = [compiled(path.read_text()) for path in sorted(DATA.glob("*.dts"))]
BEGIN, END, PROP, NOP, FINISH = (struct.pack(">I", token) for token in (1, 2, 3, 4, 9))


def answer(data: bytes) -> Declarations | None:
    """Read the data; whatever it is, the outcome is of the documented kinds and well-formed."""
    started = time.monotonic()
    try:
        found = read_devicetree(data, file="x")
    except (ConfigError, ConfigUnreadable) as error:
        for part in errors_of(error):
            assert part.message.startswith("x")
            assert part.message.isprintable()
        return None
    finally:
        assert time.monotonic() - started < SECONDS
    for guest in found.guests:
        assert guest.name.isprintable()
        for request in guest.requests:
            assert request.nr_frames > 0
            assert 0 <= request.first_gfn <= request.end_gfn <= 1 << 52
            assert len(request.region_id) <= 15
    return found


def blob(structure: bytes, strings: bytes = b"") -> bytes:
    """Return a blob whose header is right, around a structure that need not be."""
    reserved = bytes(16)
    at = 40 + len(reserved)
    total = at + len(structure) + len(strings)
    header = struct.pack(
        ">10I", 0xD00DFEED, total, at, at + len(structure), 40, 17, 16, 0, len(strings),
        len(structure),
    )  # fmt: skip
    return header + reserved + structure + strings


def name(text: bytes) -> bytes:
    return text + b"\0" * (4 - len(text) % 4)


def test_the_blob_of_these_tests_is_a_blob() -> None:
    assert answer(blob(BEGIN + name(b"") + END + FINISH)) == Declarations()


@pytest.mark.parametrize(
    "structure",
    [
        b"",
        FINISH,
        END + FINISH,
        BEGIN + name(b"") + FINISH,
        BEGIN + name(b"") + END,
        BEGIN + name(b"") + END + END + FINISH,
        BEGIN + name(b"") + END + BEGIN + name(b"") + END + FINISH,
        BEGIN + b"unterminated",
        BEGIN + name(b"") + PROP + struct.pack(">II", 0xFFFFFFFF, 0) + END + FINISH,
        BEGIN + name(b"") + PROP + struct.pack(">II", 4, 0x7FFFFFFF) + bytes(4) + END + FINISH,
        BEGIN + name(b"") + struct.pack(">I", 77) + END + FINISH,
        NOP * 1000,
        BEGIN + name(b"x" * 200_000) * 5,
    ],
)
def test_structures_that_are_none(structure: bytes) -> None:
    assert answer(blob(structure, b"compatible\0")) is None


def test_deep_and_wide() -> None:
    depth = 100_000
    deep = BEGIN + name(b"") + (BEGIN + name(b"a")) * depth + END * (depth + 1) + FINISH
    assert len(blob(deep)) < 2 << 20
    assert answer(blob(deep)) == Declarations()
    wide = BEGIN + name(b"") + (BEGIN + name(b"a") + END) * depth + END + FINISH
    assert answer(blob(wide)) == Declarations()


def test_ever_so_many_wrong_nodes() -> None:
    kind = b"xen,domain-shared-memory-v1\0"
    wrong = BEGIN + name(b"shm") + PROP + struct.pack(">II", len(kind), 0) + kind + END
    chosen = BEGIN + name(b"chosen") + wrong * 20_000 + END
    assert answer(blob(BEGIN + name(b"") + chosen + END + FINISH, b"compatible\0")) is None


def test_sources_that_are_deep_or_huge() -> None:
    for depth in (1_000, 200_000):
        answer(b"/dts-v1/; /" + b" { a" * depth + b" { };" + b" };" * depth)
    references = b"".join(b"x%d = &l;" % number for number in range(50_000))
    path = b"a" * 1000 + b" { "
    answer(b"/dts-v1/; / { " + path * 500 + b"l: b { };" + b"};" * 500 + references + b" };")
    answer(b"/dts-v1/; / { a = <" + b"(1 + " * 100_000 + b"1" + b")" * 100_000 + b">; };")


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"\xd0\x0d\xfe\xed", b"\xd0\x0d\xfe", b"\x7fELF" + bytes(1000), b"garbage",
     b"/dts-v1/;\r\n/ { };\0", b"\xff" * 100, "/dts-v1/; / { é; };".encode()],
)  # fmt: skip
def test_what_is_no_device_tree(data: bytes) -> None:
    assert answer(data) is None


def test_line_ends_of_another_system_are_no_matter() -> None:
    source = (DATA / "booting.dts").read_bytes()
    turned = source.replace(b"\n", b"\r\n")
    assert read_devicetree(turned, file="x") == read_devicetree(source, file="x")


@pytest.mark.parametrize("whole", BLOBS)
def test_a_blob_cut_anywhere(whole: bytes) -> None:
    for end in range(0, len(whole), 13):
        assert answer(whole[:end]) is None


def test_a_blob_with_something_after_it() -> None:
    assert answer(BLOBS[0] + b"x") == answer(BLOBS[0])


def test_values_that_are_hostile_in_a_blob_that_is_sound() -> None:
    found = compiled(tree(domain(shm("<0x4200000 0x1000>", id='"abcdefg"'))))
    for value in (b"\xff" * 7, b"\x1b[31mab", b"a/../b/", b"a\0b\0c\0d", b"%s%s%s%", b"        "):
        assert answer(found.replace(b"abcdefg", value)) is None


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(BLOBS), st.integers(0, 1 << 32), st.integers(1, 12))
def test_mutated_blobs(whole: bytes, seed: int, changes: int) -> None:
    chance = random.Random(seed)
    data = bytearray(whole)
    for _ in range(changes):
        at = chance.randrange(len(data) - 4)
        match chance.randrange(5):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at : at + 4] = chance.choice([BEGIN, END, PROP, NOP, FINISH])
            case 2:
                word = chance.choice([0, 1, 3, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(data)])
                data[at & ~3 : (at & ~3) + 4] = struct.pack(">I", word)
            case 3:
                other = chance.randrange(len(data) - 4)
                length = chance.randrange(1, 64)
                data[at : at + length] = data[other : other + length]
            case _:
                del data[at & ~3 : (at & ~3) + 4 * chance.randrange(1, 8)]
                # The header says how long it is; only with that right is the rest looked at.
                data[4:8] = struct.pack(">I", len(data))
    answer(bytes(data))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(DATA.glob("*.dts"))), st.integers(0, 1 << 32))
def test_mutated_sources(path: Path, seed: int) -> None:
    chance = random.Random(seed)
    words = path.read_text().split(" ")
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(words))
        words[at] = chance.choice([*words, "&", "<", "{", "};", "0xffffffff", '"', "/*", "\0"])
    answer(" ".join(words).encode())
