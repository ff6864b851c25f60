# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files of several forms read together, and one form written from another."""

import dataclasses
from pathlib import Path

import pytest
from declared import declarations, plain
from hypothesis import given, settings

from xshmd.config.forms import Form, Parsed, Together, form_of, read_file, render, take_together
from xshmd.config.guest import guest_config
from xshmd.config.toml import read_toml
from xshmd.config.xl_write import render_xl
from xshmd.declarations import Declarations, EventChannel
from xshmd.errors import ConfigError, ConfigUnreadable, Conflict
from xshmd.machine import Arch
from xshmd.model import Backing, GuestConfig

XL = 'name = "{}"\ntype = "pvh"\nstatic_shm = [ "{}" ]\n'
OWNER = "id=r, begin=0x1000000000, size=0x2000, role=owner"
BORROWER = "id=r, begin=0x1000000000, role=borrower"


@dataclasses.dataclass
class Files:
    root: Path

    def __call__(self, *names: str) -> Together:
        return take_together(read_file(str(self.root / name), arch=Arch.X86_64) for name in names)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.mark.parametrize(
    ("file", "data", "form"),
    [
        ("a.toml", b"\xd0\x0d\xfe\xed", Form.TOML),
        ("a.dts", b"", Form.DTS),
        ("a.dtb", b"", Form.DTS),
        ("a", b"\xd0\x0d\xfe\xed\0", Form.DTS),
        ("a.bin", b"/dts-v1/;\n/ { };", Form.DTS),
        ("a.cfg", b"name='a'", Form.XL),
        ("toml", b"[region.a]", Form.XL),
    ],
)
def test_how_a_form_is_recognised(file: str, data: bytes, form: Form) -> None:
    assert form_of(file, data) is form


def test_a_file_that_is_not_there(files: Files) -> None:
    (error,) = files("gone.toml").errors
    assert isinstance(error, ConfigUnreadable)


def test_a_file_is_read_with_its_drop_ins(files: Files) -> None:
    files.write("r.toml", "[region.r]\nsize = 4096\n")
    files.write("r.toml.d/b.toml", "[region.r]\nsize = 12288\n")
    files.write("r.toml.d/a.toml", "[region.r]\nsize = 8192\n")
    files.write("r.toml.d/c.toml", "")
    files.write("r.toml.d/c.txt", "not [toml")
    (region,) = files("r.toml").declarations.regions
    assert region.nr_frames == 3
    files.write("r.toml.d/d.toml", "[region.r]\nsise = 1\n")
    (error,) = files("r.toml").errors
    assert error.facts["file"] == f"{files.root}/r.toml.d/d.toml"


# --- together ---------------------------------------------------------------------------------


def test_a_guest_is_what_its_xl_configuration_says(files: Files) -> None:
    files.write("r.toml", "[region.s]\nsize = 4096\n[region.s.guest.vm]\n[guest.vm]\nmemory=0\n")
    files.write("vm.cfg", XL.format("vm", OWNER) + "memory = 99\n")
    together = files("r.toml", "vm.cfg")
    assert together.errors == ()
    (guest,) = together.declarations.guests
    assert guest.memory_mib == 99
    assert [request.region_id for request in guest.requests] == ["r", "s"]
    placed, errors = together.placed(Arch.X86_64)
    assert errors == ()
    ours, chosen = placed.guests[0].requests
    assert (chosen.first_gfn, chosen.nr_frames) == (ours.end_gfn, 1)


def test_what_xl_does_not_say_of_a_guest_another_file_may(files: Files) -> None:
    uuid = "01234567-89ab-cdef-0123-456789abcdef"
    files.write("r.toml", f"[guest.vm]\nuuid = '{uuid}'\nmemory_map = 'leave'\n")
    files.write("vm.cfg", XL.format("vm", OWNER))
    (guest,) = files("vm.cfg", "r.toml").declarations.guests
    assert (guest.uuid, guest.reserve) == (uuid, False)


def test_what_two_files_say_alike_counts_once(files: Files) -> None:
    files.write(
        "r.toml",
        "[region.r]\nsize=0x2000\nowner='vm'\n[region.r.guest.vm]\nbegin=0x1000000000\n",
    )
    files.write("vm.cfg", XL.format("vm", OWNER))
    together = files("r.toml", "vm.cfg")
    assert together.errors == ()
    assert len(together.declarations.guests[0].requests) == 1


def test_what_two_files_say_differently_is_a_conflict_of_both(files: Files) -> None:
    files.write("r.toml", "\n[region.r]\nexternal = true\n[region.r.guest.vm]\noffset=4096\n")
    files.write("vm.cfg", XL.format("vm", OWNER))
    (error,) = files("r.toml", "vm.cfg").errors
    assert isinstance(error, Conflict)
    assert error.message == (
        f"{files.root}/r.toml:4: region.r.guest.vm: region 'r' of guest 'vm' is said in another"
        f" way at {files.root}/vm.cfg:3: static_shm[0]"
    )
    assert error.facts["rule"] == "said-differently"


def test_two_xl_configurations_of_one_guest_have_to_agree(files: Files) -> None:
    files.write("a.cfg", XL.format("vm", OWNER))
    files.write("b.cfg", XL.format("vm", BORROWER))
    (error,) = files("a.cfg", "b.cfg").errors
    assert isinstance(error, ConfigError)
    assert error.facts["rule"] == "two-files"
    assert f"{files.root}/a.cfg and {files.root}/b.cfg" in error.message
    files.write("guests.d/vm.cfg", f'static_shm = [ "{BORROWER}" ]\n')
    together = files("a.cfg", "b.cfg", "guests.d/vm.cfg")
    assert together.errors == ()
    assert together.declarations.guests[0].requests[0].place.file.endswith("guests.d/vm.cfg")


def test_all_files_that_are_wrong_are_named(files: Files) -> None:
    files.write("a.toml", "[region.r]\n[region.s]\n")
    files.write("b.cfg", "static_shm = [\n")
    files.write("c.toml", "[region.t]\nsize=4096\n")
    together = files("a.toml", "b.cfg", "c.toml", "gone")
    assert [error.facts["rule"] for error in together.errors] == [
        "missing-key", "missing-key", "not-xl", "unreadable",
    ]  # fmt: skip
    assert [region.region_id for region in together.declarations.regions] == ["t"]


def test_no_room_is_an_error_of_its_guest(files: Files) -> None:
    files.write("r.toml", "[region.r]\nsize='1024 TiB'\n[region.r.guest.a]\n[region.r.guest.b]\n")
    placed, errors = files("r.toml").placed(Arch.ARM64)
    assert [error.facts["rule"] for error in errors] == ["no-room", "no-room"]
    assert len(placed.guests) == 2


# --- from one to another ----------------------------------------------------------------------


def parsed_xl(text: str) -> Declarations:
    """Read the blocks that are for several configurations."""
    _, *blocks = text.split("# for the configuration of guest ")
    return Declarations(guests=tuple(guest_config("# " + block, file="f") for block in blocks))


@settings(deadline=None)
@given(declarations())
def test_from_xl_to_toml_and_back(said: Declarations) -> None:
    # What xl can say: no region of the system's, no memory of the host's.
    guests = tuple(map(_in_xl, said.guests))
    said = Declarations(guests=guests)
    text, losses = render(said, Form.XL, Arch.X86_64)
    assert losses == ()
    from_xl = parsed_xl(text)
    assert plain(from_xl) == plain(said)
    toml, losses = render(from_xl, Form.TOML, Arch.X86_64)
    assert losses == ()
    from_toml = read_toml(toml.encode(), file="f")
    assert plain(from_toml) == plain(said)


def _in_xl(guest: GuestConfig) -> GuestConfig:
    return dataclasses.replace(
        guest,
        requests=tuple(
            dataclasses.replace(
                request,
                terms=dataclasses.replace(
                    request.terms, backing=Backing.HOLDER, host_first_mfn=None
                ),
            )
            for request in guest.requests
        ),
    )


@settings(deadline=None)
@given(declarations())
def test_what_xl_cannot_say_is_said(said: Declarations) -> None:
    channel = EventChannel(guest="a", local_port=3, peer_guest="b", peer_port=4)
    said = dataclasses.replace(said, event_channels=(channel,))
    text, losses = render_xl(said)
    hosted = [
        request
        for guest in said.guests
        for request in guest.requests
        if request.terms.backing is not Backing.HOLDER
    ]
    assert len(losses) == len(said.regions) + len(hosted) + 1
    left = Declarations(guests=tuple(map(_in_xl, said.guests)))
    assert plain(parsed_xl(text)) == plain(left)


def test_ids_and_names_that_xl_does_not_know() -> None:
    said = read_toml(b'[region."@shm"]\nsize = 4096\n[region."@shm".guest.a]\n', file="f")
    text, losses = render_xl(said)
    assert "@shm" not in text
    assert "region '@shm' of guest 'a': it is left out" in losses[1]
    text, losses = render_xl(Declarations(guests=(GuestConfig(name="a\nb"),)))
    assert text == ""
    assert "no such name" in losses[0]


def test_a_block_names_its_guest() -> None:
    said = read_toml(b"[region.r]\nsize = 4096\nowner = 'a'\n[region.r.guest.a]\n", file="f")
    text, _ = render_xl(said)
    assert text == (
        "# for the configuration of guest 'a'\n"
        'name = "a"\ntype = "pvh"\n'
        'static_shm = [\n    "id=r, size=0x1000, role=owner, prot=rw",\n]\n'
    )


def test_a_parsed_file_keeps_its_form(files: Files) -> None:
    files.write("a.toml", "")
    assert read_file(str(files.root / "a.toml")) == Parsed(
        str(files.root / "a.toml"), Form.TOML, Declarations()
    )


def test_usual_terms_are_not_written() -> None:
    text, _ = render(read_toml(b"[region.r]\nsize = 4096\n", file="f"), Form.TOML, Arch.X86_64)
    assert text == '[region.r]\nsize = "4 KiB"\n'
