# SPDX-License-Identifier: LGPL-2.1-or-later
"""Everything that reads what others wrote, each with what must hold whatever that is.

A target returns, or raises only what its reader documents; anything else that comes out is a bug.
Where something was understood, writing it and reading it again must give the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog.testing
from scatter_words import Toy

from fuzz import vhost_user
from xshmd.changes import AttachRegion
from xshmd.config import static_shm, xlcfg
from xshmd.config.devicetree import read_devicetree
from xshmd.config.guest import guest_config
from xshmd.config.host_policy import read_policy
from xshmd.config.toml import read_toml
from xshmd.config.toml_write import render_toml
from xshmd.config.xl_command import create_arguments
from xshmd.engine import intents, records
from xshmd.errors import ConfigError, ConfigUnreadable, StoreError, UsageError
from xshmd.machine import Arch
from xshmd.model import PeerState, Place, RegionRequest
from xshmd.policy import quota_rules
from xshmd.policy.holdings import NOTHING, Holdings
from xshmd.share import control_page
from xshmd.units import PAGE_SHIFT, PAGE_SIZE
from xshmd.varlink import idl
from xshmd.varlink import records as varlink_records
from xshmd.varlink import wire as varlink_wire
from xshmd.vhost_user import wire
from xshmd.xen import store_wire

CORPUS: Final = Path(__file__).parent / "corpus"
FILE: Final = "fuzzed"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One reader."""

    name: str
    run: Callable[[bytes], None]
    words: tuple[bytes, ...] = ()
    inputs: str = ""
    """Whose corpus it has, if not one of its own."""
    cost: int = 1
    """How many inputs of others take as long as one of it."""

    @property
    def folder(self) -> Path:
        """Where its corpus is."""
        return CORPUS / (self.inputs or self.name)

    def corpus(self) -> list[bytes]:
        """Return the committed inputs, the empty one first."""
        return [b"", *(path.read_bytes() for path in sorted(self.folder.iterdir()))]


def _words(text: str) -> tuple[bytes, ...]:
    return tuple(word.encode() for word in text.split())


def xl_config(data: bytes) -> None:
    """The language of xl's configurations."""
    try:
        config = xlcfg.parse(data, FILE)
    except ConfigUnreadable:
        return
    plain = config.plain()
    assert xlcfg.parse(xlcfg.render(plain), FILE).plain() == plain


def guest(data: bytes) -> None:
    """What a whole configuration says about shared memory."""
    for arch in Arch:
        try:
            config = guest_config(data, file=FILE, arch=arch)
        except (ConfigError, ConfigUnreadable) as error:
            said = error.message
        else:
            said = FILE
            for request in config.requests:
                _sound(request)
        assert said.startswith(FILE), said


def entry(data: bytes) -> None:
    """One entry of static_shm."""
    errors: list[ConfigError] = []
    request = static_shm.parse_entry(data.decode("latin-1"), Place(file=FILE), errors)
    assert (request is None) == bool(errors)
    if request is None:
        return
    _sound(request)
    again = static_shm.parse_entry(static_shm.render_entry(request), Place(file=FILE), errors)
    assert again == request
    assert not errors


def toml(data: bytes) -> None:
    """A file of regions.d."""
    try:
        said = read_toml(data, file=f"{FILE}.toml")
    except (ConfigError, ConfigUnreadable):
        return
    for config in said.guests:
        for request in config.requests:
            _sound(request)
    text, losses = render_toml(said)
    assert losses == ()
    again = read_toml(text.encode(), file=f"{FILE}.toml")
    assert [config.name for config in again.guests] == [config.name for config in said.guests]


def host_policy(data: bytes) -> None:
    """What the administrator allows; whatever it is, guests can be held against it."""
    try:
        said = read_policy(data, file=f"{FILE}.toml")
    except (ConfigError, ConfigUnreadable):
        return
    one = Holdings(regions={"r": 1}, guests={"a": {"r": 1}, "b": {"r": 1}}, homes={})
    for error in quota_rules.broken(
        quota_rules.Growth(before=NOTHING, after=one, policy=said, free_bytes=0)
    ):
        assert f"{FILE}.toml" in error.hint, error.hint


def devicetree(data: bytes) -> None:
    """A flattened device tree."""
    try:
        said = read_devicetree(_MAGIC + data[4:], file=f"{FILE}.dtb")
    except (ConfigError, ConfigUnreadable):
        return
    for config in said.guests:
        for request in config.requests:
            _sound(request)


_MAGIC: Final = b"\xd0\x0d\xfe\xed"
"""Of a blob: without it the text would be taken for a source, and handed to dtc."""


def _sound(request: RegionRequest) -> None:
    assert request.nr_frames >= 0
    assert request.offset_frames >= 0
    assert -1 <= request.first_gfn <= request.first_gfn + request.nr_frames <= 1 << 64 - PAGE_SHIFT


def xenstore(data: bytes) -> None:
    """Bytes from xenstored, however they are cut."""
    whole, cut = store_wire.FrameDecoder(), store_wire.FrameDecoder()
    found: list[tuple[list[store_wire.Frame], bool]] = []
    middle = len(data) // 3
    for decoder, pieces in ((whole, [data]), (cut, [data[:middle], data[middle:]])):
        frames: list[store_wire.Frame] = []
        broken = False
        try:
            for piece in pieces:
                decoder.feed(piece)
                while (frame := decoder.next_frame()) is not None:
                    frames.append(frame)
        except store_wire.WireError:
            broken = True
        found.append((frames, broken))
    assert found[0] == found[1]
    for frame in found[0][0]:
        for read in _PAYLOADS:
            with contextlib.suppress(store_wire.WireError, StoreError):
                read(frame.payload)


_PAYLOADS: Final[tuple[Callable[[bytes], object], ...]] = (
    store_wire.split_strings,
    store_wire.decode_value,
    store_wire.decode_error,
    store_wire.decode_event,
    store_wire.decode_introduced,
    store_wire.decode_transaction_id,
    store_wire.decode_directory_part,
)


def record(data: bytes) -> None:
    """A record of ours that something else has written over."""
    for kind in (
        records.decode_holder, records.decode_region, records.decode_guest, records.decode_lease,
    ):  # fmt: skip
        try:
            text = data.decode()
            found = kind("/xshmd/x/y", text)
        except (StoreError, UnicodeDecodeError):
            continue
        assert kind("/xshmd/x/y", records.encode(found)) == found


def intent(data: bytes) -> None:
    """The journal of a set of changes: its head on the first line, then a node on each."""
    try:
        head, *lines = data.decode().split("\n")
    except UnicodeDecodeError:
        return
    below = {name: text for name, _, text in (line.partition("=") for line in lines)}
    try:
        found = intents.decode("i", head, below)
    except StoreError:
        return
    if found is None:
        return
    at = intents.intent_path("i")
    again = {path.removeprefix(f"{at}/"): text for path, text in intents.nodes(found)}
    assert intents.decode("i", again.pop(at), again) == found


def xl_command(data: bytes) -> None:
    """The command line of a process."""
    found = create_arguments([os.fsdecode(word) for word in data.split(b"\0")])
    assert found is None or found.config_file


def varlink_changes(data: bytes) -> None:
    """What a client wants changed, past the check against the interface."""
    try:
        call = varlink_wire.parse_call(data)
        _REGIONS.check(_REGIONS.methods["Apply"].takes, call.parameters)
    except (varlink_wire.ProtocolViolation, idl.Mismatch):
        return
    for fields in call.parameters["changes"]:
        with contextlib.suppress(UsageError):
            change = varlink_records.change_from(fields)
            if isinstance(change, AttachRegion):
                _sound(change.request)


_REGIONS: Final = idl.load("io.xshmd.Regions")


def varlink_message(data: bytes) -> None:
    """What a client sends, and what a server answers."""
    try:
        call = varlink_wire.parse_call(data)
    except varlink_wire.ProtocolViolation:
        pass
    else:
        again = varlink_wire.parse_call(varlink_wire.encode_call(call)[:-1])
        assert (again.method, again.parameters) == (call.method, call.parameters)
        for method in _REGIONS.methods.values():
            with contextlib.suppress(idl.Mismatch):
                _REGIONS.check(method.takes, call.parameters)
    try:
        reply = varlink_wire.parse_reply(data)
    except varlink_wire.ProtocolViolation:
        return
    again_reply = varlink_wire.parse_reply(varlink_wire.encode_reply(reply)[:-1])
    assert (again_reply.parameters, again_reply.error) == (reply.parameters, reply.error)


def varlink_stream(data: bytes) -> None:
    """The cutting of a stream into messages."""
    decoder = varlink_wire.Decoder(1024)
    try:
        for start in range(0, len(data), 7):
            decoder.feed(data[start : start + 7])
            while (message := decoder.next_message()) is not None:
                assert len(message) <= 1024
                assert b"\0" not in message
    except varlink_wire.ProtocolViolation:
        pass


def varlink_idl(data: bytes) -> None:
    """An interface definition."""
    with contextlib.suppress(idl.IdlError):
        idl.parse(data.decode("latin-1"))


def scatter(data: bytes) -> None:
    """Lists and transfers that strangers ask for: whose bytes they are is watched by the memory."""
    with structlog.testing.capture_logs():
        Toy().play(data)


def request_page(data: bytes) -> None:
    """What two guests write into the pages in which they ask for lists and transfers."""
    with structlog.testing.capture_logs():
        Toy().play_pages(data)


def page(data: bytes) -> None:
    """A control page, which every guest of a region can write."""
    before = data[:PAGE_SIZE].ljust(PAGE_SIZE, b"\0")
    size_bytes = 2 * PAGE_SIZE + PAGE_SIZE * (len(data) % 5)
    for watch in control_page.watches(before, size_bytes):
        assert 0 <= watch.address < size_bytes
        assert watch.counter % 4 == 0
        assert watch.counter + 4 <= size_bytes - PAGE_SIZE
    rows = {1: control_page.Row(state=PeerState.JOINED, domid=5, ports=(3, 4))}
    after = bytearray(before)
    for at, piece in control_page.table(rows, 2, before):
        assert 0 <= at <= PAGE_SIZE - len(piece)
        after[at : at + len(piece)] = piece
    head = control_page.HEADER.unpack_from(after)
    assert head[:3] == (control_page.MAGIC, control_page.VERSION, 2)
    assert control_page.DOM0S_WORDS.unpack_from(after, control_page.row_at(1))[:2] == (1, 5)


TARGETS: Final = {
    target.name: target
    for target in (
        Target(
            name="xl-config", run=xl_config,
            words=_words("""static_shm = += [ ] [] , ; # ' " \\n \\x41 name memory "x" \\\n"""),
        ),
        Target(
            name="guest", run=guest,
            words=_words("""static_shm static_shared_mem = [ ] "id=r0," begin= size= role=owner
                borrower master slave type="pvh" "hvm" "pv" builder memory maxmem hap altp2m
                nestedhvm pvshim uuid lifetime= isolation= transport=
                prot=ro end= granularity=4k"""),
        ),
        Target(
            name="entry", run=entry,
            words=_words("""id= begin= end= size= offset= role= owner borrower master slave prot=
                rw ro RO RW cache_policy= ARM_normal x86_normal granularity=4k lifetime= members
                system isolation= group sealed region transport= physmap grant prot_enforcement=
                advisory required , = 0x1000 0x3a000000"""),
        ),
        Target(
            name="toml",
            run=toml,
            words=_words("""[region.r] [region.r.guest.g] [guest.g] size = "1_MiB" owner begin
                offset prot "rw" "ro" role lifetime "members" backing "host" host_address 0x1000
                true external memory_map [[ ]] { } inf 1979-05-27 ''' # ."""),
        ),
        Target(
            name="host-policy",
            run=host_policy,
            words=_words("""[limits] [allow.x] regions = 1 members leases memory "1_MiB" guests
                regions_per_guest memory_per_guest free_memory pause "2_ms" dom0 true ["*"]
                ["a","b"] [] {} 0 -1 18446744073709551616 [!a] [[ ]] ."""),
        ),
        Target(
            name="devicetree",
            run=devicetree,
            words=(b"xen,shared-mem\0", b"xen,shm-id\0", b"xen,domain\0", b"role\0", b"owner\0",
                b"\0\0\0\1", b"\0\0\0\2", b"\0\0\0\3", b"\0\0\0\x09", b"#size-cells\0"),
        ),
        Target(name="xenstore", run=xenstore, words=(b"\0", b"\x0d\0\0\0", b"EAGAIN\0", b"OK\0")),
        Target(
            name="record", run=record,
            words=_words("""{ } [ ] : , "v":1 "id" "frames" "holder" "domid" "uuid" "name" "state"
                "attached" "requests" "terms" null true false -1 1e999 NaN "ended" "lifetime" """),
        ),
        Target(
            name="intent", run=intent,
            words=_words("""{ } [ ] : , "v":1 "committed" "reason" "attach" "detach" "late" "pauses"
                "counting" "mapping" guest- create- lifetime- remove- = system members null true
                -1 1e999 z: z:eJw \n"""),
        ),
        Target(
            name="xl-command", run=xl_command,
            words=(b"\0", b"create", b"-p", b"-f", b"--defconfig=", b"-N", b"--", b"=", b"-vvv"),
        ),
        Target(
            name="varlink-changes", run=varlink_changes,
            words=_words("""{ } [ ] : , "changes" "add" "remove" "attach" "detach" "entry" "region"
                "guest" "id" "sizeBytes" "firstFrame" "frameCount" "offsetFrames" "terms" "prot"
                "role" "backing" "hostFirstFrame" "cachePolicy" "lifetime" "dryRun" null true -1
                4096 18446744073709551616 "host" "owner" "ro" """),
        ),
        Target(
            name="varlink-message", run=varlink_message,
            words=_words("""{ } [ ] : , "method" "parameters" "more" "oneway" "upgrade" "error"
                "continues" "io.xshmd.Regions.ListRegions" "io.xshmd.Regions.Apply" true null
                \\ud800 \\u0000 1e400 -0"""),
        ),
        Target(
            name="request-page", run=request_page,
            words=(
                b"\1\0\0\0", b"\2\0\0\0", b"\3\0\0\0", b"\4\0\0\0", b"\5\0\0\0", b"\xff" * 8,
                b"\0\0\0\0\0\0\0\x80", b"\0\x10\0\0\0\0\0\0", b"\x41\0\0\0",
            ),
        ),
        Target(
            name="scatter", run=scatter,
            words=(
                b"\x01\x04", b"\x16\x48", b"\xff" * 8, b"\0\0\0\0\0\0\0\x80",
                b"\0\x20\0\0\0\0\0\0", b"\x08\0\0\0\0\0\0\0",
            ),
        ),
        Target(
            name="page", run=page,
            words=(
                control_page.HEADER.pack(control_page.MAGIC, control_page.VERSION, 2, 9),
                control_page.encode_watch(100), control_page.encode_watch(4095, 64),
                bytes(64), b"\xff" * 8, b"\1\0\0\0\5\0\0\0",
            ),
        ),
        Target(name="varlink-stream", run=varlink_stream, words=(b"\0", b"{}\0", b"x" * 1024)),
        *(
            Target(
                name=name, run=run, inputs="vhost-user", cost=cost,
                words=tuple(
                    wire.HEADER.pack(request, flags, size)
                    for request in wire.Request for flags in (1, 9) for size in (0, 8, 40, 48)
                ),
            )
            for name, run, cost in (
                ("vhost-user", vhost_user.vhost_user, 1),
                ("vhost-user-loop", vhost_user.through_the_loop, 6),
            )
        ),
        Target(
            name="virtqueue", run=vhost_user.virtqueue,
            words=(b"\x00\x00\x00\x3a\0\0\0\0", b"\x10\0\0\0\1\0\1\0", b"\xff\xff\xff\xff",
                b"\x00\x01\x00\x3a\0\0\0\0", b"\x20\0\0\0\4\0\0\0", b"\2\0", b"\4\0"),
        ),
        Target(
            name="varlink-idl", run=varlink_idl,
            words=_words("interface type method error -> ( ) : , ? [] [string] string int object"),
        ),
    )
}  # fmt: skip
