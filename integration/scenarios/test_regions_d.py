# SPDX-License-Identifier: LGPL-2.1-or-later
"""Regions that only files in /etc/xshmd/regions.d speak of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest

from integration.scenarios.guest import MIB
from integration.scenarios.host import Host, names

FOLDER: Final = "/etc/xshmd/regions.d"


pytestmark = pytest.mark.alike


@pytest.fixture(autouse=True)
def folder(host: Host) -> Iterator[None]:
    yield
    host.dom0.run(f"rm -rf {FOLDER}")


def test_guests_share_what_their_own_configurations_do_not_mention(host: Host) -> None:
    """Plain xl create of two guests without static_shm; a TOML file and a drop-in make them
    members of a region of the system's, one where it says and one where there is room."""
    region = host.unique("toml")
    writer = host.guest("writer", do="fill", shm=f"shm={host.at_elsewhere:#x},{MIB:#x}")
    reader = host.guest("reader", do="check", slot=1, shm=f"shm={host.at:#x},{MIB:#x}")
    text = f'[region.{region}]\nsize = "1 MiB"\n[region.{region}.guest.{writer.name}]\n'
    text += f"begin = {host.at_elsewhere:#x}\n"
    host.dom0.put(f"{FOLDER}/{region}.toml", text)
    dropped = f"[region.{region}.guest.{reader.name}]\n"
    host.dom0.put(f"{FOLDER}/{region}.toml.d/reader.toml", dropped)
    checked = host.xshmctl("check", f"{FOLDER}/{region}.toml").text
    assert f"{reader.name} {region} borrower {host.at:#x} 1 MiB chosen" in " ".join(checked.split())
    host.create(writer)
    host.wait_said(writer, "filled .*")
    host.create(reader)
    host.wait_said(reader, "checked pages=256 bad=0 seed=7")
    host.destroy(writer, reader)
    host.wait(lambda: not host.guests(), "the guests are forgotten")
    assert names(host.regions()) == [region]
    host.dom0.run(f"rm -r {FOLDER}/{region}.toml*")
    host.xshmctl("reload")
    assert host.regions() == []


def test_a_broken_file_stops_only_the_guests_it_names(host: Host) -> None:
    """A guest whose region cannot be known is not made without it; another is none the wiser."""
    region = host.unique("toml")
    named = host.guest("named", do="stay")
    other = host.guest("other", do="stay", slot=1)
    text = f"[region.{region}]\nsize = 1 MiB\n[region.{region}.guest.{named.name}]\n"
    host.dom0.put(f"{FOLDER}/{region}.toml", text)
    since = host.mark
    host.create(other)
    assert host.create(named, check=False).status != 0 or host.domid(named) is None
    host.wait_log(f"{region}.toml:2: it is not TOML", since)
    host.wait_gone(named)
    assert host.domid(other) is not None
    done = host.xshmctl("check", f"{FOLDER}/{region}.toml", check=False)
    assert done.status == 1
    assert f"{FOLDER}/{region}.toml:2: " in done.text
    done = host.xshmctl("reload", check=False)
    assert done.status == 1
    host.destroy(other)
