# SPDX-License-Identifier: LGPL-2.1-or-later
"""Device trees among the other forms: from one to another and back, and in regions.d."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from declared import plain
from hypothesis import given, settings
from hypothesis import strategies as st

from xshmd.config.devicetree import read_devicetree
from xshmd.config.finder import Finder
from xshmd.config.forms import Form, read_file, render
from xshmd.config.toml import read_toml
from xshmd.ctl.__main__ import main
from xshmd.declarations import Declarations
from xshmd.machine import Arch
from xshmd.model import Backing, GuestConfig, RegionConfig, RegionRequest, RegionTerms, Role
from xshmd.units import Gfn

TREE = """\
/dts-v1/;
/ {
    #address-cells = <2>;
    #size-cells = <2>;
    chosen {
        #address-cells = <2>;
        #size-cells = <2>;
        one {
            compatible = "xen,domain";
            #address-cells = <2>;
            #size-cells = <2>;
            memory = <0x0 0x10000>;
            shm-a {
                compatible = "xen,domain-shared-memory-v1";
                xen,shm-id = "a";
                role = "owner";
                xen,shared-mem = <0x0 0x3a000000 0x0 0x100000>;
            };
        };
        two {
            compatible = "xen,domain";
            #address-cells = <2>;
            #size-cells = <2>;
            shm-a {
                compatible = "xen,domain-shared-memory-v1";
                xen,shm-id = "a";
                role = "borrower";
                xen,shared-mem = <0x0 0x3b000000 0x0 0x100000>;
            };
        };
    };
};
"""
Captured = pytest.CaptureFixture[str]


@st.composite
def in_a_tree(draw: st.DrawFn) -> Declarations:
    """Draw what a device tree can say."""
    names = draw(
        st.lists(st.sampled_from(["domU1", "domU2", "a-b", "c_d"]), min_size=1, unique=True)
    )
    requests: dict[str, list[RegionRequest]] = {name: [] for name in names}
    regions = []
    for index, region_id in enumerate(draw(st.lists(st.sampled_from("abcd"), unique=True))):
        members = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        nr_frames = draw(st.integers(1, 512))
        on_host = draw(st.booleans())
        terms = RegionTerms(
            backing=Backing.HOST if on_host else Backing.HOLDER,
            host_first_mfn=0x50000 + 512 * index if on_host else None,
        )
        owned = draw(st.booleans())
        if not owned:
            regions.append(RegionConfig(region_id=region_id, nr_frames=nr_frames, terms=terms))
        for number, name in enumerate(members):
            is_owner = owned and number == 0
            requests[name].append(
                RegionRequest(
                    region_id=region_id,
                    first_gfn=Gfn(0x3A000 + 512 * index),
                    nr_frames=nr_frames,
                    role=Role.OWNER if is_owner else Role.BORROWER,
                    terms=terms if is_owner else RegionTerms(),
                )
            )
    guests = tuple(GuestConfig(name=name, requests=tuple(requests[name])) for name in names)
    return Declarations(regions=tuple(regions), guests=guests)


@settings(max_examples=40, deadline=None)
@given(in_a_tree())
def test_from_a_tree_to_toml_and_back(said: Declarations) -> None:
    said = dataclasses.replace(said, guests=tuple(one for one in said.guests if one.requests))
    tree, losses = render(said, Form.DTS, Arch.ARM64)
    assert losses == ()
    from_tree = read_devicetree(tree.encode(), file="t.dts")
    assert plain(from_tree) == plain(said)
    text, losses = render(from_tree, Form.TOML, Arch.ARM64)
    assert losses == ()
    from_toml = read_toml(text.encode(), file="r.toml")
    assert plain(from_toml) == plain(from_tree)
    again, losses = render(from_toml, Form.DTS, Arch.ARM64)
    assert losses == ()
    assert plain(read_devicetree(again.encode(), file="t.dts")) == plain(said)


def test_a_tree_is_read_by_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "tree.txt"
    path.write_text(TREE)
    parsed = read_file(str(path))
    assert parsed.form is Form.DTS
    assert isinstance(parsed.result, Declarations)
    assert [guest.name for guest in parsed.result.guests] == ["one", "two"]


def test_a_tree_in_regions_d_counts(tmp_path: Path) -> None:
    (tmp_path / "t.dts").write_text(TREE)
    finder = Finder(
        arch=Arch.ARM64,
        own_directory=tmp_path / "own",
        region_directories=[tmp_path],
        xl_directories=[],
        proc=tmp_path,
    )
    config = finder.find(name="two", uuid="")
    assert config is not None
    (request,) = config.requests
    assert (request.first_gfn, request.role) == (0x3B000, Role.BORROWER)
    assert len(finder.declarations().guests) == 2


def test_a_tree_is_checked_for_arm(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "t.dts"
    path.write_text(TREE)
    assert main(["check", "--json=short", str(path)]) == 0
    assert len(json.loads(capsys.readouterr().out)["members"]) == 2
    path.write_text(TREE.replace("0x3b000000", "0x38000000"))
    assert main(["check", "--json=short", str(path)]) == 5
    (found,) = json.loads(capsys.readouterr().out)["findings"]
    assert found["file"] == str(path)
    assert "two" in found["place"]
    path.write_text("/dts-v1/; nonsense")
    assert main(["check", str(path)]) == 1
    capsys.readouterr()


def test_a_tree_is_converted(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "t.dts"
    path.write_text(TREE)
    assert main(["convert", "--to=toml", os.fspath(path)]) == 0
    said = read_toml(capsys.readouterr().out.encode(), file="f")
    assert [guest.name for guest in said.guests] == ["one", "two"]
    assert said.guests[0].memory_mib == 64
