# SPDX-License-Identifier: LGPL-2.1-or-later
"""The entries of static_shm: what each says, and every way in which one can be wrong."""

import dataclasses
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xshmd.config.findings import errors_of, raise_all
from xshmd.config.static_shm import ENOUGH_ERRORS, KEY, OLD_KEY, parse_entry, render_entry, requests
from xshmd.config.xlcfg import parse
from xshmd.errors import ConfigError
from xshmd.model import (
    UNPLACED,
    WHOLE_REGION,
    CachePolicy,
    Isolation,
    Lifetime,
    Place,
    Prot,
    ProtEnforcement,
    RegionRequest,
    RegionTerms,
    Role,
    Transport,
)
from xshmd.units import Gfn

PLACE = Place(file="vm.cfg", key="static_shm[0]", line=3)
BASE = "id=r, begin=0x100000, size=0x2000, role=borrower"
OWNER = "id=r, begin=0x100000, size=0x2000, role=owner"
V4 = "id=r, begin=0x100000, end=0x102000, role=slave"
RFC = "id=1, begin=0x20000, end=0x20010, granularity=4k, prot=RW, master"


def read(text: str, key: str = KEY) -> RegionRequest:
    errors: list[ConfigError] = []
    request = parse_entry(text, PLACE, errors, key=key)
    assert errors == []
    assert request is not None
    return request


def refuse(text: str, key: str = KEY) -> list[ConfigError]:
    errors: list[ConfigError] = []
    assert parse_entry(text, PLACE, errors, key=key) is None
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
        terms=RegionTerms(cache_policy=CachePolicy.ARM_NORMAL),
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
        (" id = r\t, begin = 4096,size=4096 ,\nrole =borrower ", "first_gfn", 1),
        (BASE + ",", "first_gfn", 0x100),
        (BASE.replace("begin=0x100000, ", ""), "first_gfn", UNPLACED),
        (BASE.replace("begin=0x100000, ", ""), "nr_frames", 2),
        (BASE.replace("size=0x2000, ", ""), "nr_frames", WHOLE_REGION),
        (BASE.replace("size=0x2000, ", ""), "first_gfn", 0x100),
        ("id=r, role=borrower, offset=0x3000", "offset_frames", 3),
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
    (BASE.replace("id=r, ", ""), "missing-key", "'id' is missing", "id=ID1"),
    (OWNER.replace("size=0x2000, ", ""), "missing-key", "'size' is missing", "in bytes"),
    (BASE.replace(", role=borrower", ""), "missing-key", "'role' is missing", "role=owner in the"),
    (BASE + ", id=r", "key-twice", "'id' is given twice", "leave one"),
    (BASE + ", size=0x3000", "key-twice", "'size' is given twice", "leave one"),
    (BASE + ", rol=owner", "unknown-key", "unknown key 'rol'", "did you mean 'role'?"),
    (BASE + ", Size=1", "unknown-key", "unknown key 'Size'", "did you mean 'size'?"),
    (BASE + ", gran=4k", "unknown-key", "unknown key 'gran'", "did you mean 'granularity'?"),
    (BASE + ", zzz=1", "unknown-key", "unknown key 'zzz'", "possible are id, begin, size, role"),
    (BASE + ", =1", "unknown-key", "unknown key ''", "possible are id, begin"),
    (BASE + ", master=1", "unknown-key", "unknown key 'master'", ""),
    (BASE + ", " + "z" * 41 + "=1", "unknown-key", "unknown key '" + "z" * 37 + "...'", ""),
    (BASE + ", " + "z" * 40 + "=1", "unknown-key", "unknown key '" + "z" * 40 + "'", ""),
    (BASE + ", \x1b[1m=4k", "unknown-key", r"unknown key '\x1b[1m'", ""),
    (BASE + ", slave", "no-value", "'slave' stands alone", "role=borrower"),
    (BASE + ", prot", "no-value", "'prot' has no value", "key=value"),
    (BASE + ", prot=", "no-value", "'prot' has no value", ""),
    (BASE + ",,", "empty-part", "nothing before or between commas", "as in"),
    ("," + BASE, "empty-part", "nothing before or between commas", "as in"),
    (BASE.replace("id=r", "id=a.b"), "bad-id", "id 'a.b' has other than", "rename"),
    (BASE.replace("id=r", "id=é"), "bad-id", "id 'é' has other than", "rename"),
    (BASE.replace("id=r", "id=" + "a" * 129), "bad-id", "has 129 characters", "at most 128"),
    (BASE.replace("borrower", "owener"), "bad-word", "role=owener is not known", "owner, borrower"),
    (BASE.replace("borrower", "Owner"), "bad-word", "role=Owner is not known", "say owner"),
    (BASE + ", prot=RO", "bad-word", "prot=RO is not known", "say ro"),
    (BASE + ", prot=rwx", "bad-word", "prot=rwx is not known", "rw, ro"),
    (BASE + ", prot=wo", "no-such-prot", "prot=wo is not possible", "say prot=rw"),
    (BASE + ", prot=X", "no-such-prot", "prot=X is not possible: Xen maps", "say prot=rw"),
    (OWNER + ", cache_policy=x86", "bad-word", "cache_policy=x86 is", "x86_normal"),
    (OWNER + ", lifetime=forever", "bad-word", "lifetime=forever is", "owner, members, system"),
    (OWNER + ", transport=Grant", "bad-word", "transport=Grant is", "say grant"),
    (OWNER + ", isolation=none", "bad-word", "isolation=none is", "group, sealed, region"),
    (OWNER + ", prot_enforcement=no", "bad-word", "prot_enforcement=no is", "required, advisory"),
    (OWNER + ", backing=host", "unknown-key", "unknown key 'backing'", ""),
    (
        BASE.replace("0x100000", "0x100001"),
        "unaligned",
        "begin=0x100001 is not a multiple of 4 KiB",
        "0x100000",
    ),
    (BASE.replace("0x2000", "100"), "unaligned", "size=100 is not a multiple of 4 KiB", "0x1000"),
    (BASE + ", offset=5000", "unaligned", "offset=5000 is not a multiple", "0x1000 or 0x2000"),
    (BASE.replace("0x2000", "4K"), "bad-number", "size=4K is not a number of bytes", "a unit"),
    (BASE.replace("0x2000", "-4096"), "bad-number", "size=-4096 is not a number", ""),
    (BASE.replace("0x2000", "010000"), "bad-number", "size=010000 is not a", "leading zero"),
    (BASE.replace("0x2000", "0"), "size-zero", "size=0", "0x1000 or more"),
    (BASE.replace("0x100000", "0x10000000000000000"), "beyond-64-bits", "does not fit", "smaller"),
    (BASE.replace("0x100000", "9" * 5000), "beyond-64-bits", "does not fit in 64 bits", "smaller"),
    (
        BASE.replace("0x100000", "0xfffffffffffff000"),
        "beyond-64-bits",
        "begin + size is beyond",
        "lower",
    ),
    (BASE + ", offset=0xfffffffffffff000", "beyond-64-bits", "offset + size is beyond", "smaller"),
    (OWNER + ", offset=0", "owner-offset", "an owner has no offset", "role=borrower"),
    (
        BASE + ", cache_policy=x86_normal",
        "owners-only",
        "a borrower has no cache_policy",
        "owner's",
    ),
    (BASE + ", lifetime=members", "owners-only", "a borrower has no lifetime", "owner's entry"),
    (BASE + ", transport=grant", "owners-only", "a borrower has no transport", "owner's entry"),
    (BASE + ", isolation=nonsense", "owners-only", "a borrower has no isolation", "owner's entry"),
    (BASE + ", prot_enforcement=advisory", "owners-only", "a borrower has no prot_enf", "owner's"),
    (
        BASE + ", end=0x200",
        "mixed-forms",
        "'size' is of the final form, 'end' of the proposal of 2017 and the series of 2018",
        "write all of it as in",
    ),
    (BASE + ", granularity=4k", "mixed-forms", "'granularity' of the proposal of 2017", "size="),
    (BASE + ", master", "mixed-forms", "'master' alone of the proposal of 2017", "role=owner"),
    (V4.replace("slave", "borrower"), "mixed-forms", "'role=borrower' of the final form", "size="),
    (V4 + ", granularity=4k", "mixed-forms", "'role' is of the series of 2018", "size="),
    (RFC + ", offset=0x1000", "mixed-forms", "'offset' of the series of 2018 and the final", ""),
    (
        RFC + ", cache_policy=x86_normal",
        "mixed-forms",
        "'cache_policy' of the series of 2018 and the final form",
        "size=",
    ),
    (V4.replace("slave", "owner"), "mixed-forms", "'role=owner' of the final form", "size="),
    (RFC + ", lifetime=members", "mixed-forms", "'lifetime' of the final form", "size="),
    (
        "id=1, begin=0x20000, end=0x20010, prot=rw",
        "ambiguous-form",
        "bytes (the series of 2018) or frame numbers (the proposal of 2017)",
        "role=slave for bytes, granularity=4k for frames",
    ),
    (V4.replace("0x102000", "0x100000"), "size-zero", "end=0x100000 is not after begin", "after"),
    (V4.replace("0x102000", "0xff000"), "size-zero", "end=0xff000 is not after begin", "after"),
    (V4.replace("0x102000", "0x102001"), "unaligned", "end=0x102001 is not a multiple", "0x103000"),
    (V4.replace("begin=0x100000, ", ""), "missing-key", "'begin' is missing", "begins"),
    (RFC.replace("0x20010", "131088"), "bad-number", "end=131088 is not a frame number", "0x20000"),
    (RFC.replace("0x20010", "0x20000"), "size-zero", "end=0x20000 is not after", "first"),
    (RFC.replace("0x20010", "0x10000000000001"), "beyond-64-bits", "end=0x10000000000001 does", ""),
    (RFC.replace("granularity=4k, ", ""), "missing-key", "'granularity' is missing", "master"),
    (RFC.replace("4k", "2M"), "bad-granularity", "granularity=2M is not possible", "4k"),
    (RFC.replace("RW", "WO"), "no-such-prot", "prot=WO is not possible", "say prot=rw"),
    (RFC.replace("RW", "X"), "no-such-prot", "prot=X is not possible", "say prot=rw"),
    (RFC.replace("RW", "WR"), "bad-word", "prot=wr is not known", "rw, ro"),
    (RFC.replace("id=1", "id=01"), "bad-number", "id=01 is not an unsigned number", "name"),
    (RFC.replace("id=1", "id=-1"), "bad-id", "id '-1' has other than", "rename"),
    (RFC + ", master", "key-twice", "'master' is given twice", "leave one"),
]


@pytest.mark.parametrize(("text", "rule", "what", "hint"), WRONG)
def test_one_thing_wrong_is_one_error_with_its_place(
    text: str, rule: str, what: str, hint: str
) -> None:
    (error,) = refuse(text)
    assert error.message.startswith("vm.cfg:3: static_shm[0]: ")
    assert what in error.message
    assert hint in error.hint
    place = {"file": "vm.cfg", "place": "static_shm[0]", "line": 3}
    assert error.facts == {"rule": rule, **place}
    assert error.message.isprintable()


def test_the_terms_that_the_published_syntax_cannot_say() -> None:
    text = OWNER + ", lifetime=members, transport=grant, isolation=region, prot=ro"
    assert read(text + ", prot_enforcement=advisory").terms == RegionTerms(
        prot=Prot.RO,
        lifetime=Lifetime.MEMBERS,
        transport=Transport.GRANT,
        isolation=Isolation.REGION,
        prot_enforcement=ProtEnforcement.ADVISORY,
    )
    assert read(OWNER).terms == RegionTerms()
    assert read(BASE + ", prot=ro").terms == RegionTerms()


@pytest.mark.parametrize(
    ("text", "same"),
    [
        (
            "id=ID1, begin=0x100000, end=0x200000, role=master, cache_policy=x86_normal",
            "id=ID1, begin=0x100000, size=0x100000, role=owner, cache_policy=x86_normal",
        ),
        (
            "id=ID1, offset = 0x1000, begin=0x500000, end=0x600000, role=slave, prot=rw",
            "id=ID1, begin=0x500000, size=0x100000, role=borrower, offset=0x1000",
        ),
        (
            "id=ID2, offset=0x10000, begin=0x690000, end=0x800000",
            "id=ID2, begin=0x690000, size=0x170000, role=borrower, offset=0x10000",
        ),
        (
            # Between the two: Xilinx's 2018.3.
            "id=ID1, begin=0x100000, size=0x100000, role=master",
            "id=ID1, begin=0x100000, size=0x100000, role=owner",
        ),
        (
            "id=ID1, begin=0x0, end=0xfffffffffffff000, role=slave",
            "id=ID1, begin=0, size=0xfffffffffffff000, role=borrower",
        ),
    ],
)
def test_the_series_of_2018(text: str, same: str) -> None:
    assert read(text) == read(same)


@pytest.mark.parametrize("key", [KEY, OLD_KEY])
@pytest.mark.parametrize(
    ("text", "same"),
    [
        (
            "id = 1, begin = 0x20000, end = 0x20010, granularity = 4k, prot = RW, master",
            "id=1, begin=0x20000000, size=0x10000, role=owner",
        ),
        (
            "id = ID1, begin = 0x3a000, end = 0x3A001, granularity = 4K, prot = RO, master",
            "id=ID1, begin=0x3a000000, size=0x1000, role=owner, prot=ro",
        ),
        (
            "id = 0x2, begin = 0x20000, end = 0x20010, granularity = 4k, prot = rO",
            "id=2, begin=0x20000000, size=0x10000, role=borrower, prot=ro",
        ),
        (
            "id=1, begin=0xffffffffffffe, end=0xfffffffffffff, granularity=4k",
            "id=1, begin=0xffffffffffffe000, size=0x1000, role=borrower",
        ),
    ],
)  # fmt: skip
def test_the_proposal_of_2017(key: str, text: str, same: str) -> None:
    assert read(text, key) == read(same)


def test_the_last_frame_of_64_bits() -> None:
    request = read("id=1, begin=0x0, end=0x10000000000000", OLD_KEY)
    assert (request.first_gfn, request.nr_frames) == (0, 1 << 52)


def test_a_slave_of_2017_says_no_granularity() -> None:
    text = "id=1, begin=0x20000, end=0x20010, prot=RW"
    assert read(text, OLD_KEY) == read("id=1, begin=0x20000000, size=0x10000, role=borrower")
    assert refuse(text)[0].facts["rule"] == "ambiguous-form"


def test_an_entry_of_2017_is_of_a_whole_region() -> None:
    assert read("id=1, begin=0x30000, end=0x30010, granularity=4k, prot=RO").is_whole
    assert not read(V4).is_whole
    assert not read(BASE).is_whole


def test_the_key_of_2017_has_entries_of_2017() -> None:
    for text in (BASE, V4):
        (error,) = refuse(text, OLD_KEY)
        assert error.facts["rule"] == "mixed-forms"
        assert "the key static_shared_mem is of the proposal of 2017" in error.message


def test_all_that_is_wrong_is_said() -> None:
    errors = refuse("id=a.b, begin=1, size=0, rolle=owner, offset=q, lifetime=never")
    assert sorted(str(error.facts["rule"]) for error in errors) == [
        "bad-id", "bad-number", "bad-word", "missing-key", "size-zero", "unaligned", "unknown-key",
    ]  # fmt: skip


def test_an_empty_entry_says_what_it_needs() -> None:
    missing = [error.message.split("'")[1] for error in refuse("")[1:]]
    assert missing == ["id", "size", "role"]


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


def test_after_a_hundred_errors_a_list_is_not_read_on() -> None:
    """What is wrong with a list of ten thousand need not take a message, nor memory, for each."""
    found, errors = from_value("[" + "'id=r',\n" * 10_000 + "]")
    assert found == ()
    assert ENOUGH_ERRORS < len(errors) < ENOUGH_ERRORS + 5
    assert re.search(r"static_shm\[\d+\]: this entry and the 99\d\d after it", errors[-1].message)
    assert errors[-1].facts["rule"] == "too-much-wrong"


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


def test_the_older_key_is_named_in_places() -> None:
    errors: list[ConfigError] = []
    setting = parse(f"{OLD_KEY} = ['{RFC}', 'id=1']", "vm.cfg")[OLD_KEY]
    (request,) = requests(setting, "vm.cfg", errors, key=OLD_KEY)
    assert str(request.place) == "vm.cfg:1: static_shared_mem[0]"
    assert {error.facts["place"] for error in errors} == {"static_shared_mem[1]"}


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
    errors = refuse(BASE + ", prot=x, offset=1")
    errors += refuse(BASE + ", zzz=1")
    with pytest.raises(ConfigError) as caught:
        raise_all(errors)
    assert "; and 2 more: " in caught.value.message
    for error in errors:
        assert error.one_line() in caught.value.message
    assert caught.value.facts == errors[0].facts
    assert errors_of(caught.value) == tuple(errors)


frames = st.integers(0, (1 << 51) - 1)


prots = st.sampled_from(Prot)
policies = st.none() | st.sampled_from(CachePolicy)


@st.composite
def some_requests(draw: st.DrawFn) -> RegionRequest:
    role = draw(st.sampled_from(Role))
    prot, policy = draw(prots), draw(policies) if role is Role.OWNER else None
    size = frames.map(lambda some: some + 1)
    return RegionRequest(
        region_id=draw(st.from_regex(r"[_a-zA-Z0-9][_a-zA-Z0-9@-]{0,127}", fullmatch=True)),
        first_gfn=draw(st.just(UNPLACED) | frames.map(Gfn)),
        nr_frames=draw(size if role is Role.OWNER else st.just(WHOLE_REGION) | size),
        role=role,
        prot=prot,
        offset_frames=draw(frames) if role is Role.BORROWER else 0,
        cache_policy=policy,
        terms=draw(
            st.builds(
                RegionTerms,
                prot=st.just(prot),
                cache_policy=st.just(policy),
                lifetime=st.none() | st.sampled_from(Lifetime),
                transport=st.sampled_from(Transport),
                isolation=st.none() | st.sampled_from(Isolation),
                prot_enforcement=st.sampled_from(ProtEnforcement),
            )
        )
        if role is Role.OWNER
        else RegionTerms(),
        place=PLACE,
    )


def test_the_terms_of_a_borrower_are_not_rendered() -> None:
    request_ = read(BASE)
    with_terms = dataclasses.replace(request_, terms=RegionTerms(lifetime=Lifetime.MEMBERS))
    assert read(render_entry(with_terms)) == request_


@given(some_requests())
def test_what_is_rendered_is_read_back(request_: RegionRequest) -> None:
    assert read(render_entry(request_)) == request_


@given(
    st.text(st.sampled_from("id=begin,size role0x1_end master")) | st.text(),
    st.sampled_from([KEY, OLD_KEY]),
)
def test_any_text_is_a_request_or_has_errors(text: str, key: str) -> None:
    errors: list[ConfigError] = []
    assert (parse_entry(text, PLACE, errors, key=key) is None) == bool(errors)


words = st.sampled_from([
    "id=1", "id=r", "begin=0x100000", "begin=0x100", "end=0x200000", "end=0x200", "size=0x1000",
    "role=owner", "role=slave", "granularity=4k", "master", "prot=rw", "prot=RW", "offset=0x1000",
    "lifetime=members", "cache_policy=x86_normal",
])  # fmt: skip


@given(st.lists(words, unique=True), st.randoms(), st.sampled_from([KEY, OLD_KEY]))
def test_the_order_of_words_does_not_matter(
    chosen: list[str], random: random.Random, key: str
) -> None:
    def outcome(parts: list[str]) -> object:
        errors: list[ConfigError] = []
        request = parse_entry(", ".join(parts), PLACE, errors, key=key)
        return request or {error.facts["rule"] for error in errors}

    shuffled = sorted(chosen, key=lambda _: random.random())
    keys = [part.partition("=")[0] for part in chosen]
    if len(set(keys)) == len(keys):
        assert outcome(chosen) == outcome(shuffled)
