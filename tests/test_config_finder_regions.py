# SPDX-License-Identifier: LGPL-2.1-or-later
"""What regions.d adds to the guests that xl's files describe, and what is wrong with it."""

import pytest
from finder_host import OTHER_UUID, UUID, Host, text_of

from xshmd.config.findings import errors_of
from xshmd.config.guest import guest_config
from xshmd.declarations import Declarations
from xshmd.errors import ConfigError, ConfigUnreadable, Conflict
from xshmd.machine import Arch
from xshmd.model import UNPLACED, GuestConfig, GuestType

SYSTEM = "[region.s]\nsize = 8192\n"
MEMBER = "[region.s.guest.{}]\n"


def ids(config: GuestConfig | None) -> list[str]:
    assert config is not None
    return [request.region_id for request in config.requests]


def test_regions_of_the_system_are_found(host: Host) -> None:
    (host.regions / "s.toml").write_text(SYSTEM)
    (host.usr_regions / "s.toml").write_text(SYSTEM.replace("8192", "4096"))
    (host.usr_regions / "t.toml").write_text("[region.t]\nsize = 4096\n")
    found = [(region.region_id, region.nr_frames) for region in host.finder.regions()]
    assert found == [("s", 2), ("t", 1)]


def test_a_guest_may_be_said_in_regions_d_alone(host: Host) -> None:
    (host.regions / "s.toml").write_text(SYSTEM + MEMBER.format("vm"))
    config = host.find()
    assert ids(config) == ["s"]
    assert [known.name for known in host.finder.known()] == ["vm"]
    assert host.find("other") is None


def test_what_leaves_the_finder_has_its_place_and_size(host: Host) -> None:
    (host.regions / "s.toml").write_text(SYSTEM + MEMBER.format("vm") + "offset = 4096\n")
    entry = "id=s, role=borrower', 'id=r, size=0x3000, role=owner"
    (host.xen / "x.cfg").write_text(f"name='x'\ntype='pvh'\nstatic_shm=['{entry}']\n")
    config = host.find()
    assert config is not None
    (request,) = config.requests
    assert (request.first_gfn, request.nr_frames) == (0x1000000, 1)
    x = host.find("x")
    assert x is not None
    assert [(one.first_gfn, one.nr_frames) for one in x.requests] == [
        (0x1000000, 2),
        (0x1000002, 3),
    ]
    assert host.finder.known() == (x, config)


def test_a_borrower_has_its_size_from_an_owner_in_another_file(host: Host) -> None:
    (host.regions / "b.toml").write_text(
        "[region.r]\nexternal = true\n[region.r.guest.vm]\nbegin = '64 GiB'\n"
    )
    (host.xen / "owner.cfg").write_text(text_of("owner"))
    config = host.find()
    assert config is not None
    assert config.requests[0].nr_frames == 1


def test_no_room_is_an_error_for_the_guest_and_no_reason_to_forget_it(host: Host) -> None:
    (host.regions / "s.toml").write_text("[region.s]\nsize='900 TiB'\n" + MEMBER.format("vm"))
    with pytest.raises(ConfigError, match="no free range"):
        host.find()
    assert [known.name for known in host.finder.known()] == ["vm"]
    assert "no free range" in host.skipped[-1][1]


def test_regions_d_adds_to_what_xl_says(host: Host) -> None:
    (host.regions / "s.toml").write_text(SYSTEM + MEMBER.format("vm"))
    (host.xen / "vm.cfg").write_text(text_of("vm", "r", "memory = 99"))
    config = host.find()
    assert config is not None
    assert (ids(config), config.memory_mib) == (["r", "s"], 99)
    assert host.finder.known() == (config,)


def test_a_guest_is_what_an_xl_file_says_that_has_no_shared_memory(host: Host) -> None:
    (host.regions / "s.toml").write_text(SYSTEM + MEMBER.format("vm"))
    (host.xen / "vm.cfg").write_text("name = 'vm'\ntype = 'hvm'\nmemory = 99\n")
    (host.xen / "broken.cfg").write_text("name = 'vm\n")
    config = host.find()
    assert config is not None
    assert (ids(config), config.memory_mib, config.guest_type) == (["s"], 99, GuestType.HVM)
    assert host.finder.known() == (config,)
    assert host.skipped == []


def test_our_own_file_that_says_nothing_is_added_to(host: Host) -> None:
    (host.regions / "s.toml").write_text(SYSTEM + MEMBER.format("vm"))
    (host.own / "vm.cfg").write_text("")
    assert ids(host.find()) == ["s"]
    assert [ids(known) for known in host.finder.known()] == [["s"]]


def test_what_is_said_twice_counts_once_or_is_a_conflict(host: Host) -> None:
    (host.xen / "vm.cfg").write_text(text_of("vm"))
    same = "[region.r]\nsize=4096\nowner='vm'\n[region.r.guest.vm]\nbegin=0x1000000000\n"
    (host.regions / "r.toml").write_text(same)
    assert ids(host.find()) == ["r"]
    (host.regions / "r.toml").write_text(same.replace("0x1000000000", "0x2000000000"))
    with pytest.raises(Conflict) as caught:
        host.find()
    assert f"{host.regions}/r.toml:4" in caught.value.message
    assert f"{host.xen}/vm.cfg:3: static_shm[0]" in caught.value.message
    assert [ids(known) for known in host.finder.known()] == [["r"]]
    assert "said in another way" in host.skipped[0][1]


def test_a_region_file_may_be_for_one_uuid(host: Host) -> None:
    text = SYSTEM + MEMBER.format("vm") + f"[guest.vm]\nuuid = '{UUID}'\n"
    (host.regions / "s.toml").write_text(text)
    assert host.find("vm", OTHER_UUID) is None
    assert ids(host.find("vm", UUID.upper())) == ["s"]
    assert ids(host.find("vm", "")) == ["s"]
    (host.xen / "vm.cfg").write_text(text_of("vm", "r", f"uuid='{OTHER_UUID}'"))
    assert [ids(known) for known in host.finder.known()] == [["r"], ["s"]]


def test_a_broken_region_file_is_an_error_for_those_it_names(host: Host) -> None:
    (host.regions / "s.toml").write_text("[region.s]\nsize = 1 MiB\n" + MEMBER.format("vm"))
    (host.regions / "t.toml").write_text("[region.t]\nsiz = 1\n[region.t.guest.vm]\nx = 1\n")
    (host.xen / "v.cfg").write_text(text_of("v"))
    assert host.region("v") == "r"
    assert host.find("vm2") is None
    assert host.find("v.") is None
    assert {file for file, _ in host.skipped} == {f"{host.regions}/{one}.toml" for one in "st"}
    with pytest.raises(ConfigUnreadable) as caught:
        host.find("vm")
    assert len(errors_of(caught.value)) == 4
    assert host.finder.regions() == ()
    assert [known.name for known in host.finder.known()] == ["v"]


def test_a_region_file_is_read_again_when_it_changes(host: Host) -> None:
    path = host.regions / "s.toml"
    path.write_text(SYSTEM + MEMBER.format("vm"))
    assert ids(host.find()) == ["s"]
    path.write_text("[region.t]\nsize = 8192\n[region.t.guest.vm]\n")
    assert ids(host.find()) == ["t"]
    path.unlink()
    assert host.find() is None


def test_drop_ins_and_masks(host: Host) -> None:
    (host.usr_regions / "s.toml").write_text(SYSTEM)
    (host.usr_regions / "t.toml").write_text(SYSTEM)
    (host.regions / "t.toml").symlink_to("/dev/null")
    (host.regions / "s.toml.d").mkdir()
    (host.regions / "s.toml.d" / "vm.toml").write_text(MEMBER.format("vm"))
    config = host.find()
    assert config is not None
    assert config.requests[0].place.file == f"{host.regions}/s.toml.d/vm.toml"
    assert len(host.finder.regions()) == 1


def test_what_comes_from_elsewhere_is_completed(host: Host) -> None:
    (host.regions / "s.toml").write_text(SYSTEM + MEMBER.format("vm"))
    (host.own / "broken.cfg").write_text("static_shm = [")
    text = "name='vm'\ntype='pvh'\nstatic_shm=['id=r, size=0x1000, role=owner']\n"
    config = host.finder.complete(guest_config(text, file="f", arch=Arch.X86_64))
    assert [(one.region_id, one.first_gfn) for one in config.requests] == [
        ("r", 0x1000000),
        ("s", 0x1000001),
    ]
    (host.regions / "s.toml").write_text(SYSTEM + MEMBER.format("vm") + "siz = 1\n")
    with pytest.raises(ConfigError, match="unknown key 'siz'"):
        host.finder.complete(config)


def test_declarations_are_those_of_our_own_files(host: Host) -> None:
    (host.regions / "s.toml").write_text(SYSTEM + MEMBER.format("vm") + MEMBER.format("b"))
    (host.own / "vm.cfg").write_text(text_of("vm"))
    (host.xen / "b.cfg").write_text(text_of("b"))
    (host.xen / "broken.cfg").write_text("name='vm'\nstatic_shm = [\n")
    said = host.finder.declarations()
    assert [region.region_id for region in said.regions] == ["s"]
    assert {guest.name: ids(guest) for guest in said.guests} == {"vm": ["r", "s"], "b": ["s"]}
    # A reload compares with what was written, so nothing is placed.
    assert said.guests[1].requests[0].first_gfn == UNPLACED


def test_all_that_is_wrong_with_our_files_is_said_at_once(host: Host) -> None:
    (host.regions / "a.toml").write_text("[region.s]\nsize = 1\nprot = 2\n")
    (host.regions / "b.toml").mkdir()
    (host.regions / "c.toml").write_text("[region.r]\nsize=4096\n[region.r.guest.vm]\n")
    (host.own / "c.cfg").write_text("static_shm = [\n")
    (host.own / "vm.cfg").write_text(text_of("vm"))
    with pytest.raises(ConfigError) as caught:
        host.finder.declarations()
    messages = [error.message for error in errors_of(caught.value)]
    expected = ["a.toml:2", "a.toml:3", "b.toml: it is a dir", "own/c.cfg:2", "c.toml:3: region.r"]
    assert len(messages) == len(expected)
    for message, part in zip(messages, expected, strict=True):
        assert part in message


def test_other_peoples_files_cannot_make_our_declarations_wrong(host: Host) -> None:
    (host.regions / "README").write_text("[region")
    (host.own / "vm.cfg.bak").write_text("static_shm = [")
    (host.own / "vm.txt").write_text("static_shm = [")
    assert host.finder.declarations() == Declarations()
