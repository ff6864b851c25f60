# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ``xshmd-keeper`` command: opens Xen and a socket, and answers as long as the host runs."""

from __future__ import annotations

import argparse
import os
import selectors
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xshmd import __version__
from xshmd.errors import Conflict, UsageError, XshmError
from xshmd.keeper import wire
from xshmd.keeper.shelf import Shelf
from xshmd.xen.hypervisor import XenHypervisor


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xshmd-keeper",
        description="Keep dom0's mappings of sealed shared memory while xshmd comes and goes.",
    )
    parser.add_argument("--version", action="version", version=f"xshmd-keeper {__version__}")
    parser.add_argument(
        "--socket", type=Path, default=wire.SOCKET, metavar="PATH",
        help="where xshmd finds it (default: %(default)s)",
    )  # fmt: skip
    return parser


def listen(path: Path) -> socket.socket:
    """Return a socket at ``path`` that only root can reach; Conflict if somebody answers there."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            if other.connect_ex(str(path)) == 0:
                raise Conflict(f"another xshmd-keeper answers at {path}", hint="it is enough")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(umask)
    listener.listen()
    return listener


def answer(shelf: Shelf, text: bytes) -> bytes:
    """Return the reply to a call; whatever is wrong with it is in the reply."""
    try:
        call: dict[str, Any] = wire.message(text)
        what = call.pop("call")
        if what not in wire.CALLS:
            raise UsageError(f"xshmd-keeper knows no call {what!r}", hint="update it with xshmd")
        return wire.line({"reply": getattr(shelf, what)(**call)})
    except XshmError as error:
        return wire.line({"error": wire.error_fields(error)})
    except (ValueError, KeyError, TypeError) as broken:
        wrong = UsageError(f"no call of xshmd's: {broken}", hint="update xshmd-keeper with xshmd")
        return wire.line({"error": wire.error_fields(wrong)})


def serve(shelf: Shelf, listener: socket.socket) -> None:
    """Answer calls, one at a time, until the process is ended."""
    with selectors.DefaultSelector() as ready:
        ready.register(listener, selectors.EVENT_READ)
        try:
            while True:
                for key, _ in ready.select():
                    if key.fileobj is listener:
                        client, _ = listener.accept()
                        ready.register(client, selectors.EVENT_READ, client.makefile("rb"))
                    elif not _talk(shelf, key):
                        ready.unregister(key.fileobj)
                        _hang_up(key)
        finally:
            for key in tuple(ready.get_map().values()):
                if key.fileobj is not listener:
                    _hang_up(key)


def _hang_up(key: selectors.SelectorKey) -> None:
    assert isinstance(key.fileobj, socket.socket)
    key.data.close()
    key.fileobj.close()


def _talk(shelf: Shelf, key: selectors.SelectorKey) -> bool:
    """Answer one call; return whether the client is still there."""
    assert isinstance(key.fileobj, socket.socket)
    try:
        # The daemon asks one thing at a time, so no second line is left in the buffer.
        text = key.data.readline()
        if text.endswith(b"\n"):
            key.fileobj.sendall(answer(shelf, text))
            return True
    except OSError:
        pass  # it died in the middle: what it had done is kept all the same
    return False


def _say_ready() -> None:
    """Tell systemd (sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET", ""):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
            to.connect("\0" + address[1:] if address.startswith("@") else address)
            to.send(b"READY=1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the keeper; return its exit status if it cannot."""
    chosen = _parser().parse_args(arguments)
    try:
        with XenHypervisor() as xen, listen(chosen.socket) as listener:
            _say_ready()
            serve(Shelf(xen), listener)
    except XshmError as error:
        print(f"xshmd-keeper: {error.one_line()}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
