# SPDX-License-Identifier: LGPL-2.1-or-later
"""xshmctl vhost-user, between a daemon and a back-end that are both behind real sockets."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from fakes.xen_devices import XenDevices
from varlink_fakes import OWNER, SNAPSHOT, FakeRegions, daemon

from integration.virtio_driver import Driver
from xshmd.ctl import args, lending, vhost_user
from xshmd.ctl.__main__ import main
from xshmd.errors import Refused, UsageError
from xshmd.events import Event, EventKind
from xshmd.model import Backing, Prot, RegionTerms, Snapshot
from xshmd.units import DomId, Gfn
from xshmd.vhost_user import offer
from xshmd.vhost_user import session as session_module
from xshmd.vhost_user.backend import Backend
from xshmd.vhost_user.memory import Memory
from xshmd.vhost_user.offer import Addresses, Target
from xshmd.vhost_user.payloads import MemoryRegion, XenFlag
from xshmd.vhost_user.virtqueue import Chain, read_all, write_all
from xshmd.vhost_user.vring import Device
from xshmd.vhost_user.wire import ProtocolFeature
from xshmd.xen.windows import Window

Captured = pytest.CaptureFixture[str]
HOLDER = DomId(3)
NEXT = DomId(9)
"""The number of a holder that is made later."""
FIRST = 0x100
WAIT_S = 60.0
GUEST_HAS_IT = 0x38000000
WHOLE = MemoryRegion(
    guest_address=FIRST << 12, size_bytes=1 << 20, user_address=0, xen_flags=XenFlag.FOREIGN,
    domid=HOLDER,
)  # fmt: skip


class Regions(FakeRegions):
    """A daemon to which things happen while it runs."""

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
        self._token = trio.lowlevel.current_trio_token()
        async with super().monitor() as events:
            yield events

    def happens(self, now: Snapshot) -> None:
        """Change what there is, and say that something has."""
        wait(lambda: bool(self.monitors))
        self.now = now
        event = Event(kind=EventKind.PEER_LEFT, region="r0")

        def send() -> None:
            for monitor in self.monitors:
                monitor.send_nowait(event)

        self._token.run_sync_soon(send)


class Shouter:
    """A device that answers in upper case."""

    features = 0
    queue_count = 2

    def config(self) -> bytes:
        return b""

    def handle(self, memory: Memory, queue: int, chain: Chain) -> int:
        data = read_all(memory, chain.readable).upper()
        write_all(memory, chain.writable, data)
        return len(data)


class BackEnd:
    """A back-end in a thread of its own, and the memory it has at this moment."""

    def __init__(self, devices: XenDevices) -> None:
        self.said: list[str] = []
        self.memories: list[Memory] = []
        self._devices = devices
        self.backend = Backend(self._device, self.said.append, memory=self._memory)
        self._thread = threading.Thread(target=self.backend.run)

    def _device(self) -> Device:
        return Shouter()

    def _memory(self) -> Memory:
        self.memories.append(Memory(devices=self._devices))
        return self.memories[-1]

    def start(self, path: Path | None = None) -> None:
        """Serve; connect to a front-end that is about to listen at the path, if one is given."""
        if path is not None:
            wait(lambda: self._connects(path))
        self._thread.start()

    def _connects(self, path: Path) -> bool:
        try:
            self.backend.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    def table(self) -> list[MemoryRegion]:
        return list(self.memories[-1].regions) if self.memories else []

    def close(self) -> None:
        if self._thread.ident is None:
            self.backend.close()
            return
        self.backend.stop()
        self._thread.join(WAIT_S)


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[XenDevices]:
    found = XenDevices()
    monkeypatch.setattr(lending, "device_maps", found)
    for module in (lending, vhost_user):
        monkeypatch.setattr(module, "AGAIN_S", 0.01)
    yield found
    found.close()


@pytest.fixture
def holder(devices: XenDevices) -> memoryview:
    """The holder's frames, of which region r0 are the first."""
    window = Window(256 << 12)
    window.place(devices.put(HOLDER, Gfn(FIRST), 256))
    return window.view()


@pytest.fixture
def api() -> Regions:
    return Regions()


@pytest.fixture
def socket_path(tmp_path: Path, api: Regions, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XSHMD_SOCKET", str(tmp_path / "socket"))
    with daemon(tmp_path / "socket", api):
        yield tmp_path / "socket"


@pytest.fixture
def back_end(devices: XenDevices) -> Iterator[BackEnd]:
    found = BackEnd(devices)
    yield found
    found.close()


def run(script: Callable[[], None], *words: str) -> int:
    """Run xshmctl, and meanwhile the script in another thread; then end it by a signal."""
    failed: list[BaseException] = []

    def body() -> None:
        try:
            script()
        except BaseException as problem:
            failed.append(problem)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=body)
    thread.start()
    try:
        status = main(["vhost-user", *words])
    except BaseException:
        with contextlib.suppress(BaseException):
            thread.join(WAIT_S)
        raise
    thread.join(WAIT_S)
    if failed:
        raise failed[0]
    return status


@pytest.mark.usefixtures("socket_path", "holder")
def test_serve_a_region(api: Regions, back_end: BackEnd, tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "vhost"

    def script() -> None:
        back_end.start(path)
        assert path.stat().st_mode & 0o777 == 0o600
        wait(lambda: back_end.table() == [WHOLE])
        api.happens(Snapshot())
        wait(lambda: not back_end.table())
        api.happens(SNAPSHOT)
        wait(lambda: back_end.table() == [WHOLE])

    assert run(script, "serve", str(path), "--region=r0") == 128 + signal.SIGTERM
    assert not path.exists()
    given = "given 1 MiB at 0x100000 (user address 0x0) of domain 3"
    assert capsys.readouterr().out.splitlines() == [
        f"listening {path}", "connected", given, given.replace("given", "withdrawn"), given,
    ]  # fmt: skip


@pytest.mark.usefixtures("socket_path")
def test_connect_with_a_queue_of_the_guest(
    back_end: BackEnd, holder: memoryview, tmp_path: Path, capsys: Captured
) -> None:
    """A guest's queue in its region is answered through the holder's frames."""
    path = tmp_path / "vhost"
    back_end.backend.listen(path)
    back_end.start()
    driver = Driver(holder, GUEST_HAS_IT, GUEST_HAS_IT)

    def script() -> None:
        assert shouted(driver, b"from the guest") == b"FROM THE GUEST"

    options = ("--guest=ctl", "--addresses=guest", "--json=short", queue_option(driver))
    status = run(script, "connect", str(path), *options)
    driver.close()
    assert status == 128 + signal.SIGTERM
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"event": "connected"},
        {
            "event": "given", "guestAddress": GUEST_HAS_IT, "sizeBytes": 1 << 20,
            "userAddress": GUEST_HAS_IT, "offset": FIRST << 12, "domainId": 3,
        },
    ]  # fmt: skip


def queue_option(driver: Driver) -> str:
    where = driver.queue().where
    return (
        f"--queue=size=8,descriptors={where.descriptors},available={where.available},"
        f"used={where.used}"
    )


def shouted(driver: Driver, text: bytes) -> bytes:
    """What the back-end makes of it."""
    before = driver.used
    driver.place(text, len(text))
    wait(lambda: driver.used == before + 1)
    return driver.answer(len(text))


@pytest.mark.usefixtures("socket_path")
def test_a_backend_that_is_new_goes_on_where_the_one_before_was(
    back_end: BackEnd, holder: memoryview, tmp_path: Path
) -> None:
    """What has been answered is not answered again, and what has not is."""
    path = tmp_path / "vhost"
    driver = Driver(holder, GUEST_HAS_IT, GUEST_HAS_IT)
    again = BackEnd(back_end._devices)

    def script() -> None:
        back_end.start(path)
        for text in (b"one", b"two", b"three"):
            assert shouted(driver, text) == text.upper()
        back_end.close()
        driver.place(b"while nobody looked", 19)
        again.start(path)
        wait(lambda: driver.used == 4)
        assert driver.answer(19) == b"WHILE NOBODY LOOKED"
        (vring, _) = again.backend._connections[0].session.vrings
        assert vring.base == 3

    options = ("--guest=ctl", "--addresses=guest", queue_option(driver))
    try:
        assert run(script, "serve", str(path), *options) == 128 + signal.SIGTERM
    finally:
        driver.close()
        again.close()


@pytest.mark.usefixtures("socket_path")
def test_a_queue_in_another_region_at_the_same_address_is_another(
    api: Regions, back_end: BackEnd, holder: memoryview, devices: XenDevices, tmp_path: Path
) -> None:
    """The guest and its region are made anew before anybody has looked."""
    path = tmp_path / "vhost"
    back_end.backend.listen(path)
    back_end.start()
    (region,) = SNAPSHOT.regions
    (part,) = SNAPSHOT.holders
    renewed = dataclasses.replace(SNAPSHOT, holders=(dataclasses.replace(part, domid=NEXT),))
    assert region.holder_uuid == part.uuid
    window = Window(256 << 12)
    window.place(devices.put(NEXT, Gfn(FIRST), 256))
    drivers = [Driver(each, GUEST_HAS_IT, GUEST_HAS_IT) for each in (holder, window.view())]

    def script() -> None:
        for text in (b"one", b"two", b"three"):
            assert shouted(drivers[0], text) == text.upper()
        api.happens(renewed)
        assert shouted(drivers[1], b"anew") == b"ANEW"

    options = ("--guest=ctl", "--addresses=guest", queue_option(drivers[0]))
    assert run(script, "connect", str(path), *options) == 128 + signal.SIGTERM
    for driver in drivers:
        driver.close()


@pytest.mark.usefixtures("holder")
def test_the_daemon_may_go_and_come_back(
    api: Regions, back_end: BackEnd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile the back-end keeps what it has; afterwards it has what is."""
    path, where = tmp_path / "vhost", tmp_path / "socket"
    monkeypatch.setenv("XSHMD_SOCKET", str(where))
    first = daemon(where, api)
    first.__enter__()

    def script() -> None:
        back_end.start(path)
        wait(lambda: back_end.table() == [WHOLE])
        first.__exit__(None, None, None)
        assert back_end.table() == [WHOLE]
        api.now = Snapshot()
        with daemon(where, api):
            wait(lambda: not back_end.table())

    assert run(script, "serve", str(path), "--region=r0") == 128 + signal.SIGTERM


@pytest.mark.usefixtures("socket_path", "holder")
def test_what_is_wanted_back_is_given_back(
    api: Regions,
    back_end: BackEnd,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    """The lease ends once the back-end has unmapped the region; if that then stays, it is given
    anew."""
    monkeypatch.setattr(lending, "GIVEN_UP_S", 0.05)
    path = tmp_path / "vhost"

    def script() -> None:
        back_end.start(path)
        wait(lambda: back_end.table() == [WHOLE])
        (lease,) = api.leases
        assert (lease.lease.region_id, lease.lease.prot) == ("r0", Prot.RW)
        assert not lease.is_over
        lease.want_back("remove")
        wait(lambda: lease.is_over)
        wait(lambda: back_end.table() == [WHOLE])
        assert len(api.leases) == 2
        assert not api.leases[1].is_over

    assert run(script, "serve", str(path), "--region=r0") == 128 + signal.SIGTERM
    events = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert events == ["listening", "connected", "given", "withdrawn", "given"]


@pytest.mark.usefixtures("socket_path", "holder")
def test_what_cannot_be_leased_is_not_offered(
    api: Regions, back_end: BackEnd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("xshmd.ctl.render.say", said.append)
    path = tmp_path / "vhost"
    api.refusal = Refused("region r0 is prot=ro for all of its members")

    def script() -> None:
        back_end.start(path)
        wait(lambda: bool(said))
        assert not back_end.table()
        api.refusal = None
        api.happens(SNAPSHOT)
        wait(lambda: back_end.table() == [WHOLE])

    assert run(script, "serve", str(path), "--region=r0") == 128 + signal.SIGTERM
    assert said == ["region r0 is not offered: region r0 is prot=ro for all of its members"]


@pytest.mark.usefixtures("socket_path", "holder")
def test_a_backend_that_comes_again_gets_it_again(back_end: BackEnd, tmp_path: Path) -> None:
    path = tmp_path / "vhost"

    def script() -> None:
        back_end.start(path)
        wait(lambda: back_end.table() == [WHOLE])
        (connection,) = back_end.backend._connections
        connection.channel._socket.shutdown(2)
        wait(lambda: not back_end.backend._connections)
        again = BackEnd(back_end._devices)
        again.start(path)
        wait(lambda: again.table() == [WHOLE])
        again.close()

    assert run(script, "serve", str(path), "--region=r0") == 128 + signal.SIGTERM


@pytest.mark.usefixtures("socket_path", "holder")
def test_a_backend_that_does_not_know_xen(
    back_end: BackEnd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    known = session_module.PROTOCOL_FEATURES & ~ProtocolFeature.XEN_MMAP
    monkeypatch.setattr(session_module, "PROTOCOL_FEATURES", known)
    path = tmp_path / "vhost"
    back_end.backend.listen(path)
    back_end.start()
    assert main(["vhost-user", "connect", str(path), "--region=r0"]) == 5
    assert "does not know XEN_MMAP" in capsys.readouterr().err


@pytest.mark.usefixtures("socket_path")
def test_a_holder_that_cannot_be_mapped(
    back_end: BackEnd, tmp_path: Path, capsys: Captured
) -> None:
    path = tmp_path / "vhost"
    back_end.backend.listen(path)
    back_end.start()
    assert main(["vhost-user", "connect", str(path), "--region=r0"]) == 5
    assert "region r0 cannot be mapped by dom0" in capsys.readouterr().err


@pytest.mark.usefixtures("socket_path", "devices")
def test_a_region_that_is_not_there(tmp_path: Path, capsys: Captured) -> None:
    assert main(["vhost-user", "serve", str(tmp_path / "vhost"), "--region=r7"]) == 4
    assert "there is no region r7" in capsys.readouterr().err


@pytest.mark.usefixtures("socket_path", "devices")
def test_a_path_that_is_taken(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "vhost").touch()
    assert main(["vhost-user", "serve", str(tmp_path / "vhost"), "--region=r0"]) == 5
    assert "Address already in use" in capsys.readouterr().err
    assert (tmp_path / "vhost").exists()


# -- what is offered ----------------------------------------------------------------------------


def regions(snapshot: Snapshot) -> list[offer.Fields]:
    from xshmd.varlink import records

    found: list[offer.Fields] = records.state_fields(snapshot)["regions"]
    return found


def test_a_guests_part_of_a_region() -> None:
    borrower = dataclasses.replace(SNAPSHOT.guests[0], state=OWNER.state)
    now = regions(dataclasses.replace(SNAPSHOT, guests=(OWNER, borrower)))
    (part,), withheld = offer.parts(now, Target(guest="log"))
    assert not withheld
    assert part.described == MemoryRegion(
        guest_address=0x101000, size_bytes=0x2000, user_address=0x40000000,
        xen_flags=XenFlag.FOREIGN, domid=HOLDER,
    )  # fmt: skip
    (part,), _ = offer.parts(now, Target(guest="log", addresses=Addresses.GUEST))
    assert part.described.guest_address == 0x40000000
    assert part.described.mmap_offset == 0x101000
    assert offer.parts(now, Target(guest="6"))[0]
    assert offer.parts(now, Target(guest="other")) == ((), ())


@pytest.mark.parametrize(("word", "flags"), [("specification", 0x101), ("rust-vmm", 0x9)])
def test_not_in_advance(word: str, flags: int) -> None:
    target = Target(region="r0", no_advance=offer.NO_ADVANCE_FLAGS[word])
    (part,), _ = offer.parts(regions(SNAPSHOT), target)
    assert part.described.xen_flags == flags


def test_a_region_in_several_holders_is_several_parts() -> None:
    now = [dict(one) for one in regions(dataclasses.replace(SNAPSHOT, guests=(OWNER,)))]
    now[0]["pieces"] = [
        {"holderUuid": "a", "holderDomainId": 3, "holderFirstFrame": 0x100, "frameCount": 16},
        {"holderUuid": "b", "holderDomainId": 4, "holderFirstFrame": 0x900, "frameCount": 240},
    ]
    (one, two), _ = offer.parts(now, Target(guest="ctl", addresses=Addresses.GUEST))
    assert (one.described.domid, two.described.domid) == (3, 4)
    assert (one.described.size_bytes, two.described.size_bytes) == (16 << 12, 240 << 12)
    assert two.described.guest_address == one.described.guest_address + (16 << 12)
    assert two.described.mmap_offset == 0x900000


def test_a_guest_that_is_not_there_has_nothing() -> None:
    assert offer.parts(regions(SNAPSHOT), Target(guest="log")) == ((), ())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"ready": False}, "not there"),
        ({"holder_uuid": "00000000-0000-0000-0000-000000000009"}, "not there"),
        ({"terms": RegionTerms(backing=Backing.HOST)}, "memory of the host"),
    ],
)
def test_what_cannot_be_offered(change: dict[str, object], why: str) -> None:
    region = dataclasses.replace(SNAPSHOT.regions[0], **change)  # type: ignore[arg-type]
    now = regions(dataclasses.replace(SNAPSHOT, regions=(region,)))
    found, (withheld,) = offer.parts(now, Target(region="r0"))
    assert not found
    assert why in withheld.why


@pytest.mark.parametrize(
    "text",
    [
        "", "size=8", "size=8,descriptors=0,available=0,used=0,size=8",
        "size=7,descriptors=0,available=0,used=0", "size=8,descriptors=8,available=0,used=0",
        "size=8,descriptors=0,available=1,used=0", "size=8,descriptors=0,available=0,used=2",
        "size=8,descriptors=-16,available=0,used=0", "size=8,descriptors=x,available=0,used=0",
        "size=8,descriptors=0x10000000000000000,available=0,used=0", "kick=1",
    ],
)  # fmt: skip
def test_queues_that_there_cannot_be(text: str) -> None:
    with pytest.raises(UsageError, match="--queue"):
        args.parse(["vhost-user", "serve", "/x", "--region=r", f"--queue={text}"])


def test_queues_are_numbered() -> None:
    queue = "--queue=size=8,descriptors=16,available=32,used=64"
    options = args.parse(["vhost-user", "connect", "/x", "--guest=g", queue, queue])
    assert [each.where.index for each in options.queues] == [0, 1]
