# SPDX-License-Identifier: LGPL-2.1-or-later
"""From the bytes of a device tree, source or blob, to its nodes: dtc and libfdt do the reading.

Whatever the bytes are, the outcome is nodes or an error, in bounded time and memory: libfdt checks
a blob whole before any of it is used, and dtc works under limits of its own.
"""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any, Final

from xshmd.config.xlcfg import shown
from xshmd.errors import ConfigUnreadable
from xshmd.model import Place

MAX_BYTES: Final = 2 << 20
"""The largest tree that Xen boots with: MAX_FDT_SIZE in xen/arch/arm/include/asm/setup.h."""
ADDRESS_CELLS: Final = 2
SIZE_CELLS: Final = 1
"""What counts where no ancestor says it: DT_ROOT_NODE_{ADDR,SIZE}_CELLS_DEFAULT in Xen."""

SHARED_MEMORY: Final = "xen,domain-shared-memory-v1"
EVENT_CHANNEL: Final = "xen,evtchn-v1"
DOMAIN: Final = "xen,domain"

_MAGIC: Final = b"\xd0\x0d\xfe\xed"
_DTC: Final = ("dtc", "-q", "-I", "dts", "-O", "dtb", "-")
_DTC_SECONDS: Final = 10
_DTC_MEMORY_BYTES: Final = 512 << 20
_DTC_OUTPUT_BYTES: Final = 8 << 20
_DTC_SAYS: Final = re.compile(r"<stdin>:(\d+)[-.:\d]*\s*(.*)")
_HOW_IT_STARTS: Final = "a blob starts with the bytes d0 0d fe ed, a source with /dts-v1/;"
_OTHER_FILES: Final = re.compile(rb"/include/|/incbin/|^\s*#\s*include\b", re.MULTILINE)

_DEEPEST: Final = 3
"""/chosen/DOMAIN/NODE: of nodes below that only the kind is of interest."""
_PROPERTIES: Final = (
    "compatible",
    "#address-cells",
    "#size-cells",
    "memory",
    "direct-map",
    "xen,shm-id",
    "xen,shared-mem",
    "role",
    "xen,evtchn",
    "phandle",
    "linux,phandle",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Node:
    """One node of a tree."""

    name: str
    """As the tree has it, with the unit address; anything at all in a hostile tree."""
    depth: int
    """0 for the root."""
    parent: Node | None
    properties: Mapping[str, bytes]
    """Those that matter to shared memory, for nodes that may matter to it."""

    @property
    def path(self) -> str:
        """The path for messages: printable, and short however deep the node is."""
        names: list[str] = []
        node = self
        while node.parent is not None and len(names) <= _DEEPEST:
            names.append(shown(node.name))
            node = node.parent
        start = "/" if node.parent is None else "/.../"
        return start + "/".join(reversed(names))

    def is_compatible(self, kind: str) -> bool:
        return kind.encode() in self.properties.get("compatible", b"").split(b"\0")

    def cells(self, key: str) -> tuple[int, ...] | None:
        """Return the property as 32-bit numbers, or None if it is not there or no such thing."""
        value = self.properties.get(key)
        if value is None or len(value) % 4:
            return None
        return tuple(int.from_bytes(value[at : at + 4]) for at in range(0, len(value), 4))


def nodes(data: bytes, file: str) -> Iterator[Node]:
    """Yield every node of a tree, parents first.

    Args:
        data: The tree, as the source dtc compiles or as a flattened blob.
        file: What messages call it.

    Raises:
        ConfigUnreadable: it is no device tree, or what reads one is not installed.
    """
    if len(data) > MAX_BYTES:
        raise _unreadable(
            Place(file=file),
            f"it has {len(data)} bytes, more than the {MAX_BYTES} of the largest device tree",
            "Xen itself takes no larger one",
        )
    blob = bytearray(data if data.startswith(_MAGIC) else _compiled(data, file))
    yield from _walk(blob, file)


def _walk(blob: bytearray, file: str) -> Iterator[Node]:
    try:
        import libfdt  # optional: most configurations are no device trees
    except ImportError as error:
        raise _unreadable(
            Place(file=file), "no device tree can be read here", "install python3-libfdt"
        ) from error
    try:
        # Without this check libfdt promises nothing about a blob that is wrong inside.
        libfdt.check_err(libfdt.fdt_check_full(blob, len(blob)))
        yield from _nodes_of(libfdt.FdtRo(blob), absent=(libfdt.NOTFOUND,))
    except libfdt.FdtException as error:
        raise _unreadable(
            Place(file=file),
            f"it is a damaged device tree blob: libfdt says {libfdt.strerror(error.err)}",
            "compile it anew with dtc",
        ) from error


def _nodes_of(tree: Any, *, absent: tuple[int, ...]) -> Iterator[Node]:
    above: list[Node] = []
    offset, depth = 0, 0
    while offset >= 0 and depth >= 0:
        properties = {}
        for key in _PROPERTIES if depth <= _DEEPEST else _PROPERTIES[:1]:
            value = tree.getprop(offset, key, quiet=absent)
            if not isinstance(value, int):
                properties[key] = bytes(value)
        del above[depth:]
        node = Node(
            name=tree.get_name(offset),
            depth=depth,
            parent=above[-1] if above else None,
            properties=properties,
        )
        above.append(node)
        yield node
        offset, depth = tree.next_node(offset, depth, quiet=absent)


def _compiled(source: bytes, file: str) -> bytes:
    nul = source.find(b"\0")
    if nul >= 0:
        # dtc would take it for the end.
        raise _unreadable(
            Place(file=file, line=source.count(b"\n", 0, nul) + 1),
            "it is no device tree blob, and a source has no NUL byte",
            _HOW_IT_STARTS,
        )
    other = _OTHER_FILES.search(source)
    if other:
        raise _unreadable(
            Place(file=file, line=source.count(b"\n", 0, other.end()) + 1),
            f"{other[0].decode().strip()}: other files are not read from a device tree source",
            "compile it yourself with cpp and dtc, and give the .dtb",
        )
    with os.fdopen(os.memfd_create("dtb"), "w+b") as out, \
            os.fdopen(os.memfd_create("errors"), "w+b") as said:  # fmt: skip
        status = _run_dtc(source, out.fileno(), said.fileno(), file)
        said.seek(0)
        out.seek(0)
        blob = out.read()
        if status == 0 and blob:
            return blob
        raise _dtc_error(said.read(4096).decode(errors="replace"), status, file)


def _run_dtc(source: bytes, out: int, said: int, file: str) -> int:
    try:
        process = subprocess.Popen(_DTC, stdin=subprocess.PIPE, stdout=out, stderr=said)
    except OSError as error:
        raise _unreadable(
            Place(file=file),
            f"it is no device tree blob, and dtc to compile it cannot be run: {error.strerror}",
            "install device-tree-compiler, or give a .dtb",
        ) from error
    with process:
        # dtc waits for its input, so nothing of the source is read before the limits hold.
        for limit, value in (
            (resource.RLIMIT_AS, _DTC_MEMORY_BYTES),
            (resource.RLIMIT_FSIZE, _DTC_OUTPUT_BYTES),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.prlimit(process.pid, limit, (value, value))
        try:
            process.communicate(source, timeout=_DTC_SECONDS)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise _unreadable(
                Place(file=file), f"dtc did not compile it in {_DTC_SECONDS} s", "make it smaller"
            ) from error
    return process.returncode


def _dtc_error(said: str, status: int, file: str) -> ConfigUnreadable:
    lines = [line for line in said.splitlines() if line.strip()]
    found = next((match for line in lines if (match := _DTC_SAYS.search(line))), None)
    if found:
        line, what = int(found[1][:9]), found[2]
    else:
        line, what = 0, lines[0] if lines else f"it ended with status {status}"
    what = what[:200] if what[:200].isprintable() else ascii(what[:200])[1:-1]
    return _unreadable(
        Place(file=file, line=line),
        f"it is neither a device tree blob nor a source that dtc compiles: {what}",
        _HOW_IT_STARTS,
    )


def _unreadable(place: Place, what: str, hint: str) -> ConfigUnreadable:
    return ConfigUnreadable(f"{place}: {what}", hint=hint, file=place.file, line=place.line)
