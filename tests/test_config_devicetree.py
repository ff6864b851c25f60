# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a dom0less device tree says about shared memory, and every way in which it can be wrong."""

import re
import subprocess
from pathlib import Path

import pytest
from dts_trees import DATA, compiled, domain, shm, tree

from xshmd.config.devicetree import DOM0, read_devicetree
from xshmd.config.findings import errors_of
from xshmd.declarations import Declarations, EventChannel
from xshmd.errors import ConfigError, ConfigUnreadable, XshmError
from xshmd.machine import Arch
from xshmd.model import USUAL_TERMS, Backing, GuestConfig, RegionConfig, RegionTerms, Role
from xshmd.policy.rules import check_config


def read(source: str | bytes, file: str = "host.dts") -> Declarations:
    data = source.encode() if isinstance(source, str) else source
    return read_devicetree(data, file=file)


def refuse(source: str) -> tuple[XshmError, ...]:
    with pytest.raises(ConfigError) as caught:
        read(source)
    return errors_of(caught.value)


def places(guest: GuestConfig) -> dict[str, tuple[Role, int, int]]:
    """Return what a guest has: region to role, guest address and size in bytes."""
    return {
        request.region_id: (request.role, request.first_gfn << 12, request.size_bytes)
        for request in guest.requests
    }


def example(name: str) -> Declarations:
    return read((DATA / name).read_bytes(), name)


OWNER, BORROWER = Role.OWNER, Role.BORROWER


def host(address: int) -> RegionTerms:
    return RegionTerms(backing=Backing.HOST, host_first_mfn=address >> 12)


def test_the_design_of_2022() -> None:
    found = example("design-2022.dts")
    dom0, u1, u2 = found.guests
    assert [guest.name for guest in found.guests] == [DOM0, "domU1", "domU2"]
    assert [guest.memory_mib for guest in found.guests] == [0, 128, 64]
    assert places(dom0) == {"0": (OWNER, 0x10000000, 0x10000000)}
    assert dom0.requests[0].terms == host(0x10000000)
    assert places(u1) == {
        "0": (BORROWER, 0x50000000, 0x10000000),
        "1": (BORROWER, 0x60000000, 0x20000000),
    }
    assert places(u2) == {"1": (BORROWER, 0x70000000, 0x20000000)}
    assert [request.terms for request in u1.requests] == [USUAL_TERMS, USUAL_TERMS]
    (region,) = found.regions
    assert (region.region_id, region.nr_frames, region.terms) == ("1", 0x20000, host(0x50000000))
    assert str(region.place) == "design-2022.dts: /chosen/domU1/peer-memory"
    assert str(u2.requests[0].place) == "design-2022.dts: /chosen/domU2/peer-memory"
    assert str(dom0.place) == "design-2022.dts: /chosen"


def test_the_example_of_booting_txt() -> None:
    found = example("booting.dts")
    dom0, u1, u2 = found.guests
    assert places(dom0) == {"my-shared-mem-0": (OWNER, 0x10000000, 0x10000000)}
    assert places(u1) == {
        "my-shared-mem-0": (BORROWER, 0x50000000, 0x10000000),
        "my-shared-mem-1": (BORROWER, 0x60000000, 0x20000000),
        "my-shared-mem-2": (OWNER, 0x80000000, 0x20000000),
    }
    assert places(u2) == {
        "my-shared-mem-1": (BORROWER, 0x70000000, 0x20000000),
        "my-shared-mem-2": (BORROWER, 0x90000000, 0x20000000),
    }
    assert u1.requests[2].terms == USUAL_TERMS
    assert [(one.region_id, one.terms) for one in found.regions] == [
        ("my-shared-mem-1", host(0x50000000))
    ]


def test_xens_smoke_test_has_its_cells_from_above() -> None:
    found = example("smoke-test.dts")
    (guest,) = found.guests
    assert places(guest) == {"my-shared-mem-0": (BORROWER, 0x4000000, 0x10000000)}
    assert found.regions[0].terms == host(0x50000000)


def test_the_example_of_our_own_page() -> None:
    page = (Path(__file__).parent.parent / "docs" / "devicetree.md").read_text()
    (source,) = re.findall(r"^```dts\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    found = read(source)
    assert [(guest.name, places(guest)) for guest in found.guests] == [
        ("sensor", {"samples": (OWNER, 0x3A000000, 0x100000)}),
        ("control", {"samples": (BORROWER, 0x3B000000, 0x100000)}),
    ]
    for guest in found.guests:
        assert check_config(guest, Arch.ARM64) == ()


def test_event_channels() -> None:
    channels = example("event-channels.dts").event_channels
    assert [(one.guest, one.local_port, one.peer_guest, one.peer_port) for one in channels] == [
        (DOM0, 10, "domU1", 10),
        ("domU1", 10, DOM0, 10),
        ("domU1", 11, "domU2", 11),
        ("domU1", 12, "domU2", 13),
        ("domU2", 11, "domU1", 11),
        ("domU2", 13, "domU1", 12),
    ]
    assert str(channels[0].place) == "event-channels.dts: /chosen/evtchn@1"
    assert all(isinstance(one, EventChannel) for one in channels)


@pytest.mark.parametrize(
    "name", ["design-2022.dts", "booting.dts", "smoke-test.dts", "event-channels.dts"]
)
def test_a_blob_says_what_its_source_does(name: str) -> None:
    source = (DATA / name).read_bytes()
    assert read(compiled(source.decode()), name) == read(source, name)


def test_a_tree_about_other_things_declares_nothing() -> None:
    odd = domain(name="Domain-0", more='memory = "x";')
    assert read(tree(odd, domain(name="u2"))) == Declarations()
    assert read("/dts-v1/; / { };") == Declarations()


def one(declarations: Declarations) -> tuple[str, int, int, int | None]:
    """Return id, guest address, size and host address of the only region of the only guest."""
    (guest,), (region,) = declarations.guests, declarations.regions
    (request,) = guest.requests
    assert request.nr_frames == region.nr_frames
    assert request.region_id == region.region_id
    mfn = region.terms.host_first_mfn
    return (
        request.region_id,
        request.first_gfn << 12,
        request.size_bytes,
        None if mfn is None else mfn << 12,
    )


def test_memory_is_in_kib_and_what_is_begun_counts() -> None:
    found = read(tree(domain(shm("<0x4200000 0x1000>"), more="memory = <1 1025>;")))
    assert found.guests[0].memory_mib == (1 << 22) + 2


@pytest.mark.parametrize("address_cells", [1, 2])
@pytest.mark.parametrize("size_cells", [1, 2])
def test_both_orders_with_every_number_of_cells(address_cells: int, size_cells: int) -> None:
    def value(*numbers: tuple[int, int]) -> str:
        return f"<{' '.join('0 ' * (cells - 1) + hex(number) for number, cells in numbers)}>"

    a, s = address_cells, size_cells
    the_host, the_guest, size = (0x8000000, a), (0x4200000, a), (0x3000, s)

    def said(values: str, region_id: str) -> tuple[str, int, int, int | None]:
        return one(read(tree(domain(shm(values, id=region_id)), cells=(a, s))))

    assert said(value(the_host, the_guest, size), '"r"') == ("r", 0x4200000, 0x3000, 0x8000000)
    assert said(value(the_host, size, the_guest), "<7>") == ("7", 0x4200000, 0x3000, 0x8000000)
    assert said(value(the_guest, size), '"r"') == ("r", 0x4200000, 0x3000, None)


def test_numbers_of_64_bits() -> None:
    values = "<0x1 0x0 0xffff 0xfffff000 0x0 0x1000>"
    found = one(read(tree(domain(shm(values)), cells=(2, 2))))
    assert found == ("r0", 0xFFFFFFFFF000, 0x1000, 0x100000000)
    top = "<0xffffffff 0xfffff000 0 0x1000>"
    assert one(read(tree(domain(shm(top)), cells=(2, 2))))[1] == 0xFFFFFFFFFFFFF000


def test_the_domains_own_cells_count_and_not_the_nodes() -> None:
    more = "#address-cells = <2>; #size-cells = <2>;"
    inner = "#address-cells = <1>; #size-cells = <1>;"
    node = shm("<0 0x4200000 0 0x1000>", more=inner)
    assert one(read(tree(domain(node, more=more)))) == ("r0", 0x4200000, 0x1000, None)
    # Without any, as in Xen, an address has two cells and a size one.
    bare = f"/dts-v1/; / {{ chosen {{ {domain(shm('<0 0x4200000 0x1000>'))} }}; }};"
    assert one(read(bare)) == ("r0", 0x4200000, 0x1000, None)


@pytest.mark.parametrize(
    ("said", "region_id"),
    [
        ('"abc"', "abc"), ('"a"', "a"), ('"123456789012345"', "123456789012345"), ("<0>", "0"),
        ("<0x126>", "294"), ('"my-memory_0@X"', "my-memory_0@X"),
    ],
)  # fmt: skip
def test_ids(said: str, region_id: str) -> None:
    values = "<0x8000000 0x1000 0x4200000>" if said[0] == "<" else "<0x4200000 0x1000>"
    assert one(read(tree(domain(shm(values, id=said)))))[0] == region_id


def test_roles() -> None:
    """No role: the system's.  A borrower alone: somebody outside of the tree may own it."""
    values = "<0x4200000 0x1000>"
    found = read(
        tree(
            domain(
                shm(values, id='"s"', name="a"), shm(values, id='"x"', more='role = "borrower";')
            ),
            domain(shm(values, id='"s"', more='role = "borrower";'), name="u2"),
        )
    )
    assert [region.region_id for region in found.regions] == ["s"]
    assert [request.role for guest in found.guests for request in guest.requests] == [BORROWER] * 3
    assert isinstance(found.regions[0], RegionConfig)


def evtchn(label: str, value: str) -> str:
    properties = f'compatible = "xen,evtchn-v1"; xen,evtchn = <{value}>;'
    return f"{label}: evtchn-{label} {{ {properties} }};"


V = "<0x4200000 0x1000>"
"""A member that is right, at a guest address and without a host address."""
H = "<0x8000000 0x4200000 0x1000>"
OWN, LEND = 'role = "owner";', 'role = "borrower";'
LONG = '"a23456789-123456"'
WRONG: list[tuple[str, str, str, str]] = [
    # the rule, the tree, what is said, the hint
    ("id", tree(domain(shm(V).replace("xen,shm-id", "x"))), "'xen,shm-id' is missing", "name the"),
    ("id", tree(domain(shm(V, id='""'))), "xen,shm-id '' is no id", "1 to 15"),
    ("id", tree(domain(shm(V, id='"a b"'))), "xen,shm-id 'a b' is no id", "name the"),
    ("id", tree(domain(shm(V, id='"a", "b"'))), r"xen,shm-id 'a\x00b' is no id", "name the"),
    ("id", tree(domain(shm(V, id='"\\x1b[1m"'))), r"'\x1b[1m' is no id", "name the"),
    ("id", tree(domain(shm(V, id="[61 62]"))), "'a' is no id", "name the"),
    ("id", tree(domain(shm(V, id="<0 0>"))), "is no id", "name the"),
    ("id-length", tree(domain(shm(V, id=LONG))), "has 16 characters", "room for 15"),
    ("id-number", tree(domain(shm(H, id="<0x127>"))), "<0x127> is too large", "0x126"),
    ("id-number", tree(domain(shm(H, id="<0x61626364>"))), "<0x61626364> is too large", "0x126"),
    ("role", tree(domain(shm(V, more='role = "Owner";'))), "role 'Owner' is not known", "leave it"),
    ("role", tree(domain(shm(V, more="role;"))), "role '' is not known", '"owner"'),
    ("cells", tree(domain(shm(V).replace("xen,shared-mem", "x"))), "'xen,shared-mem' is missing",
     "3 cells as <host guest size>, or 2 as <guest size>"),
    ("cells", tree(domain(shm("<1>"))), "xen,shared-mem has 1 cells", "3 cells"),
    ("cells", tree(domain(shm("<1 2 3 4>"))), "has 4 cells", "3 cells"),
    ("cells", tree(domain(shm("[01 02]"))), "no list of 32-bit cells", "3 cells"),
    ("cells", tree(domain(shm("<>"))), "has 0 cells", "3 cells"),
    ("cells", tree(domain(shm(V)), cells=(0, 1)), "#address-cells is not 1 or 2", "= <2>"),
    ("cells", tree(domain(shm(V)), cells=(1, 3)), "#size-cells is not 1 or 2", "= <2>"),
    ("cells", tree(domain(shm(V), more="#size-cells = [01];")), "#size-cells is not", "= <2>"),
    ("unaligned", tree(domain(shm("<0x4200001 0x1000>"))), "address 0x4200001", "whole pages"),
    ("unaligned", tree(domain(shm("<0x4200000 0x1800>"))), "size 0x1800", "<guest size>"),
    ("unaligned", tree(domain(shm("<0x8000800 0x4200000 0x1000>"))), "host address 0x8000800",
     "<host guest size>"),
    ("size-zero", tree(domain(shm("<0x4200000 0>"))), "the size is 0", "0x1000 or more"),
    ("beyond-64-bits", tree(domain(shm("<0xffffffff 0xfffff000 0x2000>")), cells=(2, 1)),
     "guest address 0xfffffffffffff000 + size 0x2000", "lower"),
    ("beyond-64-bits", tree(domain(shm("<0xffffffff 0xfffff000 0 0 0x2000>")), cells=(2, 1)),
     "host address 0xfffffffffffff000 + size 0x2000", "lower"),
    ("different-region", tree(domain(shm(V)), domain(shm("<0x4200000 0x2000>"), name="u2")),
     "no host address and size 0x2000 here, but no host address and size 0x1000 in /chosen/u1/shm",
     "all nodes"),
    ("different-region", tree(domain(shm(V)), domain(shm(H), name="u2")),
     "host address 0x8000000 and size 0x1000 here, but no host address", "all nodes"),
    ("different-region", tree(domain(shm(H)),
                              domain(shm("<0x8001000 0x4200000 0x1000>"), name="u2")),
     "host address 0x8001000 and size 0x1000 here, but host address 0x8000000", "all nodes"),
    ("direct-map", tree(shm(H)), "host 0x8000000 but guest address 0x4200000, and Domain-0 is",
     "same host and guest"),
    ("direct-map", tree(shm(V)), "there is no host address but guest address", "same host"),
    ("direct-map", tree(domain(shm(H), more="direct-map;")), "and u1 is direct-mapped", "same"),
    ("region-twice", tree(domain(shm(V), shm(V, name="b"))), "already in /chosen/u1/shm", "once"),
    ("id-kinds", tree(domain(shm("<0x8000000 0x1000 0x4200000>", id="<1>")),
                      domain(shm(H, id='"1"'), name="u2")), "a number as id in one node", "string"),
    ("role-unsaid", tree(domain(shm(V, more=OWN)), domain(shm(V), name="u2")),
     "is the system's, but /chosen/u1/shm owns it", "borrower"),
    ("two-owners", tree(domain(shm(V, more=OWN)), domain(shm(V, more=OWN), name="u2")),
     "has an owner already in /chosen/u1/shm", "all but one"),
    ("undefined-region", tree(domain(shm(H, more=LEND))),
     "all its nodes are borrowers", '"owner" in one'),
    ("shared-host-range", tree(domain(shm(H), shm(H, name="b", id='"r1"'))),
     "'r1' at 0x8000000 overlaps that of region 'r0'", "same xen,shm-id"),
    ("shared-host-range", tree(domain(shm("<0x8000000 0x4200000 0x9000>"),
                                 shm("<0x8001000 0x4300000 0x1000>", name="b", id='"r1"'))),
     "'r1' at 0x8001000 overlaps that of region 'r0'", "same xen,shm-id"),
    ("shared-host-range", tree(domain(shm("<0x8000000 0x4200000 0x9000>", id='"z"'),
                                 shm("<0x8001000 0x4300000 0x1000>", name="b", id='"a"'),
                                 shm("<0x8008000 0x4400000 0x1000>", name="c", id='"b"')))
     .replace("<0x8001000 ", "<0x9001000 "), "'b' at 0x8008000 overlaps that of region 'z'", ""),
    ("misplaced", tree(f"other {{ {shm(V)} }};"), "it is nobody's", "xen,domain"),
    ("misplaced", f"/dts-v1/; / {{ {shm(V)} }};", "it is nobody's", "/chosen for Dom0"),
    ("misplaced", f"/dts-v1/; / {{ soc {{ {domain(shm(V))} }}; }};", "it is nobody's", "/chosen"),
    ("misplaced", tree(domain(domain(shm(V), name="inner"))), "it is nobody's", "xen,domain"),
    ("misplaced", f"/dts-v1/; / {{ a {{ b {{ c {{ d {{ {shm(V)} }}; }}; }}; }}; }};",
     "/.../b/c/d/shm: the node", "xen,domain"),
    ("domain-name", tree(domain(shm(V), name="Domain-0")), "'Domain-0' cannot be the name", "a-z"),
    ("memory", tree(domain(shm(V), more="memory = <65536>;")), "'memory' is no 64-bit", "cells"),
    ("evtchn-cells", tree(evtchn("a", "1")), "not a port and a reference", "one end"),
    ("evtchn-cells", tree(evtchn("a", "1 &a 2 &a")), "not a port and a reference", "one end"),
    ("evtchn-port", tree(evtchn("a", "0 &a")), "port 0x0 is not possible", "1 to 0x1ffff"),
    ("evtchn-port", tree(evtchn("a", "0x20000 &a")), "port 0x20000 is not", "1 to 0x1ffff"),
    ("evtchn-port-twice", tree(evtchn("a", "1 &b"), evtchn("c", "1 &d"),
                               domain(evtchn("b", "1 &a"), evtchn("d", "2 &c"))),
     "port 0x1 of 'Domain-0' is already in /chosen/evtchn-a", "its own port"),
    ("evtchn-ends", tree(evtchn("a", "1 &a")), "names itself", "refer to each other"),
    ("evtchn-ends", tree(domain(evtchn("a", "1 &x"), "x: x { };")), "no event channel node", ""),
    ("evtchn-ends", tree(domain(evtchn("a", "1 7"))), "no event channel node", ""),
    ("evtchn-ends", tree(evtchn("a", "1 &b"), domain(evtchn("b", "1 &a"), evtchn("c", "2 &a"))),
     "/chosen/u1/evtchn-c: its other end /chosen/evtchn-a does not name it in return", ""),
    ("misplaced", tree(f"other {{ {evtchn('a', '1 &a')} }};"), "it is nobody's", "xen,domain"),
    ("unclear-order", tree(domain(shm("<0x50000000 0x1000 0x4200000>")),
                           domain(shm("<0x50000000 0x1000 0x4300000>"), name="u2")),
     "its id, a string, stands for <host guest size>, but then host.dts: /chosen/u2/shm: region"
     " 'r0' has host address 0x50000000 and size 0x4300000 here, but host address 0x50000000 and"
     " size 0x4200000 in /chosen/u1/shm; while <host size guest> is host 0x50000000, guest"
     " 0x4200000, 4 KiB, and nothing is wrong with that", "write <host guest size> and a string"),
    ("unclear-order", tree(shm("<0x50000000 0x50000000 0x1000>", id="<1>")),
     "its id, a number, stands for <host size guest>, but then host.dts: /chosen/shm: "
     "xen,shared-mem: host 0x50000000 but guest address 0x1000", "write <host guest size>"),
    ("unclear-order", tree(domain(shm(V, id="<1>"))),
     "two ways: <guest size> is guest 0x4200000, 4 KiB; <size guest> is guest 0x1000, 66 MiB",
     "write <guest size>"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "source", "what", "hint"), WRONG)
def test_one_thing_wrong_is_one_error_with_its_rule_and_place(
    rule: str, source: str, what: str, hint: str
) -> None:
    (error,) = refuse(source)
    assert error.facts["rule"] == rule
    assert what in error.message
    assert hint in error.hint
    assert error.message.startswith("host.dts: /")
    assert error.facts["file"] == "host.dts"
    assert str(error.facts["place"]).startswith("/")
    assert error.message.isprintable()


def test_all_that_is_wrong_is_said() -> None:
    rules = [
        error.facts["rule"]
        for error in refuse(
            tree(
                domain(shm("<1 2 3 4>", id='""', more='role = "x";')),
                domain(shm(V, more=OWN), name="u2"),
                domain(shm("<0x4200000 0x1001>"), name="u3"),
                domain(evtchn("a", "1 &a"), name="u4"),
            )
        )
    ]
    assert rules == [
        "id", "role", "cells", "role-unsaid", "unaligned", "different-region", "evtchn-ends",
    ]  # fmt: skip


def test_an_order_that_neither_reading_saves_is_read_by_its_id() -> None:
    errors = refuse(tree(domain(shm("<0x8000001 0x4200001 0x1001>"))))
    assert [error.facts["rule"] for error in errors] == ["unaligned"] * 3
    assert all("<host guest size>" in error.hint for error in errors)


def test_as_many_regions_as_xen_takes() -> None:
    def many(count: int) -> str:
        return tree(
            domain(*(shm(f"<{0x4200000 + 4096 * n:#x} 0x1000>", id=f'"r{n}"', name=f"n{n}")
                     for n in range(count)))
        )  # fmt: skip

    assert len(read(many(32)).regions) == 32
    (error,) = refuse(many(33))
    assert error.facts["rule"] == "too-many-regions"
    assert error.message == "host.dts: there are 33 regions, and Xen takes 32 from a device tree"


def test_two_domains_of_one_name() -> None:
    blob = compiled(tree(domain(shm(V), name="u1"), domain(shm(V), name="u2")))
    with pytest.raises(ConfigError) as caught:
        read(blob.replace(b"u2\0", b"u1\0"))
    assert [error.facts["rule"] for error in errors_of(caught.value)] == [
        "domain-twice",
        "region-twice",
    ]


def test_a_domain_whose_name_no_guest_can_have() -> None:
    blob = compiled(tree(domain(shm(V), name="uuuu")))
    with pytest.raises(ConfigError) as caught:
        read(blob.replace(b"uuuu", b"\xff\x1b u"))
    (error,) = errors_of(caught.value)
    assert error.facts["rule"] == "domain-name"
    assert error.message.isprintable()


def test_an_old_phandle_counts_too() -> None:
    command = [
        "dtc",
        "-q",
        "-H",
        "legacy",
        "-I",
        "dts",
        "-O",
        "dtb",
        str(DATA / "event-channels.dts"),
    ]
    blob = subprocess.run(command, capture_output=True, timeout=20, check=True).stdout
    assert b"linux,phandle" in blob
    assert len(read(blob).event_channels) == 6


def test_what_dtc_says_has_its_line() -> None:
    with pytest.raises(ConfigUnreadable) as caught:
        read("/dts-v1/;\n/ {\n  a = <1> b;\n};\n")
    assert caught.value.message.startswith("host.dts:3: it is neither a device tree blob nor")
    assert caught.value.facts["line"] == 3
