# SPDX-License-Identifier: LGPL-2.1-or-later
"""One boot serves all scenarios of an architecture, and each gives the machine back unchanged."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from integration import Machine
from integration.arch import ARCHES
from integration.scenarios.guest import MIB, Entry
from integration.scenarios.host import CONFIGS, ETC, Host, artefacts

DEFAULT_ARCHES = ("arm64", "x86_64")
SESSION_LIMIT_S = 1800
CONFIG_FOLDERS = f"{CONFIGS} {ETC} /etc/xshmd/guests.d"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--arch", action="append", choices=tuple(ARCHES), default=None,
        help="the architecture to boot; may be given twice (default: both)",
    )  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "arch" not in metafunc.fixturenames:
        return
    chosen = metafunc.config.getoption("--arch") or DEFAULT_ARCHES
    only = {mark.args[0] for mark in metafunc.definition.iter_markers("arch")}
    arches = [arch for arch in DEFAULT_ARCHES if arch in chosen and (not only or arch in only)]
    metafunc.parametrize("arch", arches, scope="session")


@pytest.fixture(scope="session")
def host(arch: str) -> Iterator[Host]:
    """The machine, with a daemon that has seen guests come and go."""
    with Machine(arch, artefacts=artefacts(arch), time_limit_s=SESSION_LIMIT_S) as machine:
        machine.dom0.run(f"mkdir -p {CONFIG_FOLDERS}")
        host = Host(machine)
        host.start_daemon()
        _warm_up(host)
        try:
            yield host
        finally:
            host.close()


def _warm_up(host: Host) -> None:
    """Let Xen, dom0 and libxl allocate once what they keep: from then on pages can be counted.

    Among it are the tables an Arm dom0 needs for the frames at which it maps others': it uses the
    same ones again, so more at a time than any scenario or xshmd itself maps is enough.
    """
    region = host.unique("warm")
    guest = host.guest("warm", Entry(region, host.at, 64 * MIB))
    host.create(guest)
    record = host.region(region)
    frames = record["holderDomainId"], record["holderFirstFrame"], record["frameCount"]
    host.ask("map_once", *frames)
    host.wait_said(guest, "hello .*")
    host.destroy(guest)
    host.wait(lambda: not host.regions(), "the warm-up's region is gone")
    host.clean_up()
    # A destroyed domain stays in the list for a moment, and its last pages come back up to two
    # seconds after it has left it (RCU): the first scenario must not take that for the start.
    host.wait(lambda: len(host.ask("domains")) == 1, "the warm-up's holder is gone")
    counted: list[int] = []

    def settled() -> bool:
        counted.append(host.ask("free_pages"))
        time.sleep(0.5)
        return len(counted) >= 6 and len(set(counted[-6:])) == 1

    host.wait(settled, "the host's free memory settles")


@pytest.fixture(autouse=True)
def as_found(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every scenario leaves the machine as it found it: to the page, the domain and the node."""
    if "host" not in request.fixturenames:
        yield
        return
    host: Host = request.getfixturevalue("host")
    if not host.daemon_runs:
        host.start_daemon()
    before = host.state()
    yield
    host.clean_up()
    if not host.daemon_runs:
        host.start_daemon()
    marker = request.node.get_closest_marker("xen_keeps")
    difference = host.wait_state(before, kept_pages=marker.args[0] if marker else 0)
    assert not difference, f"the machine is not as it was:\n{difference}"
