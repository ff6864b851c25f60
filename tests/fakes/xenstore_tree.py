# SPDX-License-Identifier: LGPL-2.1-or-later
"""What xenstored keeps: nodes, who may read and write them, and transactions that may conflict.

It follows C xenstored (tools/xenstored) from Xen 4.17 to 4.21.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Callable
from typing import Final

ABS_PATH_MAX: Final = 3072
REL_PATH_MAX: Final = 2048
DOM0: Final = 0
_NO_GENERATION: Final = -1
_CHARS = re.compile(r"[A-Za-z0-9/_@-]*", re.ASCII)
_DOMAIN_PREFIX = re.compile(r"/local/domain/[0-9]{1,5}/", re.ASCII)
_PERMISSION = re.compile(r"([nrwb])([0-9]+)", re.ASCII)
_CAN_READ: Final = "rb"
_CAN_WRITE: Final = "wb"


class XsError(Exception):
    """A request fails with this error name."""


@dataclasses.dataclass(frozen=True, slots=True)
class Permission:
    letter: str
    domid: int
    ignored: bool = False
    """XS_PERM_IGNORE: the domain did not exist when this was set (domain_alloc_permrefs)."""

    def __str__(self) -> str:
        return f"{self.letter}{self.domid}"


@dataclasses.dataclass(slots=True)
class Node:
    value: bytes = b""
    permissions: tuple[Permission, ...] = (Permission("n", DOM0),)
    children: tuple[str, ...] = ()
    """Leaf names in the order they were made (core.c add_child)."""
    generation: int = 0

    @property
    def owner(self) -> int:
        return self.permissions[0].domid

    @property
    def text(self) -> str:
        return self.value.decode()


class Match(enum.Enum):
    EXACT = enum.auto()
    SUBTREE = enum.auto()


@dataclasses.dataclass(slots=True)
class _Accessed:
    """transaction.c struct accessed_node."""

    node: Node | None
    generation: int
    permissions: tuple[Permission, ...] | None
    check_generation: bool = False
    modified: bool = False
    match: Match | None = None


class Transaction:
    """transaction.c struct transaction: a copy of just what was accessed."""

    def __init__(self) -> None:
        self.accessed: dict[str, _Accessed] = {}


Fire = Callable[[str, Match, "Node | None"], None]


def parent_of(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def is_child(path: str, parent: str) -> bool:
    """watch.c is_child: the same, or below."""
    return path == parent or parent == "/" or path.startswith(parent + "/")


class Tree:
    """The data base: nodes, permissions and transactions, without connections."""

    def __init__(self, fire: Fire) -> None:
        self.nodes: dict[str, Node] = {}
        self.generation = 0
        self.domains: set[int] = {DOM0}
        """Domains that exist in Xen, introduced or not."""
        self._fire = fire
        # core.c setup_structure
        for path, children in (
            ("/", ("tool",)),
            ("/tool", ("xenstored",)),
            ("/tool/xenstored", ()),
            ("@introduceDomain", ()),
            ("@releaseDomain", ()),
        ):
            self.nodes[path] = Node(children=children)

    # Access, in a transaction or not: transaction.c access_node, core.c read_node, write_node.

    def _load(self, path: str, tx: Transaction | None) -> Node | None:
        node = self.nodes.get(path)
        if tx is None:
            return node
        if path not in tx.accessed:
            tx.accessed[path] = _Accessed(
                node=dataclasses.replace(node) if node else None,
                generation=node.generation if node else _NO_GENERATION,
                permissions=node.permissions if node else None,
                check_generation=True,
            )
        return tx.accessed[path].node

    def _save(self, path: str, node: Node | None, tx: Transaction | None) -> None:
        self.generation += 1
        if node is not None:
            node.generation = self.generation
        if tx is not None:
            tx.accessed[path].node = node
            tx.accessed[path].modified = True
        elif node is None:
            del self.nodes[path]
        else:
            self.nodes[path] = node

    def _changed(self, path: str, match: Match, node: Node | None, tx: Transaction | None) -> None:
        if tx is None:
            self._fire(path, match, node)
        elif tx.accessed[path].match is not Match.SUBTREE:  # transaction.c queue_watches
            tx.accessed[path].match = match

    def canonical(self, path: str, *, special: bool = False) -> str:
        """core.c canonicalize, for a socket: a relative path is one of the root."""
        if not _CHARS.fullmatch(path) or (path.startswith("@") and not special):
            raise XsError("EINVAL")
        if not path.startswith(("/", "@")):
            path = f"/{path}"
        if (path.endswith("/") and path != "/") or "//" in path:
            raise XsError("EINVAL")
        prefix = _DOMAIN_PREFIX.match(path)
        below = len(path) - (prefix.end() if prefix else len(path))
        if len(path) > ABS_PATH_MAX or below > REL_PATH_MAX:  # docs/misc/xenstore.txt
            raise XsError("EINVAL")
        return path

    def _permitted(self, node: Node, domid: int) -> str:
        """core.c perm_for_conn: the letter that holds for the domain."""
        if domid in (DOM0, node.owner):
            return "b"
        for permission in node.permissions[1:]:
            if permission.domid == domid and not permission.ignored:
                return permission.letter
        return node.permissions[0].letter

    def _get(self, path: str, letters: str, domid: int, tx: Transaction | None) -> Node:
        """core.c get_node: ENOENT only to those who may know (errno_from_parents)."""
        node = self._load(path, tx)
        if node is not None and self._permitted(node, domid) in letters:
            return node
        parent = path
        while parent != "/":
            parent = parent_of(parent)
            if (above := self._load(parent, tx)) is not None:
                break
        else:
            above = node
        visible = above is not None and self._permitted(above, domid) in letters
        raise XsError("ENOENT" if node is None and visible else "EACCES")

    # Requests.

    def read(self, path: str, *, domid: int = DOM0, tx: Transaction | None = None) -> bytes:
        return self._get(self.canonical(path), _CAN_READ, domid, tx).value

    def directory(
        self, path: str, *, domid: int = DOM0, tx: Transaction | None = None
    ) -> tuple[int, tuple[str, ...]]:
        node = self._get(self.canonical(path), _CAN_READ, domid, tx)
        return node.generation, node.children

    def permissions(
        self, path: str, *, domid: int = DOM0, tx: Transaction | None = None
    ) -> tuple[str, ...]:
        node = self._get(self.canonical(path, special=True), _CAN_READ, domid, tx)
        return tuple(str(permission) for permission in node.permissions)

    def write(
        self, path: str, value: bytes, *, domid: int = DOM0, tx: Transaction | None = None
    ) -> None:
        path = self.canonical(path)
        try:
            node = self._get(path, _CAN_WRITE, domid, tx)
        except XsError as exc:
            if str(exc) != "ENOENT":
                raise
            node = self._create(path, value, domid, tx)
        else:
            node = dataclasses.replace(node, value=value)
            self._save(path, node, tx)
        self._changed(path, Match.SUBTREE, node, tx)

    def mkdir(self, path: str, *, domid: int = DOM0, tx: Transaction | None = None) -> None:
        path = self.canonical(path)
        try:
            self._get(path, _CAN_WRITE, domid, tx)
        except XsError as exc:
            if str(exc) != "ENOENT":
                raise
            node = self._create(path, b"", domid, tx)
            self._changed(path, Match.SUBTREE, node, tx)

    def _create(self, path: str, value: bytes, domid: int, tx: Transaction | None) -> Node:
        """core.c construct_node, create_node: permissions come from the nearest parent."""
        missing = [path]
        while (parent := self._load(parent_of(missing[-1]), tx)) is None:
            missing.append(parent_of(missing[-1]))
        above, above_path = dataclasses.replace(parent), parent_of(missing[-1])
        made = []
        for name in reversed(missing):
            above.children = (*above.children, name.rpartition("/")[2])
            made.append((above_path, above))
            permissions = above.permissions
            if domid != DOM0:
                permissions = (Permission(permissions[0].letter, domid), *permissions[1:])
            above, above_path = Node(permissions=permissions), name
        above.value = value
        for name, node in [(path, above), *reversed(made)]:
            self._save(name, node, tx)
        return above

    def remove(self, path: str, *, domid: int = DOM0, tx: Transaction | None = None) -> None:
        path = self.canonical(path)
        try:
            self._get(path, _CAN_WRITE, domid, tx)
        except XsError as exc:
            if str(exc) == "ENOENT" and self._load(parent_of(path), tx) is not None:
                return  # core.c do_rm: fine, if the parent exists
            raise
        if path == "/":
            raise XsError("EINVAL")
        self._remove_tree(path, tx)

    def _remove_tree(self, path: str, tx: Transaction | None) -> None:
        """core.c rm_node, delnode_sub: children first, exact events for them."""
        self._load(parent_of(path), tx)

        def walk(at: str) -> None:
            node = self._load(at, tx)
            assert node is not None
            for name in node.children:
                walk(f"{at}/{name}")
            self._save(at, None, tx)
            self._changed(at, Match.SUBTREE if at == path else Match.EXACT, node, tx)

        walk(path)
        parent = self._load(parent_of(path), tx)
        assert parent is not None
        leaf = path.rpartition("/")[2]
        rest = tuple(name for name in parent.children if name != leaf)
        self._save(parent_of(path), dataclasses.replace(parent, children=rest), tx)

    def set_permissions(
        self,
        path: str,
        permissions: tuple[str, ...],
        *,
        domid: int = DOM0,
        tx: Transaction | None = None,
    ) -> None:
        if not permissions:
            raise XsError("EINVAL")
        parsed = []
        for text in permissions:
            if not (match := _PERMISSION.fullmatch(text)):
                raise XsError("EINVAL")
            who = int(match[2])
            parsed.append(Permission(match[1], who, ignored=who not in self.domains))
        if parsed[0].ignored:
            raise XsError("ENOENT")  # core.c do_set_perms: no node of a domain that is not
        path = self.canonical(path, special=True)
        node = self._get(path, _CAN_WRITE, domid, tx)
        if domid not in (DOM0, node.owner):
            raise XsError("EACCES")
        if domid != DOM0 and parsed[0].domid != node.owner:
            raise XsError("EPERM")
        node = dataclasses.replace(node, permissions=tuple(parsed))
        self._save(path, node, tx)
        self._changed(path, Match.SUBTREE, node, tx)

    def commit(self, tx: Transaction) -> None:
        """transaction.c finalize_transaction."""
        for path, seen in tx.accessed.items():
            node = self.nodes.get(path)
            if seen.check_generation and seen.generation != (
                node.generation if node else _NO_GENERATION
            ):
                raise XsError("EAGAIN")
        for path, seen in tx.accessed.items():
            if not seen.modified:
                continue
            if seen.node is not None:
                self.generation += 1
                seen.node.generation = self.generation
                self.nodes[path] = seen.node
            else:
                self.nodes.pop(path, None)
            if seen.match is not None:
                self._fire(path, seen.match, seen.node or Node(permissions=seen.permissions or ()))

    def forget_domain(self, domid: int) -> None:
        """domain.c domain_tree_remove: its nodes go, with all below; others forget it."""
        self.domains.discard(domid)

        def walk(path: str) -> None:
            node = self.nodes[path]
            if node.owner == domid:
                self._remove_tree(path, None)
                return
            node.permissions = tuple(p for p in node.permissions if p.domid != domid)
            for name in node.children:
                walk(f"{path.rstrip('/')}/{name}")

        walk("/")
