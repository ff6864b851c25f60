# SPDX-License-Identifier: LGPL-2.1-or-later
"""Regions in TOML: what is read, what is wrong with it and where, and writing it back."""

import contextlib
import dataclasses
import re
import tomllib
from typing import Any

import pytest
from declared import declarations, plain
from hypothesis import given, settings
from hypothesis import strategies as st

from xshmd.config import toml
from xshmd.config.findings import errors_of
from xshmd.config.toml import read_toml
from xshmd.config.toml_lines import key_lines, line_of
from xshmd.config.toml_tree import Source
from xshmd.config.toml_write import render_toml
from xshmd.config.xlcfg import MAX_BYTES
from xshmd.declarations import Declarations, EventChannel
from xshmd.errors import ConfigError, ConfigUnreadable, XshmError
from xshmd.model import (
    UNPLACED,
    USUAL_TERMS,
    WHOLE_REGION,
    Backing,
    CachePolicy,
    GuestType,
    Isolation,
    Lifetime,
    Prot,
    ProtEnforcement,
    RegionConfig,
    RegionTerms,
    Role,
    Transport,
)
from xshmd.units import Gfn

UUID = "01234567-89ab-cdef-0123-456789abcdef"
REGION = "[region.r]\nsize = 4096\n"
OWNED = "[region.r]\nsize = 8192\nowner = 'ctl'\n[region.r.guest.ctl]\n"


def read(text: str, *more: str) -> Declarations:
    drop_ins = [Source(f"drop-in-{index}", one.encode()) for index, one in enumerate(more, 1)]
    return read_toml(text.encode(), file="r.toml", drop_ins=drop_ins)


def wrong(text: str, *more: str) -> list[XshmError]:
    with pytest.raises(ConfigError) as caught:
        read(text, *more)
    return list(errors_of(caught.value))


# --- what is read -----------------------------------------------------------------------------


def test_everything_that_can_be_said() -> None:
    said = read(f"""
[region.telemetry]
size = "1 MiB"
owner = "ctl"
lifetime = "members"
prot = "ro"
cache_policy = "ARM_normal"
transport = "grant"
isolation = "region"
prot_enforcement = "advisory"
backing = "host"
host_address = 0x5000_0000

[region.telemetry.guest.ctl]
begin = 0x3a000000
size = 1048576
role = "owner"
prot = "ro"

[region.telemetry.guest.log]
begin = "64 GiB"
size = "4 KiB"
offset = 8192
role = "borrower"

[guest.ctl]
uuid = "{UUID.upper()}"
type = "hvm"
memory = "1 GiB"
maxmem = 2147483648
hap = false
altp2m = true
nestedhvm = true
memory_map = "leave"
""")
    terms = RegionTerms(
        prot=Prot.RO,
        cache_policy=CachePolicy.ARM_NORMAL,
        lifetime=Lifetime.MEMBERS,
        backing=Backing.HOST,
        host_first_mfn=0x50000,
        transport=Transport.GRANT,
        isolation=Isolation.REGION,
        prot_enforcement=ProtEnforcement.ADVISORY,
    )
    assert said.regions == ()
    ctl, log = said.guests
    assert (ctl.name, ctl.uuid, ctl.guest_type) == ("ctl", UUID, GuestType.HVM)
    assert (ctl.memory_mib, ctl.maxmem_mib) == (1024, 2048)
    assert (ctl.hap, ctl.altp2m, ctl.nestedhvm, ctl.reserve) == (False, True, True, False)
    (owner,) = ctl.requests
    assert (owner.first_gfn, owner.nr_frames, owner.role) == (0x3A000, 256, Role.OWNER)
    assert (owner.prot, owner.cache_policy) == (Prot.RO, CachePolicy.ARM_NORMAL)
    assert owner.terms == terms
    (borrower,) = log.requests
    assert (borrower.first_gfn, borrower.nr_frames) == (0x1000000, 1)
    assert (borrower.offset_frames, borrower.role) == (2, Role.BORROWER)
    # What is not said of a member is the region's.
    assert (borrower.prot, borrower.cache_policy) == (Prot.RO, None)
    assert borrower.terms == USUAL_TERMS


def test_what_may_be_left_out() -> None:
    said = read("[region.r]\nsize = 4096\n[region.r.guest.a]\n[region.s]\nsize = '1GiB'\n")
    assert [(one.region_id, one.nr_frames, one.terms) for one in said.regions] == [
        ("r", 1, USUAL_TERMS),
        ("s", 1 << 18, USUAL_TERMS),
    ]
    ((request,),) = [guest.requests for guest in said.guests]
    assert (request.first_gfn, request.nr_frames) == (UNPLACED, WHOLE_REGION)
    assert (request.role, request.prot, request.terms) == (Role.BORROWER, Prot.RW, USUAL_TERMS)


def test_a_region_that_is_defined_elsewhere() -> None:
    said = read("[region.r]\nexternal = true\n[region.r.guest.a]\nsize = 4096\n")
    assert said.regions == ()
    assert said.guests[0].requests[0].role is Role.BORROWER


def test_places() -> None:
    said = read(
        "# regions\n[region.s]\nsize = 4096\n"
        '\n[ region . r ] # "\nsize = """\\\n 4 KiB"""\nguest = { a = {}, b.begin = 0 }\n'
        "[region.s.guest.'c d']\n"
    )
    places = {region.region_id: str(region.place) for region in said.regions}
    assert places == {"s": "r.toml:2: region.s", "r": "r.toml:5: region.r"}
    assert sorted(str(guest.requests[0].place) for guest in said.guests) == [
        "r.toml:8: region.r.guest.a",
        "r.toml:8: region.r.guest.b",
        'r.toml:9: region.s.guest."c d"',
    ]


def test_dos_line_ends() -> None:
    (region,) = read(REGION.replace("\n", "\r\n")).regions
    assert (region.nr_frames, region.place.line) == (1, 1)


def test_an_empty_file_says_nothing() -> None:
    assert read("") == read("# nothing\n") == Declarations()


def test_a_guest_may_be_described_without_regions() -> None:
    (guest,) = read("[guest.a]\nmemory = '64 MiB'\n").guests
    assert (guest.name, guest.memory_mib, guest.requests) == ("a", 64, ())


# --- drop-ins ---------------------------------------------------------------------------------


def test_drop_ins_replace_key_by_key() -> None:
    said = read(
        OWNED + "begin = 0x1000\n",
        "[region.r]\nsize = 4096\n[region.r.guest.b]\n",
        "[region.r]\nsize = 12288\nprot = 'ro'\n[region.r.guest.ctl]\nbegin = 0x2000\n",
    )
    ctl, other = said.guests
    (request,) = ctl.requests
    assert (request.nr_frames, request.first_gfn, request.prot) == (3, 2, Prot.RO)
    assert request.place.file == "r.toml"
    assert str(other.requests[0].place) == "drop-in-1:3: region.r.guest.b"


def test_what_is_wrong_in_a_drop_in_is_said_of_it() -> None:
    (error,) = wrong(REGION, "\n\n[region.r]\nsize = -4096\n")
    assert error.message.startswith("drop-in-1:4: region.r.size: ")


def test_a_drop_in_may_replace_a_table_by_a_value() -> None:
    (error,) = wrong(REGION, "region = 3\n")
    assert error.message == "drop-in-1:1: region: it is a number, not tables"


# --- what is wrong ----------------------------------------------------------------------------

BROKEN = [
    # text, line, key, rule, what, hint
    ("[regions.r]", 1, "regions", "unknown-key", "unknown key 'regions'", "did you mean 'region'?"),
    ("[region.r]\nsise = 4096\nsize = 4096", 2, "region.r.sise", "unknown-key", "sise", "'size'?"),
    (OWNED + "bgin = 0", 5, "region.r.guest.ctl.bgin", "unknown-key", "'bgin'", "'begin'?"),
    ("[guest.a]\nmemmory = 1", 2, "guest.a.memmory", "unknown-key", "'memmory'", "'memory'?"),
    (REGION + "zzz = 1", 3, "region.r.zzz", "unknown-key", "'zzz'", "possible are size, owner"),
    ("region = 1", 1, "region", "bad-type", "a number, not tables", r"\[region.NAME\]"),
    ("[region]\nr = 1", 2, "region.r", "bad-type", "a number, not a table", r"\[region.r\]"),
    ("[[region.r]]\nsize=1", 1, "region.r", "bad-type", "a list, not a table", ""),
    ("[region.r]", 1, "region.r", "missing-key", "'size' is missing", "external = true"),
    ("[region.r]\nsize = true", 2, "region.r.size", "bad-type", "true or false", "1 MiB"),
    ("[region.r]\nsize = nan", 2, "region.r.size", "bad-type", "floating", "1 MiB"),
    ("[region.r]\nsize = 4096.0", 2, "region.r.size", "bad-type", "floating", "1 MiB"),
    ("[region.r]\nsize = 2024-01-01", 2, "region.r.size", "bad-type", "a date", "1 MiB"),
    ("[region.r]\nsize = [4096]", 2, "region.r.size", "bad-type", "a list", "1 MiB"),
    ("[region.r]\nsize = {}", 2, "region.r.size", "bad-type", "a table", "1 MiB"),
    ("[region.r]\nsize = 0", 2, "region.r.size", "size-zero", "at least one page", "0x1000"),
    ("[region.r]\nsize = -4096", 2, "region.r.size", "bad-number", "less than nothing", ""),
    ("[region.r]\nsize = 4097", 2, "region.r.size", "unaligned", "4097", "0x1000 or 0x2000"),
    ("[region.r]\nsize = 1", 2, "region.r.size", "unaligned", "not a multiple", "say 0x1000$"),
    ("[region.r]\nsize = 0x10000000000000000", 2, "region.r.size", "beyond-64-bits", "64", ""),
    ("[region.r]\nsize = '99999999 TiB'", 2, "region.r.size", "beyond-64-bits", "64", ""),
    ("[region.r]\nsize = '1 MB'", 2, "region.r.size", "bad-number", "no unit", '"1 MiB"'),
    ("[region.r]\nsize = '2m'", 2, "region.r.size", "bad-number", "no unit", '"2 MiB"'),
    ("[region.r]\nsize = '1 byte'", 2, "region.r.size", "bad-number", "no unit", '"1 B"'),
    ("[region.r]\nsize = '1 Mib'", 2, "region.r.size", "bad-number", "no unit", '"1 MiB"'),
    ("[region.r]\nsize = '1 PiB'", 2, "region.r.size", "bad-number", "no unit", "units are B, KiB"),
    ("[region.r]\nsize = '1.5 MiB'", 2, "region.r.size", "bad-number", "1.5 MiB", "whole number"),
    ("[region.r]\nsize = '0x1000'", 2, "region.r.size", "bad-number", "0x1000", "without quotes"),
    ("[region.r]\nsize = ''", 2, "region.r.size", "bad-number", "''", "units are"),
    ('["region"."a/b"]\nsize = 4096', 1, 'region."a/b"', "bad-id", "a/b", "rename"),
    (f"[region.{'a' * 129}]\nsize = 4096", 1, f"region.{'a' * 129}", "bad-id", "129", "128"),
    (REGION + "owner = 3", 3, "region.r.owner", "bad-type", "not text", "quotes"),
    (REGION + "owner = 'x'", 3, "region.r.owner", "owner-no-member", "'x'", "region.r.guest.x"),
    (REGION + "prot = 'RW'", 3, "region.r.prot", "bad-word", "'RW' is not known", 'say "rw"'),
    (REGION + "prot = 'wo'", 3, "region.r.prot", "bad-word", "'wo'", "possible are rw, ro"),
    (REGION + "prot = 1", 3, "region.r.prot", "bad-type", "not text", "possible are rw, ro"),
    (REGION + "lifetime = 'x'", 3, "region.r.lifetime", "bad-word", "x", "owner, members"),
    (
        REGION + "lifetime = 'owner'", 3, "region.r.lifetime", "lifetime-contradiction",
        "no owner to end with", "owner = ",
    ),
    (REGION + "transport = 'x'", 3, "region.r.transport", "bad-word", "'x'", "physmap, grant"),
    (REGION + "isolation = 'x'", 3, "region.r.isolation", "bad-word", "'x'", "group, sealed"),
    (REGION + "cache_policy = 'wb'", 3, "region.r.cache_policy", "bad-word", "'wb'", "ARM_normal"),
    (
        REGION + "prot_enforcement = 'x'", 3, "region.r.prot_enforcement", "bad-word", "'x'",
        "required, advisory",
    ),
    (REGION + "backing = 'host'", 3, "region.r.backing", "missing-key", "host_addr", "first"),
    (REGION + "host_address = 0", 3, "region.r.host_address", "host-address", "host", "backing"),
    (
        REGION + "backing = 'host'\nhost_address = 0xfffffffffffff001", 4, "region.r.host_address",
        "unaligned", "not a multiple", "",
    ),
    (
        "[region.r]\nsize = 8192\nbacking = 'host'\nhost_address = 0xfffffffffffff000", 4,
        "region.r.host_address", "beyond-64-bits", "beyond 64 bits", "",
    ),
    ("[region.r]\nexternal = 1", 2, "region.r.external", "bad-type", "not true or false", ""),
    (
        "[region.r]\nexternal = true\nsize = 4096", 3, "region.r.size", "external",
        "defined elsewhere", "leave out size",
    ),
    (OWNED + "size = 0", 5, "region.r.guest.ctl.size", "size-zero", "at least one page", "leave"),
    (OWNED + "size = 4096", 5, "region.r.guest.ctl.size", "owner-size", "has 4 KiB", "leave size"),
    (OWNED + "offset = 0", 5, "region.r.guest.ctl.offset", "owner-offset", "no offset", "leave"),
    (OWNED + "prot = 'ro'", 5, "region.r.guest.ctl.prot", "owner-prot", "has prot ro", "leave"),
    (OWNED + "role = 'borrower'", 5, "region.r.guest.ctl.role", "role-not-owner", "owner", "leave"),
    (
        OWNED + "[region.r.guest.b]\nrole = 'owner'", 6, "region.r.guest.b.role", "role-not-owner",
        "owner is 'ctl'", 'owner = "b"',
    ),
    (
        REGION + "[region.r.guest.b]\nrole = 'owner'", 4, "region.r.guest.b.role", "role-not-owner",
        "has no owner", 'owner = "b"',
    ),
    (
        REGION + "[region.r.guest.b]\nrole = 'master'", 4, "region.r.guest.b.role", "bad-word",
        "'master'", "owner, borrower",
    ),
    (
        OWNED + "begin = 0xffff_ffff_ffff_f000", 5, "region.r.guest.ctl.begin", "beyond-64-bits",
        "begin . size is beyond", "smaller",
    ),
    (
        REGION + "[region.r.guest.b]\noffset = 0xfffffffffffff000\nsize = 8192", 4,
        "region.r.guest.b.offset", "beyond-64-bits", "offset . size is beyond", "smaller",
    ),
    (REGION + '[region.r.guest.""]', 3, 'region.r.guest.""', "bad-name", "guest's name", "xl"),
    (
        REGION + '[region.r.guest."a\\nb"]', 3, 'region.r.guest."a\\U0000000ab"', "bad-name",
        "guest's name", "",
    ),
    ("[guest.a]\nuuid = 'x'", 2, "guest.a.uuid", "bad-uuid", "'x' is no UUID", "8-4-4-4-12"),
    ("[guest.a]\ntype = 'x'", 2, "guest.a.type", "bad-word", "'x'", "pv, pvh, hvm"),
    ("[guest.a]\nmemory = 4096", 2, "guest.a.memory", "unaligned", "1 MiB", "0x100000"),
    ("[guest.a]\nhap = 0", 2, "guest.a.hap", "bad-type", "not true or false", "without quotes"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "key", "rule", "what", "hint"), BROKEN)
def test_what_is_wrong_is_named(
    text: str, line: int, key: str, rule: str, what: str, hint: str
) -> None:
    (error,) = wrong(text + "\n")
    assert error.message.startswith(f"r.toml:{line}: {key}: ")
    assert error.facts == {"file": "r.toml", "place": key, "line": line, "rule": rule}
    assert re.search(what, error.message)
    assert re.search(hint, error.hint)


def test_all_that_is_wrong_is_named_at_once() -> None:
    text = "".join(
        f"[region.r{index}]\nsize = 4097\nprot = 'x'\nz = 1\n[region.r{index}.guest.a]\nbegin = 1\n"
        for index in range(50)
    )
    errors = wrong(text)
    assert len(errors) == 200
    assert len({error.message for error in errors}) == 200


@pytest.mark.parametrize(
    ("data", "line", "what", "hint"),
    [
        (b"a = 1\n[region.r\0]", 2, "there is a NUL byte", "remove it"),
        (b"# \n\n# \xff\n", 3, "byte 0xff is not UTF-8", "UTF-8"),
        (b"\xef\xbb\xbf", 1, "byte order mark", "without it"),
        (b"#" * (MAX_BYTES + 1), 0, f"longer than {MAX_BYTES} bytes", "several"),
        (b"[region.r]\nsize = 1\nsize = 2\n", 3, "not TOML", "said twice"),
        (b"[region.r]\n[region.s]\n[region.r]\n", 3, "not TOML", "said twice"),
        (b"[region.r]\nsize = MiB\n", 2, "not TOML", "quotes"),
        (b"[region.r]\nsize\n", 2, "not TOML", "xshmd.toml"),
        (b"\n\na = [1,", 3, "not TOML", ""),
        (b"a = 2024-13-45T00:00:00\n", 0, "not TOML", ""),
        (b"a = " + b"9" * 5000, 0, "not TOML", ""),
        (b"\na = " + b"[" * 1000, 2, "nest deeper than 16", "xshmd.toml"),
        (b"\na = " + b"{a=" * 1000, 2, "nest deeper than 16", "xshmd.toml"),
        (b"\n" + b"a." * 100000 + b"a = 1", 2, "more than 16 parts", "xshmd.toml"),
        (b"\n[" + b"a . " * 100000 + b"a]", 2, "more than 16 parts", "xshmd.toml"),
        (b"\na = {" + b"a." * 100000 + b"a = 1}", 2, "more than 16 parts", "xshmd.toml"),
    ],
)
def test_what_cannot_be_read(data: bytes, line: int, what: str, hint: str) -> None:
    with pytest.raises(ConfigUnreadable) as caught:
        read_toml(data, file="r.toml")
    error = caught.value
    assert what in error.message
    assert hint in error.hint
    assert len(error.message) < 300
    if line:
        assert error.message.startswith(f"r.toml:{line}: ")
        assert error.facts["line"] == line
    assert error.facts["file"] == "r.toml"


@pytest.mark.parametrize(
    "text",
    ["x = {0}{1}", "{2} = 1", "[{2}]", "x = {{ {2} = 1 }}"],
    ids=["array", "key", "table", "inline table"],
)
def test_how_deep_is_too_deep(text: str) -> None:
    def at(depth: int) -> str:
        return text.format("[" * depth, "]" * depth, ".".join("abcdefghijklmnopqr"[:depth])) + "\n"

    assert all(error.facts["rule"] == "unknown-key" for error in wrong(at(16)))
    with pytest.raises(ConfigUnreadable, match=r"^r\.toml:1: .* (deeper|more) than 16"):
        read(at(18))


def test_ten_thousand_regions_are_read() -> None:
    text = "".join(f"[region.r{index}]\nsize = 4096\n" for index in range(10_000))
    assert len(read(text).regions) == 10_000


@settings(deadline=None)
@given(st.one_of(st.text(), st.text("[]{}.=\"'#\\\nab1 -,")))
def test_any_text_is_read_or_refused(text: str) -> None:
    said = None
    with contextlib.suppress(ConfigError, ConfigUnreadable):
        said = read_toml(text.encode("utf-8", "surrogatepass"), file="r.toml")
    assert said is None or not said.event_channels


# --- lines ------------------------------------------------------------------------------------

_VALUES = st.sampled_from([
    "1", "1.5", "'a # b'", '"\\"]"', '"""\n[x]\ny = 1\n"""', "'''\n'\nz = 2'''", "[\n 1, # ]\n 2]",
    "{a = 1, b.c = [2]}", '""""quoted""""', "2024-01-01T00:00:00.5", "[[], ['='], {}]",
    "[\n[1],\n  ['x'],\n]",
])  # fmt: skip
_PARTS = st.sampled_from(["a", "b", "1", "c-d", '"x.y"', "'z'"])


@settings(deadline=None)
@given(st.data())
def test_each_key_is_found_in_its_line(data: st.DataObject) -> None:
    text, expected = "", {}
    table: tuple[str, ...] = ()
    for number in range(data.draw(st.integers(0, 8))):
        key = (*data.draw(st.lists(_PARTS, max_size=2)), f"k{number}")
        space = data.draw(st.sampled_from(["", " ", "\t"]))
        written = f"{space}.{space}".join(key)
        line = text.count("\n") + 1
        if data.draw(st.booleans()):
            text += f"{space}[{space}{written}{space}]{space}# [c]\n"
            table = tuple(part.strip("\"'") for part in key)
            path = table
        else:
            text += f"{space}{written}{space}={space}{data.draw(_VALUES)} # a = '\n"
            path = (*table, *(part.strip("\"'") for part in key))
        expected[path] = line
        text += data.draw(st.sampled_from(["", "\n", "# x\n"]))
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return  # a table cannot be added to a value
    lines = key_lines(text, "f")
    assert {path: lines[path] for path in expected} == expected
    for path, line in expected.items():
        assert line_of(lines, (*path, "not", "there")) == line


def test_a_value_of_many_lines_ends_where_it_ends() -> None:
    text = 'a = [\n[1],\n]\nb = """\n[x]\n"""\nc = 1\n'
    assert key_lines(text, "f") == {("a",): 1, ("b",): 4, ("c",): 7}


# --- writing ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(declarations())
def test_what_is_written_reads_back(said: Declarations) -> None:
    text, losses = render_toml(said)
    assert losses == ()
    again = read(text)
    assert plain(again) == plain(said)


def test_what_is_written_looks_like_this() -> None:
    text = OWNED + "begin = 0x3a000000\n[region.r.guest.'a b']\noffset = 4096\n"
    assert render_toml(read(text)) == (
        '[region.r]\nsize = "8 KiB"\nowner = "ctl"\n\n'
        "[region.r.guest.ctl]\nbegin = 0x3a000000\n\n"
        '[region.r.guest."a b"]\noffset = "4 KiB"\n',
        (),
    )


def losses_of(said: Declarations) -> str:
    _, losses = render_toml(said)
    return "\n".join(losses)


def test_what_toml_cannot_say() -> None:
    owner = read(OWNED).guests[0]
    other = read(OWNED.replace("ctl", "b").replace("8192", "4096")).guests[0]
    twice = read("[region.r]\nexternal=true\n[region.r.guest.ctl]\nsize=4096\n").guests[0]
    system = RegionConfig(region_id="r", nr_frames=1)
    channel = EventChannel(guest="a", local_port=3, peer_guest="b", peer_port=4)
    assert "belongs to guest 'ctl'" in losses_of(Declarations(guests=(owner, other)))
    assert "belongs to the system" in losses_of(Declarations(guests=(owner,), regions=(system,)))
    assert "it is there twice" in losses_of(Declarations(guests=(owner, twice)))
    assert losses_of(Declarations(guests=(owner, owner))) == ""
    assert "it has another" in losses_of(Declarations(regions=(system, system)))
    assert "event channel 3 of 'a'" in losses_of(Declarations(event_channels=(channel,)))
    described = read("[guest.ctl]\nmemory = '1 MiB'\n").guests[0]
    assert "described twice" in losses_of(Declarations(guests=(owner, described)))


def test_an_order_that_decides_about_places_is_kept_or_its_loss_is_said() -> None:
    regions = "[region.{}]\nexternal = true\n[region.{}.guest.{}]\n"

    def of(guest: str, *ids: str) -> Any:
        return read("".join(regions.format(one, one, guest) for one in ids)).guests[0]

    kept = Declarations(guests=(of("a", "y", "z"), of("b", "x", "y")))
    text, losses = render_toml(kept)
    assert losses == ()
    assert re.findall(r"\[region\.(.)\]", text) == ["x", "y", "z"]
    lost = Declarations(guests=(of("a", "y", "z"), of("b", "z", "y")))
    assert "the order of the regions of guest 'b' is lost" in losses_of(lost)
    placed = [
        dataclasses.replace(
            guest,
            requests=tuple(
                dataclasses.replace(request, first_gfn=Gfn(index))
                for index, request in enumerate(guest.requests)
            ),
        )
        for guest in lost.guests
    ]
    assert losses_of(Declarations(guests=tuple(placed))) == ""


def test_the_docstring_is_an_example_that_holds() -> None:
    assert toml.__doc__ is not None
    example = "\n".join(
        line[4:]
        for line in toml.__doc__.splitlines()
        if line.startswith("    ") and not line.startswith(("    external", "    host_address"))
    )
    said = read(example.replace("offset = 0 ", "# "))
    assert [guest.name for guest in said.guests] == ["ctl"]
    assert set(re.findall(r"^([a-z_0-9]+) =", example, re.MULTILINE)) | {
        "external", "host_address", "guest",
    } == {*toml.REGION_KEYS, *toml.MEMBER_KEYS, *toml.GUEST_KEYS}  # fmt: skip
