# SPDX-License-Identifier: LGPL-2.1-or-later
"""One boot serves all scenarios of an architecture, and each gives the machine back unchanged."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from integration import Machine
from integration.arch import ARCHES
from integration.images import PLAIN, VARIANTS
from integration.scenarios.guest import MIB, Entry
from integration.scenarios.host import CONFIGS, ETC, Host, artefacts

DEFAULT_ARCHES = ("arm64", "x86_64")
FASTEST = "arm64"
"""To emulate."""
SESSION_LIMIT_S = 3600
CONFIG_FOLDERS = f"{CONFIGS} {ETC} /etc/xshmd/guests.d"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--arch", action="append", choices=tuple(ARCHES), default=None,
        help="the architecture to boot; may be given twice (default: both)",
    )  # fmt: skip
    parser.addoption(
        "--everywhere",
        action="store_true",
        help="on every architecture, scenarios too in which the architecture plays no part",
    )
    parser.addoption(
        "--xenstored", choices=("xenstored", "oxenstored"), default="xenstored",
        help="the store to run, except where a scenario boots a machine of its own",
    )  # fmt: skip
    parser.addoption(
        "--image", choices=VARIANTS, default=PLAIN,
        help="the image to boot, and run the scenarios that are made for it (see Makefile)",
    )  # fmt: skip
    parser.addoption(
        "--share", metavar="K/N", type=_share, default=(1, 1),
        help="run the K-th of N shares of the scenarios: each is a run of its own, side by side",
    )  # fmt: skip


def _share(text: str) -> tuple[int, int]:
    number, _, total = text.partition("/")
    share = int(number), int(total)
    if not 1 <= share[0] <= share[1]:
        raise ValueError(f"there is no share {text}")
    return share


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "arch" in metafunc.fixturenames:
        metafunc.parametrize("arch", DEFAULT_ARCHES, scope="session")


@pytest.hookimpl(trylast=True)  # when -m and -k have had their say
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out other architectures' scenarios and other shares': nothing is ever skipped."""
    chosen = config.getoption("--arch") or DEFAULT_ARCHES
    everywhere = config.getoption("--everywhere")
    image = config.getoption("--image")
    ours = [item for item in items if _is_for(item, chosen, everywhere) and _image(item) == image]
    modules = _share_of(ours, *config.getoption("--share"))
    ours = [item for item in ours if item.path in modules]
    kept = set(ours)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = ours


def _is_for(item: pytest.Item, arches: Sequence[str], everywhere: bool) -> bool:
    call = getattr(item, "callspec", None)
    if call is None or "arch" not in call.params:
        return True
    only = {mark.args[0] for mark in item.iter_markers("arch")} or {call.params["arch"]}
    if item.get_closest_marker("alike") and not everywhere:
        only = {FASTEST}
    return call.params["arch"] in only.intersection(arches)


def _image(item: pytest.Item) -> str:
    mark = item.get_closest_marker("image")
    return str(mark.args[0]) if mark else PLAIN


def _share_of(items: Sequence[pytest.Item], number: int, total: int) -> set[Path]:
    """The modules of one share, which together take about as long as those of any other."""
    sizes: Counter[Path] = Counter()
    for item in items:
        mark = item.get_closest_marker("counts_as")
        sizes[item.path] += mark.args[0] if mark else 1
    shares = [(0, which, set[Path]()) for which in range(1, total + 1)]
    for path, size in sorted(sizes.items(), key=lambda pair: (-pair[1], pair[0])):
        load, which, modules = heapq.heappop(shares)
        heapq.heappush(shares, (load + size, which, modules | {path}))
    return next(modules for _, which, modules in shares if which == number)


@pytest.fixture(scope="session")
def session_host(arch: str, pytestconfig: pytest.Config) -> Iterator[Host]:
    """The machine, with a daemon that has seen guests come and go."""
    xenstored, image = pytestconfig.getoption("--xenstored"), pytestconfig.getoption("--image")
    number, total = pytestconfig.getoption("--share")
    words = [str(number)] * (total > 1) + [xenstored] * (xenstored != "xenstored")
    words += [image] * (image != PLAIN)
    with booted(arch, "-".join(words), xenstored=xenstored, image=image) as host:
        yield host


@pytest.fixture(scope="session")
def host(session_host: Host) -> Host:
    """The session's machine; a module whose scenarios need another has a fixture of this name."""
    return session_host


@pytest.fixture
def short_grace(host: Host) -> Iterator[None]:
    """For scenarios whose guests crash: nobody need wait half a minute for them to be back."""
    with host.daemon_with("--reboot-grace", "3"):
        yield
        host.clean_up()
        host.wait(lambda: not host.guests(), "they are forgotten")


@contextmanager
def booted(arch: str, name: str, **unusual: Any) -> Iterator[Host]:
    """Boot a machine and warm it up.

    Args:
        arch: Its architecture.
        name: Of the folder for what it leaves.
        unusual: What is unusual about it, see :class:`~integration.Machine`.
    """
    folder = artefacts(arch, name)
    with Machine(arch, artefacts=folder, time_limit_s=SESSION_LIMIT_S, **unusual) as machine:
        machine.dom0.run(f"mkdir -p {CONFIG_FOLDERS}")
        host = Host(machine)
        host.start_keeper()
        host.start_daemon()
        warm_up(host)
        try:
            yield host
        finally:
            host.close()


def warm_up(host: Host) -> None:
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
    host.wait_state_still()


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
    if marker:
        # What is still coming back must not come back in the middle of the next scenario.
        host.wait_state_still()
    assert not difference, f"the machine is not as it was:\n{difference}"
