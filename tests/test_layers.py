# SPDX-License-Identifier: LGPL-2.1-or-later
"""Dependencies point downwards only (DESIGN section 4), and ctl stays light."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "xshmd"
COMPILED = {"xshmd.xen._stable", "xshmd.xen._xenctrl", "xshmd.xen._evtchn"}
HEAVY = {"trio", "structlog", "cffi", "pyxs"}

WORDS = {
    "errors", "units", "ranges", "model", "machine", "host_policy", "declarations", "events",
    "changes",
}  # fmt: skip
ALLOWED: dict[str, set[str]] = {
    # the layer: what of xshmd it may import besides itself
    "": set(),
    "units": set(),
    "errors": set(),
    "ranges": {"errors", "units"},
    "machine": {"units"},
    "model": {"units"},
    "host_policy": {"model"},
    "declarations": {"model", "host_policy"},
    "events": {"units", "model"},
    "changes": {"units", "model"},
    "ports": WORDS,
    "dom0_ports": WORDS,
    "api": WORDS,
    "policy": WORDS,
    "config": WORDS | {"policy"},
    "engine": WORDS | {"ports", "dom0_ports", "api", "policy", "share"},
    "xen": WORDS | {"ports"},
    "share": WORDS | {"api"},
    "varlink": WORDS,
    "vhost_user": WORDS | {"xen"},
    "ctl": WORDS | {"", "config", "policy", "varlink", "vhost_user", "client", "xen"},
    "client": WORDS | {"varlink", "xen"},
    "keeper": WORDS | {"", "ports", "xen"},
    "daemon": WORDS
    | {"", "api", "policy", "config", "engine", "xen", "share", "keeper", "varlink"},
}
"""``""`` is ``xshmd/__init__.py``.  What is in neither column does not belong in the package."""
ONLY: dict[tuple[str, str], set[str]] = {
    # a layer that may see but some modules of another: of Varlink no server and no dispatcher, of
    # Xen what needs nothing compiled
    ("ctl", "varlink"): {
        f"xshmd.varlink{module}" for module in ("", ".client", ".idl", ".records", ".wire")
    },
    ("ctl", "client"): {"xshmd.client"},
    ("ctl", "xen"): {"xshmd.xen", "xshmd.xen.device_maps", "xshmd.xen.windows"},
    ("vhost_user", "xen"): {"xshmd.xen", "xshmd.xen.device_maps", "xshmd.xen.windows"},
    ("client", "varlink"): {"xshmd.varlink.client"},
}
OUTSIDE: dict[str, set[str]] = {
    # which layers may import which of the outside; all others have the standard library only
    "ports": {"trio"},
    "api": {"trio"},
    "config": {"libfdt"},
    "engine": {"trio", "structlog"},
    "xen": {"trio", "structlog", "pyxs"},
    "share": {"trio", "structlog"},
    "varlink": {"trio", "structlog"},
    "daemon": {"trio", "structlog"},
    "client": {"trio"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports_of(module: str, tree: ast.AST | None = None) -> Iterator[tuple[str, int]]:
    """Yield every module that this one names in an import, wherever in it, with the line."""
    path = MODULES[module]
    for node in ast.walk(tree or ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")
                if path.name != "__init__.py":
                    package = package[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in MODULES else base), node.lineno


def wrong_imports(module: str, imports: Iterator[tuple[str, int]]) -> list[str]:
    layer = layer_of(module)
    wrong = []
    for name, line in imports:
        top = name.split(".")[0]
        if top == "xshmd":
            other = layer_of(name)
            allowed = other == layer or other in ALLOWED[layer]
            if (layer, other) in ONLY and name not in ONLY[layer, other]:
                allowed = False
        else:
            allowed = top in sys.stdlib_module_names or top in OUTSIDE.get(layer, set())
        if not allowed:
            wrong.append(f"{module}:{line} imports {name}")
    return wrong


@pytest.mark.parametrize("module", MODULES)
def test_dependencies_point_downwards(module: str) -> None:
    assert layer_of(module) in ALLOWED, f"{module} is in no layer"
    assert wrong_imports(module, imports_of(module)) == []


def test_the_table_has_no_cycle() -> None:
    seen: list[str] = []
    left = dict(ALLOWED)
    while left:
        free = sorted(layer for layer, below in left.items() if below <= {*seen, layer})
        assert free, f"a cycle among {sorted(left)}"
        seen += free
        for layer in free:
            del left[layer]


def test_only_ffi_loads_the_compiled_modules() -> None:
    importers = []
    for module, path in MODULES.items():
        text = path.read_text()
        names = {name for name, _ in imports_of(module)}
        dynamic = "import_module" in text or "__import__" in text
        if names & COMPILED or dynamic:
            importers.append(module)
    assert importers == ["xshmd.xen._ffi"]
    assert {
        layer_of(m) for m in MODULES if any(n == "xshmd.xen._ffi" for n, _ in imports_of(m))
    } <= {"xen"}


def reached_from(start: str) -> dict[str, str]:
    """Return every module imported from ``start``, however far, and by which."""
    found = {start: ""}
    waiting = [start]
    while waiting:
        module = waiting.pop()
        parents = {module.rpartition(".")[0]} - {""}
        names = {name for name, _ in imports_of(module)} | parents
        for name in names:
            if name not in found:
                found[name] = module
                if name in MODULES:
                    waiting.append(name)
    return found


@pytest.mark.parametrize(
    "module",
    [
        module
        for module in MODULES
        if layer_of(module) == "ctl" or module in ("xshmd.varlink.client", "xshmd.client")
    ],
)
def test_ctl_needs_nothing_but_the_standard_library(module: str) -> None:
    found = reached_from(module)
    heavy = {name: by for name, by in found.items() if name.split(".")[0] in HEAVY}
    assert heavy == {}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("xshmd.policy.plan", "import trio"),
        ("xshmd.policy.plan", "from xshmd.ports import Store"),
        ("xshmd.model", "from xshmd.policy import rules"),
        ("xshmd.model", "from xshmd.events import Event"),
        ("xshmd.machine", "from xshmd.model import Guest"),
        ("xshmd.api", "from xshmd.ports import Store"),
        ("xshmd.share.mediator", "from xshmd.ports import Hypervisor"),
        ("xshmd.dom0_ports", "import trio"),
        ("xshmd.engine.gate", "from xshmd.xen.hypervisor import XenHypervisor"),
        ("xshmd.xen.store", "from ..engine import gate"),
        ("xshmd.xen.store", "import pyxs, requests"),
        ("xshmd.ctl.lending", "from xshmd.xen.hypervisor import XenHypervisor"),
        ("xshmd.ctl.xl", "def f():\n    from xshmd.varlink.server import serve"),
        ("xshmd.config.guest", "from xshmd import engine"),
    ],
)
def test_the_rule_would_notice(module: str, line: str) -> None:
    assert wrong_imports(module, imports_of(module, ast.parse(line)))
