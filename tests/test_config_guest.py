# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is taken from a guest's configuration, and that only shared memory can make it an error."""

import tracemalloc

import pytest
from flat import LINEAR, growth

from xshmd.config.findings import errors_of
from xshmd.config.guest import c_long, guest_config
from xshmd.errors import ConfigError, ConfigUnreadable
from xshmd.machine import Arch
from xshmd.model import GuestConfig, GuestType, Place
from xshmd.policy.rules import check_config

ENTRY = 'static_shm = ["id=r, begin=0x1000000000, size=0x1000, role=owner"]\n'
UUID = "01234567-89ab-cdef-0123-456789abcdef"


def read(text: str, arch: Arch | None = Arch.X86_64, own_name: str = "") -> GuestConfig:
    return guest_config(
        f'{text}\nname = "vm"\n' + ENTRY, file="vm.cfg", arch=arch, own_name=own_name
    )


def test_all_that_matters() -> None:
    config = guest_config(
        f'name="vm"\nuuid="{UUID.upper()}"\ntype="hvm"\nmemory=64\nmaxmem="0x100"\nhap=0\n'
        "altp2m='external'\nnestedhvm=1\nvcpus=2\n" + ENTRY,
        file="vm.cfg",
    )
    (request,) = config.requests
    assert str(request.place) == "vm.cfg:10: static_shm[0]"
    assert config == GuestConfig(
        name="vm",
        uuid=UUID,
        guest_type=GuestType.HVM,
        memory_mib=64,
        maxmem_mib=256,
        hap=False,
        altp2m=True,
        nestedhvm=True,
        requests=(request,),
        place=Place(file="vm.cfg", key="name", line=1),
    )


def test_what_is_not_said() -> None:
    config = guest_config("name='vm'\n", file="vm.cfg")
    assert config == GuestConfig(name="vm", place=Place(file="vm.cfg", key="name", line=1))
    assert config.requests == ()


def test_a_name_may_be_a_number() -> None:
    assert guest_config("name = 12\n", file="f").name == "12"


@pytest.mark.parametrize(
    ("text", "arch", "expected"),
    [
        ("", Arch.X86_64, GuestType.PV),
        ("", Arch.ARM64, GuestType.PVH),
        ("", None, GuestType.PVH),
        ("type='pv'", Arch.X86_64, GuestType.PV),
        ("type='pv'", None, GuestType.PV),
        ("type='pv'", Arch.ARM64, GuestType.PVH),
        ("type='hvm'", Arch.ARM64, GuestType.PVH),
        ("type='pvh'", Arch.X86_64, GuestType.PVH),
        ("type='hvm'", Arch.X86_64, GuestType.HVM),
        ("type='h'", Arch.X86_64, GuestType.HVM),
        ("type='p'", Arch.X86_64, GuestType.PV),
        ("builder='hvm'", Arch.X86_64, GuestType.HVM),
        ("builder='generic'", Arch.X86_64, GuestType.PV),
        ("builder='hvm'\ntype='hvm'", Arch.X86_64, GuestType.HVM),
    ],
)
def test_type(text: str, arch: Arch | None, expected: object) -> None:
    assert read(text, arch).guest_type is expected


@pytest.mark.parametrize(
    ("text", "attribute", "expected"),
    [
        ("hap=1", "hap", True),
        ("hap='0'", "hap", False),
        ("nestedhvm=0", "nestedhvm", False),
        ("altp2m=0", "altp2m", False),
        ("altp2m=3", "altp2m", True),
        ("altp2m='disabled'", "altp2m", False),
        ("altp2m='mixed'", "altp2m", True),
        ("altp2mhvm=1", "altp2m", True),
        ("altp2mhvm=0", "altp2m", False),
        ("memory=010", "memory_mib", 8),
        ("memory=0", "memory_mib", 0),
        ("pvshim=0\ntype='pvh'", "hap", True),
        ("pvshim=1\ntype='hvm'", "hap", True),
    ],
)
def test_flags_and_numbers_as_xl_reads_them(text: str, attribute: str, expected: object) -> None:
    assert getattr(read(text), attribute) == expected


WRONG = [
    ("uuid='x'", "vm.cfg:1: uuid: it is no UUID"),
    (f"uuid='{UUID}0'", "vm.cfg:1: uuid: it is no UUID"),
    ("type='xen'", "vm.cfg:1: type: 'xen' is not known"),
    ("builder='linux'", "vm.cfg:1: builder: 'linux' is not known"),
    ("type='pvh'\nbuilder='hvm'", "vm.cfg:2: builder: it contradicts type=pvh"),
    ("type='pvh'\npvshim=1", "vm.cfg:2: pvshim: the PV guest inside"),
    ("hap='yes'", "vm.cfg:1: hap: 'yes' is not a number"),
    ("hap=[1]", "vm.cfg:1: hap: hap is a list, not a single value"),
    ("memory=[64]", "vm.cfg:1: memory: memory is a list"),
    ("memory='64M'", "vm.cfg:1: memory: '64M' is not a number"),
    ("memory='-1'", "vm.cfg:1: memory: -1 MiB is less than nothing"),
    ("maxmem=08", "vm.cfg:1: maxmem: '08' is not a number"),
    ("memory+=64", "vm.cfg:1: memory: xl takes no number from '+='"),
    ("altp2m='on'", "vm.cfg:1: altp2m: 'on' is not known"),
    ("altp2m=4", "vm.cfg:1: altp2m: '4' is not known"),
    ("nestedhvm='x'", "vm.cfg:1: nestedhvm: 'x' is not a number"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_wrong_beside_shared_memory(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert caught.value.message.startswith(message)
    assert caught.value.hint


@pytest.mark.parametrize("text", [text for text, _ in WRONG])
def test_without_shared_memory_nothing_else_is_looked_at(text: str) -> None:
    assert guest_config(f"{text}\nname='vm'\n", file="vm.cfg").name == "vm"
    assert guest_config(f"{text}\nname='vm'\nstatic_shm=[]\n", file="vm.cfg").name == "vm"


@pytest.mark.parametrize("text", ["", "name=''\n", "name=['vm']\n"])
def test_a_guest_has_a_name(text: str) -> None:
    with pytest.raises(ConfigError, match="the guest has no name"):
        guest_config(text, file="vm.cfg")


def test_our_own_files_need_neither_name_nor_type() -> None:
    config = guest_config(ENTRY, file="vm.cfg", arch=Arch.X86_64, own_name="vm")
    assert (config.name, config.guest_type) == ("vm", GuestType.PVH)
    assert read("type='pv'", own_name="x").guest_type is GuestType.PV
    assert read("", own_name="x").name == "vm"


def test_the_key_of_2017() -> None:
    text = "name='vm'\nstatic_shared_mem=['id=1, begin=0x20000, end=0x20010, prot=RW']\n"
    (request,) = guest_config(text, file="vm.cfg").requests
    assert (request.region_id, request.first_gfn, request.nr_frames) == ("1", 0x20000, 16)
    assert str(request.place) == "vm.cfg:2: static_shared_mem[0]"
    both = guest_config(text + ENTRY, file="vm.cfg")
    assert [one.place.key for one in both.requests] == ["static_shm[0]", "static_shared_mem[0]"]


def test_one_id_twice_in_a_configuration() -> None:
    entry = "'id=1, begin=0x1000000000, size=0x1000, role=owner'"
    with pytest.raises(ConfigError) as caught:
        guest_config(f"name='vm'\nstatic_shm=[{entry},\n{entry}]\n", file="vm.cfg")
    assert caught.value.message == (
        "vm.cfg:3: static_shm[1]: region '1' is already in static_shm[0] (line 2)"
    )
    assert caught.value.facts["rule"] == "region-twice"


def test_all_that_is_wrong_is_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        guest_config("uuid='x'\nmemory='y'\nstatic_shm=['id=r']\n", file="vm.cfg")
    rules = [error.facts["rule"] for error in errors_of(caught.value)]
    assert rules == ["missing-key", "missing-key", "bad-name", "bad-uuid", "bad-memory"]
    assert "; and 4 more: " in caught.value.message
    place = {"file": "vm.cfg", "place": "static_shm[0]", "line": 3}
    assert caught.value.facts == {"rule": "missing-key", **place}


@pytest.mark.parametrize(
    ("data", "line", "what", "hint"),
    [
        (b"name='vm'\r\n", 1, "there is a carriage return", "Unix line ends"),
        (b"name='vm'\n\0", 2, "there is a NUL byte", "remove it"),
        (b"a=1\nname='\xff'\n", 2, "byte 0xff is not UTF-8", "save the file as UTF-8"),
        (b"#" * (1 << 20) + b"\n", 0, "longer than 1048576 bytes", "cannot be a guest's"),
    ],
)
def test_what_is_no_text_of_the_language(data: bytes, line: int, what: str, hint: str) -> None:
    with pytest.raises(ConfigUnreadable) as caught:
        guest_config(data, file="vm.cfg")
    assert what in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.facts["line"] == line


def test_a_hundred_megabytes_are_refused_without_being_read() -> None:
    data = b"static_shm=[]\n" * (100 << 16)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigUnreadable, match="longer than"):
            guest_config(data, file="vm.cfg")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_ten_thousand_entries_are_read_at_once() -> None:
    def entries_read(number: int) -> int:
        entries = ",\n".join(
            f"'id=r{index}, begin={0x1000000000 + index * 0x1000:#x}, size=0x1000, role=owner'"
            for index in range(number)
        )
        text = f"name='vm'\ntype='pvh'\nstatic_shm=[{entries}]\n"
        return len(guest_config(text, file="vm.cfg").requests)

    assert entries_read(10_000) == 10_000
    assert growth(lambda: entries_read(1_000), lambda: entries_read(10_000)) < LINEAR


def test_a_text_that_is_not_of_the_language() -> None:
    with pytest.raises(ConfigUnreadable, match=r"vm\.cfg:1"):
        guest_config(b"\xff", file="vm.cfg")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0), ("12", 12), ("+7", 7), ("-7", -7), (" \n5", 5), ("0x1F", 31), ("017", 15),
        ("", None), ("5 ", None), ("08", None), ("0x", None), ("1f", None), ("x", None),
        ("9223372036854775807", (1 << 63) - 1),
        ("-9223372036854775808", -(1 << 63)), ("9223372036854775808", None), ("9" * 5000, None),
    ],
)  # fmt: skip
def test_numbers_are_those_of_strtol(text: str, number: int | None) -> None:
    assert c_long(text) == number


@pytest.mark.parametrize(("said", "reserve"), [("", True), ("reserve", True), ("leave", False)])
def test_whether_the_memory_map_says_where_regions_are(said: str, reserve: bool) -> None:
    line = f'static_shm_memory_map = "{said}"\n' if said else ""
    text = f'name = "a"\n{line}static_shm = ["id=r, begin=0x1000000000, size=4096, role=owner"]\n'
    assert guest_config(text, file="a.cfg").reserve is reserve


@pytest.mark.parametrize(("said", "used"), [("", True), ("used", True), ("unused", False)])
def test_whether_extended_regions_are_used(said: str, used: bool) -> None:
    line = f'static_shm_extended_regions = "{said}"\n' if said else ""
    text = f'name = "a"\n{line}static_shm = ["id=r, begin=0x50000000, size=4096, role=owner"]\n'
    config = guest_config(text, file="a.cfg", arch=Arch.ARM64)
    assert config.extended_regions is used
    broken = [error.facts["rule"] for error in check_config(config, Arch.ARM64)]
    assert broken == (["on-reserved-range"] if used else [])


def test_a_memory_map_wish_that_is_none() -> None:
    text = (
        'name = "a"\nstatic_shm_memory_map = "hide"\n'
        'static_shm = ["id=r, begin=0x1000000000, size=4096, role=owner"]\n'
    )
    with pytest.raises(ConfigError, match="'hide' is not known") as caught:
        guest_config(text, file="a.cfg")
    assert caught.value.hint == "say reserve or leave"
