# SPDX-License-Identifier: LGPL-2.1-or-later
"""The entries of static_shm: what each says, and every way in which one can be wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xshmd.config.findings import errors_of, raise_all
from xshmd.config.static_shm import KEY, parse_entry, render_entry, requests
from xshmd.config.xlcfg import parse
from xshmd.errors import ConfigError
from xshmd.model import CachePolicy, Place, Prot, RegionRequest, Role
from xshmd.units import Gfn

PLACE = Place(file="vm.cfg", key="static_shm[0]", line=3)
BASE = "id=r, begin=0x100000, size=0x2000, role=borrower"


def read(text: str) -> RegionRequest:
    errors: list[ConfigError] = []
    request = parse_entry(text, PLACE, errors)
    assert errors == []
    assert request is not None
    return request


def refuse(text: str) -> list[ConfigError]:
    errors: list[ConfigError] = []
    assert parse_entry(text, PLACE, errors) is None
    return errors


def test_the_published_examples() -> None:
    owner = read(
        "id=ID1, begin=0x100000, size=0x100000, role=owner, prot=rw, cache_policy=ARM_normal"
    )
    assert owner == RegionRequest(
        region_id="ID1",
        first_gfn=Gfn(0x100),
        nr_frames=0x100,
        role=Role.OWNER,
        prot=Prot.RW,
        cache_policy=CachePolicy.ARM_NORMAL,
        place=PLACE,
    )
    borrower = read("id=ID1, offset=0x1000, begin=0x500000, size=0x2000, role=borrower")
    assert (borrower.role, borrower.offset_frames, borrower.nr_frames) == (Role.BORROWER, 1, 2)
    assert (borrower.prot, borrower.cache_policy) == (Prot.RW, None)


@pytest.mark.parametrize(
    ("text", "attribute", "value"),
    [
        (BASE.replace("borrower", "master"), "role", Role.OWNER),
        (BASE.replace("borrower", "slave"), "role", Role.BORROWER),
        (BASE.replace("0x100000", "1048576"), "first_gfn", 0x100),
        (BASE.replace("0x100000", "0X10A000"), "first_gfn", 0x10A),
        (BASE.replace("0x100000", "0"), "first_gfn", 0),
        (" id = r\t, begin = 4096,size=4096 ,role =borrower ", "first_gfn", 1),
        (BASE + ", prot=ro", "prot", Prot.RO),
        (BASE + ", offset=0", "offset_frames", 0),
        (BASE + ", offset=0xffffffffffffe000", "offset_frames", (1 << 52) - 2),
        (BASE.replace("id=r", "id=_9Z" + "a" * 125), "region_id", "_9Z" + "a" * 125),
        (BASE.replace("0x100000", "0xffffffffffffe000"), "end_gfn", 1 << 52),
    ],
)
def test_what_may_be_written_otherwise(text: str, attribute: str, value: object) -> None:
    assert getattr(read(text), attribute) == value


WRONG = [
    (BASE.replace("id=r, ", ""), "'id' is missing", "id=ID1"),
    (BASE.replace("begin=0x100000, ", ""), "'begin' is missing", "bytes"),
    (BASE.replace("size=0x2000, ", ""), "'size' is missing", "bytes"),
    (BASE.replace(", role=borrower", ""), "'role' is missing", "role=owner in the one guest"),
    (BASE + ", id=r", "'id' is given twice", "leave one"),
    (BASE + ", size=0x3000", "'size' is given twice", "leave one"),
    (BASE + ", rol=owner", "unknown key 'rol'", "did you mean 'role'?"),
    (BASE + ", Size=1", "unknown key 'Size'", "did you mean 'size'?"),
    (BASE + ", zzz=1", "unknown key 'zzz'", "possible are id, begin"),
    (BASE + ", =1", "unknown key ''", "possible are id, begin"),
    (BASE + ", master=1", "unknown key 'master'", ""),
    (BASE + ", " + "z" * 41 + "=1", "unknown key '" + "z" * 37 + "...'", ""),
    (BASE + ", " + "z" * 40 + "=1", "unknown key '" + "z" * 40 + "'", ""),
    (BASE + ", end=0x200", "unknown key 'end'", "say size"),
    (BASE + ", granularity=4k", "unknown key 'granularity'", "leave it out"),
    (BASE + ", \x1b[1m=4k", r"unknown key '\x1b[1m'", ""),
    (BASE + ", master", "'master' stands alone", "role=owner"),
    (BASE + ", prot", "'prot' has no value", "key=value"),
    (BASE + ", prot=", "'prot' has no value", ""),
    (BASE + ",", "nothing before, after or between commas", "as in"),
    (BASE.replace("id=r", "id=a-b"), "id 'a-b' has other than", "rename"),
    (BASE.replace("id=r", "id=é"), "id 'é' has other than", "rename"),
    (BASE.replace("id=r", "id=" + "a" * 129), "has 129 characters", "at most 128"),
    (BASE.replace("borrower", "owener"), "role=owener is not known", "owner, borrower"),
    (BASE.replace("borrower", "Owner"), "role=Owner is not known", "say owner"),
    (BASE + ", prot=RO", "prot=RO is not known", "say ro"),
    (BASE + ", prot=rwx", "prot=rwx is not known", "rw, ro"),
    (BASE.replace("borrower", "owner, cache_policy=x86"), "cache_policy=x86 is", "x86_normal"),
    (BASE.replace("0x100000", "0x100001"), "begin=0x100001 is not a multiple of 4 KiB", "0x100000"),
    (BASE.replace("0x2000", "100"), "size=100 is not a multiple of 4 KiB", "say 0x1000"),
    (BASE + ", offset=5000", "offset=5000 is not a multiple", "0x1000 or 0x2000"),
    (BASE.replace("0x2000", "4K"), "size=4K is not a number of bytes", "without a unit"),
    (BASE.replace("0x2000", "-4096"), "size=-4096 is not a number", ""),
    (BASE.replace("0x2000", "010000"), "size=010000 is not a number", "leading zero"),
    (BASE.replace("0x2000", "0"), "size=0", "0x1000 or more"),
    (BASE.replace("0x100000", "0x10000000000000000"), "does not fit in 64 bits", "smaller"),
    (BASE.replace("0x100000", "9" * 5000), "does not fit in 64 bits", "smaller"),
    (BASE.replace("0x100000", "0xfffffffffffff000"), "begin + size is beyond 64 bits", "lower"),
    (BASE + ", offset=0xfffffffffffff000", "offset + size is beyond 64 bits", "smaller"),
    (BASE.replace("borrower", "owner, offset=0"), "an owner has no offset", "role=borrower"),
    (BASE + ", cache_policy=x86_normal", "a borrower has no cache_policy", "owner's entry"),
]


@pytest.mark.parametrize(("text", "what", "hint"), WRONG)
def test_one_thing_wrong_is_one_error_with_its_place(text: str, what: str, hint: str) -> None:
    (error,) = refuse(text)
    assert error.message.startswith("vm.cfg:3: static_shm[0]: ")
    assert what in error.message
    assert hint in error.hint
    assert error.facts == {"file": "vm.cfg", "place": "static_shm[0]", "line": 3}
    assert error.message.isprintable()


def test_all_that_is_wrong_is_said() -> None:
    errors = refuse("id=a-b, begin=1, size=0, rolle=owner, offset=q")
    assert [error.message.partition("[0]: ")[2][:14] for error in errors] == [
        "unknown key 'r",
        "'role' is miss",
        "id 'a-b' has o",
        "begin=1 is not",
        "offset=q is no",
        "size=0: a regi",
    ]


def test_an_empty_entry_says_what_it_needs() -> None:
    assert [error.message[-7:] for error in refuse("")[1:]] == ["missing"] * 4


def from_value(text: str) -> tuple[tuple[RegionRequest, ...], list[ConfigError]]:
    errors: list[ConfigError] = []
    return requests(parse(f"\n{KEY} = {text}\n", "vm.cfg")[KEY], "vm.cfg", errors), errors


def test_each_entry_has_its_own_place() -> None:
    found, errors = from_value(f"['{BASE}',\n# c\n'{BASE.replace('id=r', 'id=s')}']")
    assert errors == []
    assert [str(one.place) for one in found] == [
        "vm.cfg:2: static_shm[0]",
        "vm.cfg:4: static_shm[1]",
    ]


def test_a_string_is_no_list_of_entries() -> None:
    found, (error,) = from_value(f"'{BASE}'")
    assert found == ()
    assert error.message == "vm.cfg:2: static_shm: static_shm is a string, not a list"
    assert "static_shm = [" in error.hint


def test_an_entry_that_is_a_list() -> None:
    found, (error,) = from_value(f"['{BASE}', ['id=s']]")
    assert [one.region_id for one in found] == ["r"]
    assert error.message == "vm.cfg:2: static_shm[1]: the entry is a list, not a string"


def test_an_entry_that_is_wrong_is_left_out() -> None:
    found, (error,) = from_value(f"['{BASE}', '{BASE}, prot=x']")
    assert [one.place.key for one in found] == ["static_shm[0]"]
    assert error.facts["place"] == "static_shm[1]"


def test_one_id_twice_in_a_configuration() -> None:
    _, (error,) = from_value(f"['{BASE}',\n'{BASE}']")
    assert error.message == (
        "vm.cfg:3: static_shm[1]: region 'r' is already in static_shm[0] (line 2)"
    )


def test_no_entries_at_all() -> None:
    assert from_value("[]") == ((), [])


def test_one_error_is_raised_as_it_is() -> None:
    (error,) = refuse(BASE + ", prot=x")
    raise_all([])
    with pytest.raises(ConfigError) as caught:
        raise_all([error])
    assert caught.value is error
    assert errors_of(error) == (error,)


def test_several_errors_are_raised_as_one_and_can_be_had_each() -> None:
    errors = refuse(BASE + ", prot=x, end=1")
    errors += refuse(BASE + ", zzz=1")
    with pytest.raises(ConfigError) as caught:
        raise_all(errors)
    assert "; and 2 more: " in caught.value.message
    for error in errors:
        assert error.one_line() in caught.value.message
    assert caught.value.facts == errors[0].facts
    assert errors_of(caught.value) == tuple(errors)


frames = st.integers(0, (1 << 51) - 1)


@given(
    st.builds(
        RegionRequest,
        region_id=st.from_regex(r"[_a-zA-Z0-9]{1,128}", fullmatch=True),
        first_gfn=frames.map(Gfn),
        nr_frames=frames.map(lambda frames: frames + 1),
        role=st.just(Role.OWNER),
        prot=st.sampled_from(Prot),
        cache_policy=st.none() | st.sampled_from(CachePolicy),
        place=st.just(PLACE),
    )
    | st.builds(
        RegionRequest,
        region_id=st.just("r"),
        first_gfn=frames.map(Gfn),
        nr_frames=frames.map(lambda frames: frames + 1),
        role=st.just(Role.BORROWER),
        prot=st.sampled_from(Prot),
        offset_frames=frames,
        place=st.just(PLACE),
    )
)
def test_what_is_rendered_is_read_back(request_: RegionRequest) -> None:
    assert read(render_entry(request_)) == request_


@given(st.text(st.sampled_from("id=begin,size role0x1_")) | st.text())
def test_any_text_is_a_request_or_has_errors(text: str) -> None:
    errors: list[ConfigError] = []
    assert (parse_entry(text, PLACE, errors) is None) == bool(errors)
