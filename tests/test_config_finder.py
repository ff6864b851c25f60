# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a guest's configuration is found: our own file, the running xl's, the usual directories."""

import gc
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from finder_host import OTHER_UUID, UUID, Host, text_of

from xshmd.config.files import MAX_FILES
from xshmd.config.finder import Finder
from xshmd.config.xl_command import CreateArguments, create_arguments
from xshmd.config.xlcfg import MAX_BYTES, XlConfig
from xshmd.declarations import Declarations
from xshmd.errors import ConfigError, ConfigUnreadable
from xshmd.model import GuestType

# --- own files --------------------------------------------------------------------------------


def test_nothing_is_found_on_an_empty_host(host: Host) -> None:
    assert host.find() is None
    assert host.finder.known() == ()


def test_directories_that_are_not_there(tmp_path: Path) -> None:
    finder = Finder(
        own_directory=tmp_path / "a",
        region_directories=[tmp_path / "c"],
        xl_directories=[tmp_path / "b"],
        proc=tmp_path,
    )
    assert finder.find(name="vm", uuid="") is None


def test_our_own_file_comes_first(host: Host) -> None:
    (host.own / "vm.cfg").write_text(text_of("vm", "own"))
    (host.xen / "vm.cfg").write_text(text_of("vm", "usual"))
    host.process(7, "xl", "create", str(host.xen / "vm.cfg"))
    config = host.find()
    assert config is not None
    assert config.requests[0].region_id == "own"
    assert str(config.requests[0].place) == f"{host.own}/vm.cfg:3: static_shm[0]"


def test_our_own_file_needs_neither_name_nor_type(host: Host) -> None:
    (host.own / "vm.cfg").write_text(text_of("vm").split("\n", 2)[2])
    config = host.find()
    assert config is not None
    assert (config.name, config.guest_type) == ("vm", GuestType.PVH)


def test_our_own_file_may_go_by_uuid(host: Host) -> None:
    (host.own / f"{UUID}.cfg").write_text(text_of("vm").split("\n", 2)[2])
    config = host.find("vm", UUID.upper())
    assert config is not None
    assert (config.name, config.uuid) == ("vm", UUID)
    assert host.find("vm", OTHER_UUID) is None
    assert [known.uuid for known in host.finder.known()] == [UUID]


def test_a_uuid_in_our_own_file_counts_more_than_its_name(host: Host) -> None:
    (host.own / f"{UUID}.cfg").write_text(text_of("vm", "r", f"uuid='{OTHER_UUID}'"))
    assert [known.uuid for known in host.finder.known()] == [OTHER_UUID]


def test_an_empty_file_of_ours_says_that_there_is_no_region(host: Host) -> None:
    (host.own / "vm.cfg").write_text("")
    (host.xen / "vm.cfg").write_text(text_of("vm"))
    assert host.region() == ""


def test_our_own_file_for_another_name_is_an_error(host: Host) -> None:
    (host.own / "vm.cfg").write_text(text_of("other"))
    with pytest.raises(ConfigError, match="name is 'other', but the file is that of guest 'vm'"):
        host.find()


def test_our_own_file_that_is_broken_is_an_error(host: Host) -> None:
    (host.own / "vm.cfg").write_text("static_shm = [")
    with pytest.raises(ConfigUnreadable, match=r"vm\.cfg:1"):
        host.find()


def test_our_own_file_that_cannot_be_read_is_an_error(host: Host) -> None:
    (host.own / "vm.cfg").symlink_to(host.root / "gone")
    with pytest.raises(ConfigUnreadable, match="cannot be read: No such file"):
        host.find()


@pytest.mark.parametrize("name", ["../xen/vm", "a/b", "x" * 300, "nul\0", "", "é\udcff"])
def test_names_that_are_no_file_names(host: Host, name: str) -> None:
    (host.xen / "vm.cfg").write_text(text_of("vm"))
    (host.own / ".cfg").write_text(text_of(""))
    assert host.find(name, name) is None


# --- xl create --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "file", "extra"),
    [
        ("xl create vm.cfg", "vm.cfg", ""),
        ("/usr/lib/xen-4.20/bin/xl create vm.cfg", "vm.cfg", ""),
        ("xl -vvv -t create vm.cfg", "vm.cfg", ""),
        ("xl -fT cr vm.cfg", "vm.cfg", ""),
        ("xl create -p -c vm.cfg", "vm.cfg", ""),
        ("xl create vm.cfg -pc", "vm.cfg", ""),
        ("xl create -f vm.cfg", "vm.cfg", ""),
        ("xl create -fvm.cfg -q", "vm.cfg", ""),
        ("xl create --defconfig=vm.cfg", "vm.cfg", ""),
        ("xl create --quiet --defconfig vm.cfg", "vm.cfg", ""),
        ("xl create --def vm.cfg", "vm.cfg", ""),
        ("xl create a.cfg -f vm.cfg", "vm.cfg", ""),
        ("xl create -- vm.cfg", "vm.cfg", ""),
        ("xl create memory=64 vm.cfg", "vm.cfg", "\nmemory=64\n\n"),
        ("xl create vm.cfg memory=64 -p name='x'", "vm.cfg", "\nmemory=64\nname='x'\n\n"),
        ("xl create /dev/null name='x'", "/dev/null", "\nname='x'\n\n"),
    ],
)
def test_command_lines_that_make_a_guest(argv: str, file: str, extra: str) -> None:
    expected = CreateArguments(config_file=file, extra_config=extra)
    assert create_arguments(argv.split(" ")) == expected


@pytest.mark.parametrize(
    "argv",
    [
        "", "xl", "xl list", "xl c vm.cfg", "xl creates vm.cfg", "xl destroy vm",
        "vim create vm.cfg",
        "xl -N create vm.cfg", "xl create -n vm.cfg", "xl create vm.cfg --dryrun",
        "xl create -h vm.cfg", "xl create", "xl create memory=64", "xl create a.cfg b.cfg",
        "xl create -f", "xl create -Z vm.cfg", "xl -Z create vm.cfg", "xl restore vm.cfg state",
        "xl create --d vm.cfg",
    ],
)  # fmt: skip
def test_command_lines_that_do_not(argv: str) -> None:
    assert create_arguments(argv.split(" ") if argv else []) is None


def test_the_running_xl_is_found_by_the_name_in_its_file(host: Host) -> None:
    (host.root / "a.cfg").write_text(text_of("vm", "mine"))
    (host.root / "b.cfg").write_text(text_of("other", "theirs"))
    host.process(7, "xl", "create", "b.cfg")
    host.process(8, "xl", "create", "a.cfg")
    (host.proc / "self").mkdir()
    assert host.region() == "mine"
    config = host.find()
    assert config is not None
    assert config.place.file == "a.cfg"


def test_an_absolute_path_is_seen_as_the_process_sees_it(host: Host) -> None:
    inside = host.root / "inside"
    inside.mkdir()
    (inside / "vm.cfg").write_text(text_of("vm", "inside"))
    process = host.process(7, "xl", "create", "/vm.cfg")
    assert host.region() is None
    (process / "root").symlink_to(inside)
    assert host.region() == "inside"


def test_an_absolute_path_where_the_root_cannot_be_followed(host: Host) -> None:
    (host.root / "vm.cfg").write_text(text_of("vm", "plain"))
    host.process(7, "xl", "create", str(host.root / "vm.cfg"))
    assert host.region() == "plain"


def test_arguments_are_appended(host: Host) -> None:
    (host.root / "vm.cfg").write_text(text_of("other"))
    host.process(7, "xl", "create", "vm.cfg", 'name="vm"', "memory=77")
    config = host.find()
    assert config is not None
    assert (config.name, config.memory_mib) == ("vm", 77)
    # Line 4 was the file's last, then comes xl's own empty line.
    assert config.place.line == 5


def test_a_configuration_that_is_all_on_the_command_line(host: Host) -> None:
    host.process(7, "xl", "create", "/dev/null", *text_of("vm", "said").splitlines())
    config = host.find()
    assert config is not None
    assert str(config.requests[0].place) == "xl command line:4: static_shm[0]"


def test_a_guest_made_without_regions_has_none_whatever_lies_about(host: Host) -> None:
    (host.root / "vm.cfg").write_text("name='vm'\n# \xff\n", encoding="latin-1")
    (host.xen / "vm.cfg").write_text(text_of("vm"))
    host.process(7, "xl", "create", "vm.cfg")
    assert host.region() == ""


def test_the_latest_process_counts(host: Host) -> None:
    (host.root / "old.cfg").write_text(text_of("vm", "old"))
    (host.root / "new.cfg").write_text(text_of("vm", "new"))
    host.process(9, "xl", "create", "old.cfg", started=100)
    host.process(8, "xl", "create", "new.cfg", started=200)
    host.process(7, "xl", "create", "old.cfg", started=50)
    assert host.region() == "new"


def test_what_passes_is_not_remembered_for_ever(host: Host) -> None:
    """Guests come and go, files are written anew: as much is kept as there are files, and a bit."""
    gc.collect()
    before = sum(isinstance(one, XlConfig | Declarations) for one in gc.get_objects())
    (host.xen / "stays.cfg").write_text(text_of("stays"))
    for number in range(200):
        (host.root / "vm.cfg").write_text(text_of(f"vm{number}"))
        (host.regions / "r.toml").write_text(f'[region.r{number}]\nsize = "4 KiB"\n')
        process = host.process(7, "xl", "create", "vm.cfg")
        assert host.region(f"vm{number}") == "r"
        assert host.region("stays") == "r"
        assert [region.region_id for region in host.finder.regions()] == [f"r{number}"]
        shutil.rmtree(process)
    gc.collect()
    after = sum(isinstance(one, XlConfig | Declarations) for one in gc.get_objects())
    assert after - before < 30


class Forgotten(dict[Any, Any]):
    """What another thread clears as soon as this one has stored something."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.clear()


def test_another_thread_may_forget_what_this_one_has_just_read(host: Host) -> None:
    (host.xen / "vm.cfg").write_text(text_of("vm"))
    (host.xen / "bad.cfg").write_text("name = [")
    host.finder._xl._parsed = Forgotten()
    assert host.region() == "r"
    assert host.find("bad") is None


def test_a_file_that_is_not_utf_8_is_an_error_for_its_guest_only(host: Host) -> None:
    (host.root / "vm.cfg").write_text(text_of("vm", "r", "# \xff"), encoding="latin-1")
    (host.xen / "other.cfg").write_text(text_of("other"))
    host.process(7, "xl", "create", "vm.cfg")
    assert host.region("other") == "r"
    with pytest.raises(ConfigUnreadable, match=r"vm\.cfg:3: byte 0xff is not UTF-8"):
        host.find()


def test_only_the_right_users_processes_are_believed(host: Host) -> None:
    (host.root / "vm.cfg").write_text(text_of("vm"))
    host.process(7, "xl", "create", "vm.cfg")
    stranger = Finder(
        own_directory=host.own,
        region_directories=[],
        xl_directories=[],
        proc=host.proc,
        xl_uid=os.getuid() + 1,
    )
    assert stranger.find(name="vm", uuid="") is None
    assert host.region() == "r"


def test_processes_that_are_of_no_use_are_passed_over(host: Host) -> None:
    (host.xen / "vm.cfg").write_text(text_of("vm", "usual"))
    (host.root / "broken.cfg").write_text("name='vm'\nstatic_shm = [\n")
    host.process(3)
    host.process(4, "xl", "create", "gone.cfg")
    host.process(5, "xl", "create", "broken.cfg")
    (host.process(6, "xl", "create", "x.cfg") / "stat").write_text("6")
    (host.process(7, "xl", "create", "x.cfg") / "cmdline").unlink()
    assert host.region() == "usual"
    ((file, reason),) = host.skipped
    assert file == "broken.cfg"
    assert "broken.cfg:3: expected" in reason


def test_what_is_wrong_in_the_running_xls_file_is_an_error(host: Host) -> None:
    (host.root / "vm.cfg").write_text("name='vm'\nstatic_shm = 'x'\n")
    host.process(7, "xl", "create", "vm.cfg")
    with pytest.raises(ConfigError, match=r"vm.cfg:2: static_shm"):
        host.find()


def test_a_file_for_another_uuid_is_not_this_guests(host: Host) -> None:
    (host.root / "vm.cfg").write_text(text_of("vm", "r", f"uuid='{UUID}'"))
    host.process(7, "xl", "create", "vm.cfg")
    assert host.region("vm", OTHER_UUID) is None
    assert host.region("vm", UUID.upper()) == "r"
    assert host.region("vm", "") == "r"


# --- the usual directories --------------------------------------------------------------------


def test_the_usual_directories(host: Host) -> None:
    (host.xen / "anything").write_text(text_of("vm", "usual"))
    (host.auto / "vm2.cfg").write_text(text_of("vm2", "auto"))
    assert host.region() == "usual"
    assert host.region("vm2") == "auto"
    assert host.region("vm3") is None


def test_two_files_that_disagree_are_both_named(host: Host) -> None:
    (host.xen / "a.cfg").write_text(text_of("vm", "one"))
    (host.xen / "b.cfg").write_text(text_of("vm", "two"))
    with pytest.raises(ConfigError) as caught:
        host.find()
    assert f"{host.xen}/a.cfg and {host.xen}/b.cfg are both for guest 'vm'" in caught.value.message
    assert f"{host.own}/vm.cfg" in caught.value.hint


def test_two_files_that_agree(host: Host) -> None:
    (host.xen / "a.cfg").write_text(text_of("vm"))
    (host.auto / "b.cfg").write_text("\n" + text_of("vm"))
    config = host.find()
    assert config is not None
    assert config.place.file == f"{host.xen}/a.cfg"


def test_one_file_under_two_names(host: Host) -> None:
    (host.xen / "a.cfg").write_text(text_of("vm"))
    (host.auto / "a.cfg").symlink_to("../a.cfg")
    assert host.region() == "r"
    assert len(host.finder.known()) == 1


def test_other_files_that_are_broken_are_passed_over(host: Host) -> None:
    (host.xen / "a.cfg").write_text("name='other'\nstatic_shm = 'x'\n")
    (host.xen / "b.cfg").write_text("static_shm = [\n")
    (host.xen / "c.cfg").write_bytes(b"\xff\0 no configuration at all")
    (host.xen / "d.cfg").write_bytes(b"#" * (MAX_BYTES + 2))
    (host.xen / "e.cfg").symlink_to(host.root / "gone")
    (host.xen / "vm.cfg").write_text(text_of("vm"))
    assert host.region() == "r"
    assert [Path(file).name for file, _ in host.skipped] == ["b.cfg"]
    assert [config.name for config in host.finder.known()] == ["vm"]


def test_a_file_that_cannot_be_read_is_reported(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    (host.xen / "a.cfg").write_text(text_of("a"))
    (host.xen / "vm.cfg").write_text(text_of("vm"))
    real_open = os.open

    def refusing_open(path: Path, flags: int) -> int:
        if str(path).endswith("a.cfg"):
            raise PermissionError(13, "Permission denied")
        return real_open(path, flags)

    monkeypatch.setattr(os, "open", refusing_open)
    assert host.region() == "r"
    ((file, reason),) = host.skipped
    assert file == f"{host.xen}/a.cfg"
    assert "Permission denied" in reason


@pytest.mark.parametrize("leftover", [".vm.cfg.swp", "vm.cfg~", "vm.cfg.bak", "vm.cfg.dpkg-old"])
def test_what_editors_leave_behind_does_not_count(host: Host, leftover: str) -> None:
    (host.xen / "vm.cfg").write_text(text_of("vm", "now"))
    (host.xen / leftover).write_text(text_of("vm", "before"))
    assert host.region() == "now"


def test_what_is_not_a_file_is_never_waited_for(host: Host) -> None:
    os.mkfifo(host.xen / "a.cfg")
    (host.xen / "b.cfg").mkdir()
    (host.xen / "c.cfg").symlink_to("/dev/zero")
    (host.xen / "vm.cfg").write_text(text_of("vm"))
    assert host.region() == "r"
    assert host.skipped == []


def test_a_file_replaced_by_a_fifo_at_the_last_moment(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    (host.own / "vm.cfg").write_text(text_of("vm"))
    real_open = os.open

    def late_fifo(path: Path, flags: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return real_open(path, flags)

    monkeypatch.setattr(os, "open", late_fifo)
    with pytest.raises(ConfigUnreadable, match="it is not a file"):
        host.find()


def test_the_number_of_files_is_bounded(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_FILES == 4096
    monkeypatch.setattr("xshmd.config.files.MAX_FILES", 3)
    for number in range(9):
        (host.own / f"vm{number}.cfg").write_text(text_of(f"vm{number}"))
    assert len(host.finder.known()) == 3


# --- all that is known ------------------------------------------------------------------------


def test_known_has_all_with_regions(host: Host) -> None:
    (host.own / "a.cfg").write_text(text_of("a", "own"))
    (host.own / "empty.cfg").write_text("")
    (host.own / "broken.cfg").write_text("static_shm = [")
    (host.own / "a.txt").write_text(text_of("txt"))
    (host.xen / "a.cfg").write_text(text_of("a", "usual"))
    (host.xen / "b.cfg").write_text(text_of("b"))
    (host.xen / "c.cfg").write_text("name='c'\n")
    (host.xen / "empty.cfg").write_text(text_of("empty"))
    (host.auto / "b.cfg").write_text(text_of("b"))
    (host.auto / "d.cfg").write_text(text_of("d"))
    (host.auto / "d2.cfg").write_text(text_of("d", "other"))
    (host.auto / "e.cfg").write_text("name='e'\nstatic_shm = []\n")
    known = [(config.name, config.requests[0].region_id) for config in host.finder.known()]
    assert known == [("a", "own"), ("b", "r"), ("d", "r"), ("d", "other")]
    assert [Path(file).name for file, _ in host.skipped] == ["broken.cfg"]


# --- regions.d --------------------------------------------------------------------------------
