# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xshmctl dump`` and ``load``: a region's bytes to the standard output, or from the input."""

from __future__ import annotations

import base64
import os
import stat
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

from xshmd import errors
from xshmd.units import human_size
from xshmd.varlink.client import Client

CHUNK_BYTES: Final = 64 * 1024
"""What the daemon reads or writes at a time, at the most."""
_PROGRESS_S: Final = 0.5


def run(options: Any) -> int:
    """Copy the bytes."""
    with Client(options.socket) as client:
        rest_bytes = bytes_left(client, options)
        if options.verb == "dump":
            _dump(client, options, rest_bytes)
        else:
            _load(client, options, rest_bytes)
    return 0


def bytes_left(client: Client, options: Any) -> int:
    """Return how many bytes the region has from the offset on."""
    size_bytes: int = client.call("ShowRegion", id=options.id)["region"]["sizeBytes"]
    if options.offset > size_bytes:
        raise errors.UsageError(
            f"region {options.id} has no byte {options.offset}",
            hint=f"it has {size_bytes} bytes, {human_size(size_bytes)}",
        )
    return size_bytes - int(options.offset)


def length_of(options: Any, rest_bytes: int) -> int:
    """Return how many of the bytes that are left are wanted."""
    length: int = rest_bytes if options.length is None else options.length
    if length > rest_bytes:
        raise errors.UsageError(
            f"region {options.id} has {rest_bytes} bytes from {options.offset} on, not {length}"
        )
    return length


def pieces(client: Client, options: Any, length: int) -> Iterator[tuple[int, bytes]]:
    """Yield the bytes piece by piece, each with how many came before it."""
    for start in range(0, length, CHUNK_BYTES):
        reply = client.call(
            "ReadRegion",
            id=options.id,
            offsetBytes=options.offset + start,
            byteCount=min(CHUNK_BYTES, length - start),
        )
        yield start, base64.b64decode(reply["data"])


def _dump(client: Client, options: Any, rest_bytes: int) -> None:
    length = length_of(options, rest_bytes)
    out = sys.stdout.buffer
    if out.isatty():
        raise errors.UsageError(
            "a region's bytes do not belong on a terminal",
            hint=f"xshmctl dump {options.id} > FILE, or xshmctl hexdump {options.id}",
        )
    progress = Progress(length)
    try:
        for start, data in pieces(client, options, length):
            out.write(data)
            progress.reached(start)
        out.flush()
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise errors.XshmError(f"the bytes cannot be written: {exc.strerror}") from exc
    progress.end()


def _load(client: Client, options: Any, rest_bytes: int) -> None:
    source = sys.stdin.buffer
    known = _file_bytes(source.fileno())
    if known is not None and known > rest_bytes:
        raise _too_long(options, rest_bytes, f"the input has {known}")
    progress = Progress(known or rest_bytes)
    done = 0
    while data := source.read(CHUNK_BYTES):
        if done + len(data) > rest_bytes:
            raise _too_long(options, rest_bytes, f"{done} of the input are written, it has more")
        client.call(
            "WriteRegion",
            id=options.id,
            offsetBytes=options.offset + done,
            data=base64.b64encode(data).decode("ascii"),
            dryRun=options.dry_run or None,
        )
        done += len(data)
        progress.reached(done)
    progress.end()
    if options.dry_run:
        print(f"would write {done} bytes into {options.id}, from byte {options.offset} on")


def _too_long(options: Any, rest_bytes: int, what: str) -> errors.XshmError:
    return errors.Refused(
        f"region {options.id} has {rest_bytes} bytes from {options.offset} on; {what}",
        hint="cut the input, or make a larger region",
    )


def _file_bytes(descriptor: int) -> int | None:
    """Return how much there is to read of a plain file; None of anything else."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return None
    return max(0, status.st_size - os.lseek(descriptor, 0, os.SEEK_CUR))


class Progress:
    """Says on a terminal how far something long has come.

    Args:
        total_bytes: How much there is to do.
    """

    def __init__(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._said_at = time.monotonic()
        self._shown = False

    def reached(self, done_bytes: int) -> None:
        """Note that so much is done."""
        now = time.monotonic()
        if now - self._said_at < _PROGRESS_S or not sys.stderr.isatty():
            return
        self._said_at, self._shown = now, True
        share = 100 * done_bytes // self._total
        print(f"\rxshmctl: {share:3} % of {human_size(self._total)}", end="", file=sys.stderr)
        sys.stderr.flush()

    def end(self) -> None:
        """Take the remark away."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
