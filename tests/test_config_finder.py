# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a guest's configuration is looked for, with real files and a proc tree of our own."""

import dataclasses
import os
from pathlib import Path

import pytest

from xshmd.config.files import MAX_FILES
from xshmd.config.finder import Finder
from xshmd.config.findings import errors_of
from xshmd.config.guest import guest_config
from xshmd.config.xl_command import CreateArguments, create_arguments
from xshmd.config.xlcfg import MAX_BYTES
from xshmd.errors import ConfigError, ConfigUnreadable, Conflict
from xshmd.model import UNPLACED, Arch, Declarations, GuestConfig, GuestType

UUID = "01234567-89ab-cdef-0123-456789abcdef"
OTHER_UUID = "f" * 8 + UUID[8:]


def text_of(name: str, region_id: str = "r", *more: str) -> str:
    entry = f"id={region_id}, begin=0x1000000000, size=0x1000, role=owner"
    return "\n".join([f"name = '{name}'", "type = 'pvh'", *more, f"static_shm = ['{entry}']", ""])


@dataclasses.dataclass
class Host:
    """The directories of a dom0."""

    root: Path

    def __post_init__(self) -> None:
        self.own, self.xen, self.proc = (self.root / name for name in ("own", "xen", "proc"))
        self.auto = self.xen / "auto"
        self.regions, self.usr_regions = (self.root / name for name in ("regions.d", "usr.d"))
        self.skipped: list[tuple[str, str]] = []
        for directory in (self.own, self.auto, self.proc, self.regions, self.usr_regions):
            directory.mkdir(parents=True)
        self.finder = Finder(
            arch=Arch.X86_64,
            own_directory=self.own,
            region_directories=[self.regions, self.usr_regions],
            xl_directories=[self.xen, self.auto],
            proc=self.proc,
            xl_uid=os.getuid(),
            on_skip=lambda file, reason: self.skipped.append((file, reason)),
        )

    def process(self, pid: int, *argv: str, started: int = 1, cwd: Path | None = None) -> Path:
        process = self.proc / str(pid)
        process.mkdir()
        (process / "cmdline").write_bytes(b"".join(os.fsencode(word) + b"\0" for word in argv))
        fields = " ".join(["S", *["0"] * 18, str(started), "0"])
        (process / "stat").write_text(f"{pid} (x) l) {fields}\n")
        (process / "cwd").symlink_to(cwd or self.root)
        return process

    def find(self, name: str = "vm", uuid: str = "") -> GuestConfig | None:
        return self.finder.find(name=name, uuid=uuid)

    def region(self, name: str = "vm", uuid: str = "") -> str | None:
        """Return the id of the one region found, "" for a guest without, None for no guest."""
        config = self.find(name, uuid)
        if config is None:
            return None
        return ",".join(request.region_id for request in config.requests)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


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
