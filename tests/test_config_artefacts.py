# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest is given to find its regions: each text compiles, and says what the guest has."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

import libfdt
import pytest
from dts_trees import compiled, decompiled
from hypothesis import given, settings
from hypothesis import strategies as st

from xshmd.config.artefacts import ARTEFACTS, memmap_arguments
from xshmd.config.dts_text import comment, identifiers, string
from xshmd.config.findings import errors_of
from xshmd.errors import ConfigError
from xshmd.model import UNPLACED, WHOLE_REGION, GuestConfig, Place, Prot, RegionRequest, Role
from xshmd.units import Gfn

OWN = RegionRequest(region_id="r0", first_gfn=Gfn(0x3A000), nr_frames=256, role=Role.OWNER)
LENT = RegionRequest(
    region_id="my-mem", first_gfn=Gfn(0x123456789), nr_frames=2, role=Role.BORROWER,
    offset_frames=5, prot=Prot.RO,
)  # fmt: skip
GUEST = GuestConfig(name="ctl", requests=(OWN, LENT))
HOSTILE = dataclasses.replace(GUEST, name='*/ }; "\\\n#error é ??/')
EXPECTED = [("r0", 0x3A000000, 0x100000, None), ("my-mem", 0x123456789000, 0x2000, 0x5000)]

BASE = "/dts-v1/; / { #address-cells = <2>; #size-cells = <2>; };\n"


def regions_of(blob: bytes, parent: str) -> list[tuple[str, int, int, int | None]]:
    """Return id, address, size and offset of each node below ``parent`` of the binding's kind."""
    tree = libfdt.FdtRo(bytearray(blob))
    above = tree.path_offset(parent)
    assert tree.getprop(above, "#address-cells").as_uint32() == 2
    assert tree.getprop(above, "#size-cells").as_uint32() == 2
    assert tree.getprop(above, "ranges") == b""
    found = []
    node = tree.first_subnode(above)
    while node >= 0:
        assert tree.getprop(node, "compatible").as_str() == "xen,shared-memory-v1"
        begin, size = tree.getprop(node, "reg").as_uint64_list()
        assert tree.get_name(node) == f"xen-shmem@{begin:x}"
        offset = tree.getprop(node, "xen,offset", quiet=(libfdt.NOTFOUND,))
        region_id = tree.getprop(node, "xen,id").as_str()
        offset = None if isinstance(offset, int) else offset.as_uint64()
        found.append((region_id, begin, size, offset))
        node = tree.next_subnode(node, quiet=(libfdt.NOTFOUND,))
    return found


@pytest.mark.parametrize("guest", [GUEST, HOSTILE])
def test_partial_devicetree(guest: GuestConfig) -> None:
    blob = compiled(ARTEFACTS["partial-dts"](guest))
    assert regions_of(blob, "/passthrough") == EXPECTED
    tree = libfdt.FdtRo(bytearray(blob))
    # docs/misc/arm/passthrough.txt: it should always contain "simple-bus".
    assert tree.getprop(tree.path_offset("/passthrough"), "compatible").as_str() == "simple-bus"
    # libxl copies phandles too, and has some of its own.
    assert b"phandle" not in blob


@pytest.mark.parametrize("guest", [GUEST, HOSTILE])
@pytest.mark.parametrize("word", ["reserved-memory", "zephyr-overlay"])
def test_text_to_include_after_a_tree(word: str, guest: GuestConfig) -> None:
    assert regions_of(compiled(BASE + ARTEFACTS[word](guest)), "/reserved-memory") == EXPECTED


@pytest.mark.parametrize("guest", [GUEST, HOSTILE])
def test_overlay(guest: GuestConfig, tmp_path: Path) -> None:
    """fdtoverlay applies it as Linux does."""
    base, changed = tmp_path / "base.dtb", tmp_path / "changed.dtb"
    overlay = tmp_path / "overlay.dtbo"
    base.write_bytes(compiled(BASE))
    overlay.write_bytes(compiled(ARTEFACTS["overlay"](guest)))
    subprocess.run(["fdtoverlay", "-i", base, "-o", changed, overlay], check=True, timeout=20)
    assert sorted(regions_of(changed.read_bytes(), "/reserved-memory")) == sorted(EXPECTED)


def test_labels_for_programs_that_are_built_with_the_tree() -> None:
    text = decompiled(BASE + ARTEFACTS["zephyr-overlay"](GUEST))
    assert 'xshm_r0 = "/reserved-memory/xen-shmem@3a000000"' in text
    assert 'xshm_my_mem = "/reserved-memory/xen-shmem@123456789000"' in text


def test_memmap_arguments() -> None:
    assert memmap_arguments(GUEST) == ("memmap=0x100000$0x3a000000 memmap=0x2000$0x123456789000\n")
    assert ARTEFACTS["memmap"](GUEST) == memmap_arguments(GUEST)
    assert ARTEFACTS["pmem"](GUEST) == ("memmap=0x100000!0x3a000000 memmap=0x2000!0x123456789000\n")


COMPILERS = [
    (program, language, standard)
    for program, language, standard in (
        ("gcc", "c", "c11"), ("gcc", "c", "c17"), ("g++", "c++", "c++11"), ("g++", "c++", "c++20"),
    )
    if shutil.which(program)
]  # fmt: skip
STRICT = ("-Wall", "-Wextra", "-Werror", "-pedantic", "-Wshadow", "-Wundef", "-Wcast-qual")

PROGRAM = r"""
#include "regions.h"
#include "regions.h"
#include <stdio.h>

int main(void)
{
    for (int i = 0; i < XSHM_NR_REGIONS; i++)
        printf("%s %llx %llx %llx %d %d\n", xshm_regions[i].id,
               (unsigned long long)xshm_regions[i].begin, (unsigned long long)xshm_regions[i].size,
               (unsigned long long)xshm_regions[i].offset, xshm_regions[i].role,
               xshm_regions[i].writable);
    return XSHM_R0_BEGIN == xshm_regions[0].begin && XSHM_MY_MEM_OFFSET == UINT64_C(0x5000) &&
           XSHM_R0_ROLE == XSHM_ROLE_OWNER && !XSHM_MY_MEM_WRITABLE ? 0 : 1;
}
"""


def test_there_is_a_compiler_to_try_the_header_with() -> None:
    assert COMPILERS


@pytest.mark.parametrize("guest", [GUEST, HOSTILE])
@pytest.mark.parametrize(("compiler", "language", "standard"), COMPILERS)
def test_header(
    compiler: str, language: str, standard: str, guest: GuestConfig, tmp_path: Path
) -> None:
    (tmp_path / "regions.h").write_text(ARTEFACTS["header"](guest))
    (tmp_path / "main.src").write_text(PROGRAM)
    (tmp_path / "unused.src").write_text('#include "regions.h"\nint main(void) { return 0; }\n')
    for source in ("unused", "main"):
        subprocess.run(
            [compiler, f"-std={standard}", *STRICT, "-x", language, tmp_path / f"{source}.src",
             "-o", tmp_path / source],
            check=True, timeout=60,
        )  # fmt: skip
    done = subprocess.run([tmp_path / "main"], check=True, timeout=10, capture_output=True)
    assert done.stdout.decode().splitlines() == [
        "r0 3a000000 100000 0 1 1",
        "my-mem 123456789000 2000 5000 2 0",
    ]


@pytest.mark.parametrize("word", ARTEFACTS)
def test_output_is_the_same_every_time_and_one_text(word: str) -> None:
    text = ARTEFACTS[word](HOSTILE)
    assert text == ARTEFACTS[word](HOSTILE)
    assert text.endswith("\n")
    assert text.isascii()


@pytest.mark.parametrize("word", ARTEFACTS)
def test_a_guest_without_regions_or_without_places(word: str) -> None:
    place = Place(file="vm.cfg", key="static_shm[0]", line=2)
    empty = GuestConfig(name="ctl", place=Place(file="vm.cfg"))
    with pytest.raises(ConfigError, match=r"vm\.cfg: guest 'ctl' has no shared memory") as caught:
        ARTEFACTS[word](empty)
    assert caught.value.facts["rule"] == "no-regions"
    unclear = dataclasses.replace(
        OWN, first_gfn=UNPLACED, nr_frames=WHOLE_REGION, role=Role.BORROWER, place=place
    )
    with pytest.raises(ConfigError) as caught:
        ARTEFACTS[word](GuestConfig(name="ctl", requests=(OWN, unclear)))
    first, second = errors_of(caught.value)
    assert first.message == (
        "vm.cfg:2: static_shm[0]: region 'r0' of guest 'ctl' has no guest address yet"
    )
    assert (first.facts["rule"], second.facts["rule"]) == ("unplaced", "unsized")


def test_names_that_collide() -> None:
    texts = ["a-b", "a.b", "a_b", "A_B", "a_b_2", "é", "", "9"]
    assert identifiers(texts) == (
        "a_b_3", "a_b_4", "a_b", "A_B_5", "a_b_2", "_", "__2", "9",
    )  # fmt: skip


@given(st.lists(st.text(max_size=6), max_size=12, unique=True))
def test_names_are_identifiers_and_differ(texts: list[str]) -> None:
    names = identifiers(texts)
    assert all(f"x{name}".isidentifier() and name.isascii() for name in names)
    assert len({name.upper() for name in names}) == len(texts)
    for text, name in zip(texts, names, strict=True):
        # One that needs no change keeps its name, unless another differs from it by case alone.
        if text and f"x{text}".isidentifier() and text.isascii():
            assert name == text or any(o != text and o.lower() == text.lower() for o in texts)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_nothing_breaks_out_of_a_string_or_a_comment(text: str) -> None:
    source = f"{comment(text)}{comment('a', text)}/dts-v1/; / {{ a = {string(text)}; }};"
    tree = libfdt.FdtRo(bytearray(compiled(source)))
    assert tree.first_property_offset(0) >= 0
    plain = text if text.isascii() and text.isprintable() else ascii(text)[1:-1]
    assert tree.getprop(0, "a").as_str() == plain
