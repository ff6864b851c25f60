# SPDX-License-Identifier: LGPL-2.1-or-later
"""A fake xenstored that speaks bytes, so that a test meets what a client meets.

It follows C xenstored as of Xen 4.17 to 4.21 (``tools/xenstored``; files are named where it
matters), not oxenstored, and shares no code with ``xshmd.xen.store_wire``, lest both err alike.
Every socket connection is dom0, as in C xenstored; :class:`Tree` also acts for other domains.
Not modelled: quotas, node size limits, watch depth, CONTROL.

    async with fake_xenstored() as server:
        server.write("/vm/x/name", "g1")          # as dom0; fires watches
        server.introduce(5)                       # fires @introduceDomain
        async with open_store(str(server.path)) as store: ...
        server.faults.eagain = 2
        assert server.log[-1].op == READ
"""

from __future__ import annotations

import dataclasses
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio

from fakes.xenstore_tree import DOM0, Match, Node, Transaction, Tree, XsError, is_child

HEADER: Final = struct.Struct("=IIII")
PAYLOAD_MAX: Final = 4096

# enum xsd_sockmsg_type, xen/include/public/io/xs_wire.h
DIRECTORY, READ, GET_PERMS, WATCH, UNWATCH = 1, 2, 3, 4, 5
TRANSACTION_START, TRANSACTION_END, INTRODUCE, RELEASE, GET_DOMAIN_PATH = 6, 7, 8, 9, 10
WRITE, MKDIR, RM, SET_PERMS, WATCH_EVENT, ERROR, IS_DOMAIN_INTRODUCED = 11, 12, 13, 14, 15, 16, 17
RESUME, RESET_WATCHES, DIRECTORY_PART = 18, 21, 22
OP_NAMES: Final = {
    value: name for name, value in list(globals().items()) if name.isupper() and type(value) is int
}

DOMID_SELF: Final = 0x7FF0


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One request, as it came."""

    connection: int
    """1 for the first connection ever made, and so on."""
    op: int
    rq_id: int
    tx_id: int
    payload: bytes

    @property
    def op_name(self) -> str:
        return OP_NAMES.get(self.op, str(self.op))

    @property
    def strings(self) -> tuple[str, ...]:
        return tuple(self.payload.decode(errors="replace").removesuffix("\0").split("\0"))

    @property
    def path(self) -> str:
        return self.strings[0]


Chooser = Callable[[Request], bool]


def nothing(request: Request) -> bool:
    """Choose no request."""
    return False


def everything(request: Request) -> bool:
    """Choose every request."""
    return True


def only(*ops: int) -> Chooser:
    """Return what chooses requests of these types."""
    return lambda request: request.op in ops


@dataclasses.dataclass(slots=True)
class Faults:
    """What goes wrong; may be changed at any time."""

    silent: Chooser = nothing
    """These are done but not answered, until :meth:`FakeXenstored.answer_held`."""
    deaf: Chooser = nothing
    """These are neither done nor answered."""
    drop_before: Chooser = nothing
    """The connection is dropped before these are done."""
    drop_after: Chooser = nothing
    """The connection is dropped after these are done, before they are answered."""
    refuse: Callable[[Request], str | None] = lambda request: None
    """The error these get instead of being done."""
    eagain: int = 0
    """How many of the next commits conflict."""
    piece_bytes: int = 0
    """Output is sent in pieces of this many bytes; 0: as it comes."""
    shuffle: int = 0
    """Answers are kept back until there are this many, and sent last first."""


@dataclasses.dataclass(slots=True)
class _Watch:
    path: str
    token: str
    prefix_length: int = 0


class Connection:
    """One client's connection; always dom0."""

    def __init__(self, server: FakeXenstored, stream: Any, number: int) -> None:
        self.number = number
        self.watches: list[_Watch] = []
        self.transactions: dict[int, Transaction] = {}
        self.scope = trio.CancelScope()
        self.held: list[tuple[Request, bytes]] = []
        self._server = server
        self._stream = stream
        self._next_transaction_id = 1
        self._out: list[bytes] = []
        self._shuffled: list[bytes] = []
        self._more = trio.Event()

    async def serve(self) -> None:
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._send_loop)
                    await self._receive_loop()
                    nursery.cancel_scope.cancel()
        finally:
            self._stream.socket.close()

    async def _send_loop(self) -> None:
        while True:
            await self._more.wait()
            self._more = trio.Event()
            while self._out:
                data = self._out.pop(0)
                step = self._server.faults.piece_bytes or len(data)
                try:
                    for start in range(0, len(data), step):
                        await self._stream.send_all(data[start : start + step])
                        if step < len(data):
                            await trio.lowlevel.checkpoint()  # the client takes it by itself
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return

    async def _receive_loop(self) -> None:
        buffer = bytearray()
        while True:
            try:
                data = await self._stream.receive_some(65536)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if not data:
                return
            buffer += data
            while len(buffer) >= HEADER.size:
                op, rq_id, tx_id, length = HEADER.unpack_from(buffer)
                if length > PAYLOAD_MAX:
                    return  # core.c handle_input: the connection is killed
                if len(buffer) < HEADER.size + length:
                    break
                payload = bytes(buffer[HEADER.size : HEADER.size + length])
                del buffer[: HEADER.size + length]
                if not self._process(Request(self.number, op, rq_id, tx_id, payload)):
                    return

    def send_raw(self, data: bytes) -> None:
        """Send these bytes, whatever they are."""
        self._out.append(data)
        self._more.set()

    def _reply(self, request: Request, op: int, payload: bytes) -> None:
        if len(payload) > PAYLOAD_MAX:  # core.c send_reply
            op, payload = ERROR, b"E2BIG\0"
        data = HEADER.pack(op, request.rq_id, request.tx_id, len(payload)) + payload
        faults = self._server.faults
        if faults.silent(request):
            self.held.append((request, data))
        elif faults.shuffle:
            self._shuffled.append(data)
            if len(self._shuffled) >= faults.shuffle:
                for kept in reversed(self._shuffled):
                    self.send_raw(kept)
                self._shuffled.clear()
        else:
            self.send_raw(data)

    def send_event(self, path: str, token: str) -> None:
        """core.c send_event: one that is waiting to be sent already is not sent twice."""
        payload = f"{path}\0{token}\0".encode()
        if len(payload) > PAYLOAD_MAX:
            return
        data = HEADER.pack(WATCH_EVENT, 0, 0, len(payload)) + payload
        if path.startswith("@") or data not in self._out:
            self.send_raw(data)

    def fire(self, path: str, match: Match) -> None:
        """watch.c fire_watches."""
        for watch in self.watches:
            hit = is_child(path, watch.path) if match is Match.SUBTREE else path == watch.path
            if hit:
                self.send_event(path[watch.prefix_length :], watch.token)

    def _process(self, request: Request) -> bool:
        """core.c process_message; return False to drop the connection."""
        server = self._server
        server.log.append(request)
        if server.faults.drop_before(request):
            return False
        if server.faults.deaf(request):
            return True
        handler = self._HANDLERS.get(request.op)
        try:
            if error := server.faults.refuse(request):
                raise XsError(error)
            if handler is None:
                raise XsError("ENOSYS")
            tx = None
            if request.tx_id and request.op not in (WATCH, UNWATCH):  # XS_FLAG_NOTID
                tx = self.transactions.get(request.tx_id)
                if tx is None:
                    raise XsError("ENOENT")  # transaction.c transaction_lookup
            # A handler answers by itself only where something must follow its answer.
            answer = handler(self, request, tx)
        except XsError as exc:
            self._reply(request, ERROR, f"{exc}\0".encode())
        else:
            if server.faults.drop_after(request):
                return False
            if answer is not None:
                self._reply(request, request.op, answer)
        return True

    @staticmethod
    def _one_string(request: Request) -> str:
        """core.c onearg: exactly one NUL, at the end."""
        if request.payload.find(b"\0") != len(request.payload) - 1:
            raise XsError("EINVAL")
        return request.payload[:-1].decode("latin-1")

    @staticmethod
    def _strings(request: Request, count: int, *, at_least: bool = False) -> list[str]:
        parts = request.payload.decode("latin-1").split("\0")[:-1]
        if len(parts) < count or (len(parts) > count and not at_least):
            raise XsError("EINVAL")
        return parts

    def _domid(self, request: Request) -> int:
        text = self._strings(request, 1, at_least=True)[0]
        if not text.isdigit() or int(text) > 0xFFFF:
            raise XsError("EINVAL")
        return int(text)

    def _directory(self, request: Request, tx: Transaction | None) -> bytes:
        _, names = self._server.tree.directory(self._one_string(request), tx=tx)
        return b"".join(name.encode() + b"\0" for name in names)

    def _directory_part(self, request: Request, tx: Transaction | None) -> bytes:
        """core.c send_directory_part."""
        path, offset_text = self._strings(request, 2)
        generation, names = self._server.tree.directory(path, tx=tx)
        offset = int(offset_text)
        head = b"%d\0" % generation
        rest = b"".join(name.encode() + b"\0" for name in names)[offset:]
        if not rest:
            return head + b"\0"
        room = PAYLOAD_MAX - len(head) - 1
        part = b""
        for name in rest[:-1].split(b"\0"):
            if len(part) + len(name) >= room:
                return head + part
            part += name + b"\0"
        return head + part + b"\0"

    def _read(self, request: Request, tx: Transaction | None) -> bytes:
        return self._server.tree.read(self._one_string(request), tx=tx)

    def _get_perms(self, request: Request, tx: Transaction | None) -> bytes:
        permissions = self._server.tree.permissions(self._one_string(request), tx=tx)
        return b"".join(permission.encode() + b"\0" for permission in permissions)

    def _watch(self, request: Request, tx: Transaction | None) -> None:
        """watch.c do_watch: the answer, then the first event."""
        path, token = self._strings(request, 2)
        relative = not path.startswith(("/", "@"))
        path = self._server.tree.canonical(path, special=True)
        if any((watch.path, watch.token) == (path, token) for watch in self.watches):
            raise XsError("EEXIST")
        watch = _Watch(path, token, prefix_length=1 if relative else 0)
        self.watches.append(watch)
        self._reply(request, request.op, b"OK\0")
        self.send_event(path[watch.prefix_length :], token)

    def _unwatch(self, request: Request, tx: Transaction | None) -> bytes:
        path, token = self._strings(request, 2)
        path = self._server.tree.canonical(path, special=True)
        for watch in self.watches:
            if (watch.path, watch.token) == (path, token):
                self.watches.remove(watch)
                return b"OK\0"
        raise XsError("ENOENT")

    def _reset_watches(self, request: Request, tx: Transaction | None) -> bytes:
        self.watches.clear()
        self.transactions.clear()
        return b"OK\0"

    def _transaction_start(self, request: Request, tx: Transaction | None) -> bytes:
        if tx is not None:
            raise XsError("EBUSY")
        while self._next_transaction_id in self.transactions:
            self._next_transaction_id += 1
        tx_id = self._next_transaction_id
        self._next_transaction_id += 1
        self._server.tree.generation += 1
        self.transactions[tx_id] = Transaction()
        return b"%d\0" % tx_id

    def _transaction_end(self, request: Request, tx: Transaction | None) -> bytes:
        verdict = self._one_string(request)
        if verdict not in ("T", "F"):
            raise XsError("EINVAL")
        if tx is None:
            raise XsError("ENOENT")
        del self.transactions[request.tx_id]  # it has ended, whatever follows
        if verdict == "T":
            if self._server.faults.eagain:
                self._server.faults.eagain -= 1
                raise XsError("EAGAIN")
            self._server.tree.commit(tx)
        return b"OK\0"

    def _write(self, request: Request, tx: Transaction | None) -> bytes:
        path, nul, value = request.payload.partition(b"\0")
        if not nul:
            raise XsError("EINVAL")
        self._server.tree.write(path.decode("latin-1"), value, tx=tx)
        return b"OK\0"

    def _mkdir(self, request: Request, tx: Transaction | None) -> bytes:
        self._server.tree.mkdir(self._one_string(request), tx=tx)
        return b"OK\0"

    def _rm(self, request: Request, tx: Transaction | None) -> bytes:
        self._server.tree.remove(self._one_string(request), tx=tx)
        return b"OK\0"

    def _set_perms(self, request: Request, tx: Transaction | None) -> bytes:
        path, *permissions = self._strings(request, 2, at_least=True)
        self._server.tree.set_permissions(path, tuple(permissions), tx=tx)
        return b"OK\0"

    def _get_domain_path(self, request: Request, tx: Transaction | None) -> bytes:
        return b"/local/domain/%d\0" % self._domid(request)

    def _is_domain_introduced(self, request: Request, tx: Transaction | None) -> bytes:
        domid = self._domid(request)
        known = domid == DOMID_SELF or domid in self._server.introduced
        return b"T\0" if known else b"F\0"

    def _introduce(self, request: Request, tx: Transaction | None) -> bytes:
        domid = self._domid(request)
        self._strings(request, 3, at_least=True)
        self._server.introduce(domid)
        return b"OK\0"

    def _release(self, request: Request, tx: Transaction | None) -> bytes:
        domid = self._domid(request)
        if domid == DOM0:
            raise XsError("EINVAL")
        if domid not in self._server.introduced:
            raise XsError("ENOENT")
        self._server.release(domid)
        return b"OK\0"

    def _resume(self, request: Request, tx: Transaction | None) -> bytes:
        if self._domid(request) not in self._server.introduced:
            raise XsError("ENOENT")
        return b"OK\0"

    _HANDLERS: Final[
        dict[int, Callable[[Connection, Request, Transaction | None], bytes | None]]
    ] = {
        DIRECTORY: _directory,
        DIRECTORY_PART: _directory_part,
        READ: _read,
        GET_PERMS: _get_perms,
        WATCH: _watch,
        UNWATCH: _unwatch,
        RESET_WATCHES: _reset_watches,
        TRANSACTION_START: _transaction_start,
        TRANSACTION_END: _transaction_end,
        WRITE: _write,
        MKDIR: _mkdir,
        RM: _rm,
        SET_PERMS: _set_perms,
        GET_DOMAIN_PATH: _get_domain_path,
        IS_DOMAIN_INTRODUCED: _is_domain_introduced,
        INTRODUCE: _introduce,
        RELEASE: _release,
        RESUME: _resume,
    }


class FakeXenstored:
    """The server, and a test's hands on it.  All methods act at once, as dom0 unless said."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.faults = Faults()
        self.log: list[Request] = []
        self.connections: list[Connection] = []
        self.introduced: set[int] = {DOM0}
        self.tree = Tree(self._fire)
        self._nr_connections = 0
        self._listener: trio.SocketListener | None = None
        self._listening = trio.Event()

    # The tree.

    @property
    def nodes(self) -> dict[str, Node]:
        """Every node by its path; look, and change by the methods below."""
        return self.tree.nodes

    def read(self, path: str) -> str | None:
        """Return a node's value, or None."""
        node = self.nodes.get(path)
        return node.text if node else None

    def write(
        self, path: str, value: str | bytes, *, domid: int = DOM0, permissions: str = ""
    ) -> None:
        """Write as some domain would; ``permissions`` such as "n0 r5" are then set by dom0."""
        data = value if isinstance(value, bytes) else value.encode()
        self.tree.write(path, data, domid=domid)
        if permissions:
            self.tree.set_permissions(path, tuple(permissions.split()))

    def remove(self, path: str, *, domid: int = DOM0) -> None:
        self.tree.remove(path, domid=domid)

    def permissions(self, path: str) -> tuple[str, ...]:
        return self.tree.permissions(path)

    def below(self, path: str) -> dict[str, str]:
        """Return the values of a node and of all below it, for comparing."""
        return {at: node.text for at, node in self.nodes.items() if is_child(at, path)}

    # Domains.

    def create_domain(self, domid: int) -> None:
        """Let the domain exist in Xen, so that permissions may name it."""
        self.tree.domains.add(domid)

    def introduce(self, domid: int) -> None:
        """domain.c introduce_domain: only the first time is an event."""
        self.create_domain(domid)
        if domid not in self.introduced:
            self.introduced.add(domid)
            self._fire_special("@introduceDomain")

    def shut_down(self, domid: int) -> None:
        """domain.c do_check_domain: the domain has shut down and still exists."""
        if domid in self.introduced:
            self._fire_special("@releaseDomain")

    def release(self, domid: int) -> None:
        """domain.c destroy_domain: its nodes go, with their events, then @releaseDomain."""
        self.tree.forget_domain(domid)
        if domid in self.introduced:
            self.introduced.discard(domid)
            self._fire_special("@releaseDomain")

    def _fire(self, path: str, match: Match, node: Node | None) -> None:
        for connection in self.connections:
            connection.fire(path, match)

    def _fire_special(self, name: str) -> None:
        self._fire(name, Match.EXACT, None)

    # The wire.

    @property
    def connection(self) -> Connection:
        """The newest connection."""
        return self.connections[-1]

    def requests(self, *ops: int) -> list[Request]:
        """Return the logged requests of these types, in order of arrival."""
        return [request for request in self.log if request.op in ops]

    def answer_held(self, choose: Chooser = everything) -> None:
        """Send, late, the answers that ``faults.silent`` kept back."""
        for connection in self.connections:
            for request, data in [held for held in connection.held if choose(held[0])]:
                connection.held.remove((request, data))
                connection.send_raw(data)

    def drop(self) -> None:
        """Drop every connection, with its watches and transactions; nodes stay."""
        for connection in self.connections:
            connection.scope.cancel()
        self.connections.clear()

    def stop(self) -> None:
        """End: no connection, and nothing at the path."""
        self.drop()
        if self._listener is not None:
            self._listener.socket.close()
            self._listener = None
            self.path.unlink()

    def start(self, *, fresh: bool = False) -> None:
        """Listen (again); ``fresh`` as after a crash, when all is lost but dom0."""
        if fresh:
            self.tree = Tree(self._fire)
            self.introduced = {DOM0}
        # Not trio's bind: that uses a thread, during which autojump_clock runs away.
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(str(self.path))
            sock.listen(16)
        except BaseException:
            sock.close()
            raise
        self._listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        self._listening.set()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await self._listening.wait()
                self._listening = trio.Event()
                while (listener := self._listener) is not None:
                    try:
                        stream = await listener.accept()
                    except trio.ClosedResourceError:
                        break
                    self.serve(stream, nursery)

    def serve(self, stream: Any, nursery: trio.Nursery) -> None:
        """Begin to serve what is at the other end of this stream."""
        self._nr_connections += 1
        connection = Connection(self, stream, self._nr_connections)
        self.connections.append(connection)
        nursery.start_soon(self._serve, connection)

    async def _serve(self, connection: Connection) -> None:
        try:
            await connection.serve()
        finally:
            if connection in self.connections:
                self.connections.remove(connection)


@asynccontextmanager
async def fake_xenstored() -> AsyncIterator[FakeXenstored]:
    """Run a fake xenstored on a socket of its own."""
    failure: BaseException | None = None
    # Not pytest's tmp_path: the name of a socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="xs") as directory:
        server = FakeXenstored(Path(directory, "socket"))
        server.start()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.run)
                try:
                    yield server
                except BaseException as exc:
                    failure = exc  # raised below, where the nursery does not wrap it
                nursery.cancel_scope.shield = True
                nursery.cancel_scope.cancel()
        finally:
            server.stop()
    if failure is not None:
        raise failure
