# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which files count, by the rules of UAPI.6, in real directories."""

import os
from pathlib import Path

import pytest

from xshmd.config.files import MAX_FILE_BYTES, read_regular
from xshmd.config.lookup import DIRECTORIES, find_files
from xshmd.errors import ConfigUnreadable


@pytest.fixture
def directories(tmp_path: Path) -> list[Path]:
    found = [tmp_path / name for name in ("etc", "run", "local", "usr")]
    for directory in found:
        directory.mkdir()
    return found


def write(path: Path, text: str = "# something\n") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def files(directories: list[Path]) -> list[list[str]]:
    """Return for each configuration its files, by their paths from the root of the test."""
    root = directories[0].parent
    return [
        [os.path.relpath(path, root) for path in found.paths] for found in find_files(directories)
    ]


def test_the_directories() -> None:
    assert [os.fspath(directory) for directory in DIRECTORIES] == [
        "/etc/xshmd/regions.d",
        "/run/xshmd/regions.d",
        "/usr/local/lib/xshmd/regions.d",
        "/usr/lib/xshmd/regions.d",
    ]


def test_nothing_is_found_where_nothing_is(directories: list[Path], tmp_path: Path) -> None:
    assert find_files(directories) == ()
    assert find_files([tmp_path / "gone"]) == ()


def test_the_first_directory_counts_most(directories: list[Path]) -> None:
    for number, directory in enumerate(directories):
        for name in range(number + 1):
            write(directory / f"r{name}.toml")
    assert files(directories) == [
        ["etc/r0.toml"],
        ["run/r1.toml"],
        ["local/r2.toml"],
        ["usr/r3.toml"],
    ]


def test_only_files_of_our_forms_count(directories: list[Path]) -> None:
    etc = directories[0]
    for name in ("b.toml", "a.dts", "c.dtb", "x.conf", "x.toml~", "x.toml.bak", ".x.toml", "toml"):
        write(etc / name)
    assert [found.name for found in find_files(directories)] == ["a.dts", "b.toml", "c.dtb"]


def test_drop_ins_come_in_the_order_of_their_names(directories: list[Path]) -> None:
    etc, run, local, usr = directories
    write(usr / "r.toml")
    write(usr / "r.toml.d/20-b.toml")
    write(etc / "r.toml.d/30-c.toml")
    write(local / "r.toml.d/10-a.toml")
    write(run / "r.toml.d/20-b.toml")
    for other in ("x.conf", ".x.toml", "x.toml.bak"):
        write(etc / "r.toml.d" / other)
    assert files(directories) == [
        [
            "usr/r.toml",
            "local/r.toml.d/10-a.toml",
            "run/r.toml.d/20-b.toml",
            "etc/r.toml.d/30-c.toml",
        ]
    ]


def test_drop_ins_need_no_file_to_be_dropped_into(directories: list[Path]) -> None:
    write(directories[1] / "r.toml.d/a.toml")
    (found,) = find_files(directories)
    assert (found.name, found.path, len(found.drop_ins)) == ("r.toml", None, 1)


def test_device_trees_have_no_drop_ins(directories: list[Path]) -> None:
    write(directories[0] / "t.dts.d/a.dts")
    assert find_files(directories) == ()


@pytest.mark.parametrize("mask", ["empty", "null", "null link"])
def test_a_mask_hides_what_is_in_the_directories_after_it(
    directories: list[Path], mask: str
) -> None:
    etc, run, _, usr = directories
    for path in ("r.toml", "s.toml", "s.toml.d/a.toml", "s.toml.d/b.toml"):
        write(usr / path)
    (etc / "s.toml.d").mkdir()
    (run / "link").symlink_to("/dev/null")
    for hidden in (etc / "r.toml", etc / "s.toml", etc / "s.toml.d/a.toml"):
        if mask == "empty":
            hidden.touch()
        else:
            hidden.symlink_to("/dev/null" if mask == "null" else run / "link")
    # The drop-ins of a masked file still count, those that are not masked themselves.
    assert files(directories) == [["usr/s.toml.d/b.toml"]]


def test_a_mask_hides_nothing_in_the_directories_before_it(directories: list[Path]) -> None:
    write(directories[0] / "r.toml")
    (directories[1] / "r.toml").touch()
    assert files(directories) == [["etc/r.toml"]]


def test_what_is_no_file_is_found_and_left_to_its_reader(directories: list[Path]) -> None:
    etc = directories[0]
    (etc / "a.toml").mkdir()
    os.mkfifo(etc / "b.toml")
    (etc / "c.toml").symlink_to("gone")
    (etc / "d.toml").symlink_to("/dev/zero")
    (etc / "e.toml.d").write_text("no directory")
    found = find_files(directories)
    assert [one.name for one in found] == ["a.toml", "b.toml", "c.toml", "d.toml"]
    reasons = []
    for one in found:
        with pytest.raises(ConfigUnreadable) as caught:
            read_regular(one.paths[0])
        reasons.append((caught.value.message.rpartition(": ")[2], caught.value.facts["rule"]))
    assert reasons == [
        ("it is a directory", "not-a-file"),
        ("it is not a file", "not-a-file"),
        ("No such file or directory", "unreadable"),
        ("it is not a file", "not-a-file"),
    ]


def test_a_path_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigUnreadable, match=r"cannot be read: .*embedded null"):
        read_regular(Path("a\0b"))
    with pytest.raises(ConfigUnreadable, match="File name too long"):
        read_regular(tmp_path / ("x" * 300))


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as stream:
        stream.truncate(100 << 20)
    assert len(read_regular(path)) == MAX_FILE_BYTES + 1
