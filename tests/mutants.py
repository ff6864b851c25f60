# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make mutants``: breaks the model of Xen in small ways, and asks whether the contract notices.

What real Xen keeps too is the contract alone (:mod:`contract.cases`, :mod:`contract.traces`), so a
broken model that passes it is one the unit tests could rest on wrongly.  Run in ``tests``:
``python3 -m mutants [--seconds N] [--sample N] [--seed N]``.
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import inspect
import random
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, Final

from contract import traces
from contract.cases import CASES
from contract.host import ContractHost
from fakes import hypervisor

from xshmd.machine import Arch

MUTANT_LIMIT_S: Final = 60.0
"""Of processor time: one that goes on for ever is caught, a busy machine catches nothing."""
TRACES: Final = range(6)
NOT_OF_XEN: Final = frozenset(
    {
        # instruments of the tests, and the model's checks of itself
        "_call", "_inject", "fail", "check", "_check_conservation", "close_maps", "guest_read",
        "entry_register",  # None for a vCPU that is down, and none is ever up in the contract
        "guest_write", "foreign_frames", "_guest_pages", "__init__", "_crash", "_short",
        # what only guests can show, in integration/scenarios/test_guest_to_guest.py
        "silo", "guest_map_grants", "_release_mappings",
    }
)  # fmt: skip
NO_CLAIMS: Final = (
    "self._check_conservation(", "self.open_maps.", "self.on_", "self.unwiped_frees",
    "self.leaked_references", "raise ModelViolation", "assert ", "domain.cpu_time_ns",
    "domain.creation_finished",
)  # fmt: skip
"""Statements of the model that are such instruments too, or checks of who uses it."""
NOT_AT_HAND: Final = ("self.version", ".altp2m", "domain.hvm", "domain.running")
"""Conditions that a run on the Xen at hand cannot show: other versions, what its guests are not
(altp2m, PV), and vCPUs, none of which is ever let run."""
_COMPARISONS: Final[dict[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip

Edit = Callable[[ast.AST], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Method:
    """A method of the model, and the module whose names it uses."""

    module: types.ModuleType
    tree: ast.FunctionDef

    def __str__(self) -> str:
        return f"{self.module.__name__.rpartition('.')[2]}.{self.tree.name}"


class Mutant:
    """One small change to one method: what it is, and how it is made in a fresh tree."""

    def __init__(self, what: str, method: Method, node: int, edit: Edit) -> None:
        self.what, self.method, self.node, self.edit = what, method, node, edit


class _TookTooLong(BaseException):
    pass


class ImpatientHost(ContractHost):
    """A contract host that knows that the model never needs time."""

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        if not condition():
            raise AssertionError(what)


def mutants() -> list[Mutant]:
    """Return every change to what the model says of Xen."""
    found = []
    for method in methods(hypervisor.SimulatedXen):
        for number, node in _claims(method.tree):
            for what, edit in _edits(node):
                text = ast.unparse(node).splitlines()[0][:70]
                line = getattr(node, "lineno", 0)
                found.append(Mutant(f"{method}:{line}: {what}: {text}", method, number, edit))
    return found


def methods(model: type) -> Iterator[Method]:
    """Return what makes claims about Xen, in whichever of the fakes' modules it is written."""
    for cls in model.__mro__:
        module = sys.modules[cls.__module__]
        if module.__name__.partition(".")[0] != "fakes":
            continue
        tree = ast.parse(inspect.getsource(module))
        (body,) = (
            node.body
            for node in tree.body
            if isinstance(node, ast.ClassDef) and node.name == cls.__name__
        )
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name not in NOT_OF_XEN:
                yield Method(module, node)


def _claims(method: ast.FunctionDef) -> Iterator[tuple[int, ast.AST]]:
    """Return the nodes of a method that say something of Xen, each with its number."""
    silent: set[ast.AST] = set()
    for number, node in enumerate(ast.walk(method)):
        if isinstance(node, (ast.JoinedStr, ast.stmt)) and _is_silent(node):
            silent.update(ast.walk(node))
        elif isinstance(node, ast.If) and any(word in _text(node.test) for word in NOT_AT_HAND):
            silent.update([node, *ast.walk(node.test)])
            silent.update(inner for statement in node.body for inner in ast.walk(statement))
        if node not in silent:
            yield number, node


def _is_silent(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return all(_is_silent(statement) for statement in node.body) and not node.orelse
    return isinstance(node, ast.JoinedStr) or _text(node).startswith(NO_CLAIMS)


def _text(node: ast.AST) -> str:
    return ast.unparse(node)


def _edits(node: ast.AST) -> Iterator[tuple[str, Edit]]:
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in _COMPARISONS:
            yield "comparison", _set("ops", [_COMPARISONS[type(operator)]()])
        case ast.BoolOp(op=ast.And()):
            yield "or", _set("op", ast.Or())
        case ast.BoolOp(op=ast.Or()):
            yield "and", _set("op", ast.And())
        case ast.BinOp(op=ast.Add()) if not isinstance(node.left, ast.JoinedStr):
            yield "minus", _set("op", ast.Sub())
        case ast.BinOp(op=ast.Sub()):
            yield "plus", _set("op", ast.Add())
        case ast.AugAssign(op=ast.Add()):
            yield "minus", _set("op", ast.Sub())
        case ast.AugAssign(op=ast.Sub()):
            yield "plus", _set("op", ast.Add())
        case ast.If():
            yield "always", _set("test", ast.Constant(True))
            yield "never", _set("test", ast.Constant(False))
        case ast.Attribute(value=ast.Name(id="errno"), attr=name):
            yield "errno", _set("attr", "EBUSY" if name != "EBUSY" else "EIO")
    if isinstance(node, (ast.FunctionDef, ast.If, ast.For, ast.With)):
        for place, statement in enumerate(node.body):
            if _is_silent(statement):
                continue
            if isinstance(statement, (ast.AugAssign, ast.Assign)) or (
                isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            ):
                yield f"without `{ast.unparse(statement)[:50]}`", _without(place)


def _set(field: str, value: object) -> Edit:
    def edit(node: ast.AST) -> None:
        setattr(node, field, copy.deepcopy(value))

    return edit


def _without(place: int) -> Edit:
    def edit(node: ast.AST) -> None:
        body: list[ast.stmt] = node.body  # type: ignore[attr-defined]
        body[place] = ast.copy_location(ast.Pass(), body[place])

    return edit


def _broken_model(mutant: Mutant) -> type[hypervisor.SimulatedXen]:
    method = copy.deepcopy(mutant.method.tree)
    mutant.edit(list(ast.walk(method))[mutant.node])
    tree = ast.fix_missing_locations(ast.Module([method], type_ignores=[]))
    flags = annotations.compiler_flag
    made: dict[str, Any] = {}
    exec(
        compile(tree, "broken", "exec", flags, dont_inherit=True), vars(mutant.method.module), made
    )
    return type("Broken", (hypervisor.SimulatedXen,), made)


class Contract:
    """The contract as a list of checks, those that caught most first."""

    def __init__(self) -> None:
        self._answers = {
            (arch, seed): traces.played(
                _model(hypervisor.SimulatedXen, arch), seed, host=ImpatientHost
            )
            for arch in Arch
            for seed in TRACES
        }
        checks = [self._case(case, arch) for _, case in CASES for arch in Arch]
        checks += [self._trace(arch, seed) for arch in Arch for seed in TRACES]
        self._checks = [(check, _methods_used(check)) for check in checks]

    def _case(self, case: Any, arch: Arch) -> Callable[[Any], None]:
        def check(model: Any) -> None:
            xen = _model(model, arch)
            free = xen.free_pages
            with ImpatientHost(xen) as make:
                case(xen, make)
            if xen.free_pages != free or len(xen.domains()) != 1:
                raise AssertionError("something is left")

        return check

    def _trace(self, arch: Arch, seed: int) -> Callable[[Any], None]:
        def check(model: Any) -> None:
            answers = traces.played(_model(model, arch), seed, host=ImpatientHost)
            if answers != self._answers[arch, seed]:
                raise AssertionError("another answer")

        return check

    def catches(self, mutant: Mutant) -> bool:
        """Return whether any check fails that comes to the broken method."""
        model = _broken_model(mutant)
        for place, (check, used) in enumerate(self._checks):
            if mutant.method.tree.name not in used:
                continue
            try:
                check(model)
            except (Exception, _TookTooLong):
                self._checks.insert(0, self._checks.pop(place))
                return True
        return False


def _methods_used(check: Callable[[Any], None]) -> set[str]:
    """Return the names of the fakes' functions that a check comes to; it must not fail."""
    used: set[str] = set()

    def see(frame: types.FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_globals.get("__name__", "").startswith("fakes."):
            used.add(frame.f_code.co_name)

    sys.setprofile(see)
    try:
        check(hypervisor.SimulatedXen)
    finally:
        sys.setprofile(None)
    return used


def _model(model: Any, arch: Arch) -> hypervisor.SimulatedXen:
    made: hypervisor.SimulatedXen = model(arch, total_pages=1 << 17, dom0_pages=1 << 14)
    return made


def _too_long(*_: object) -> None:
    raise _TookTooLong


def main() -> int:
    """Try the mutants; return 1 if fewer than 95 % are caught."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--sample", type=int, default=0, help="how many; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    everything = mutants()
    random.Random(options.seed).shuffle(everything)
    chosen = everything[: options.sample or None]
    contract = Contract()
    signal.signal(signal.SIGPROF, _too_long)
    survivors, tried, began = [], 0, time.monotonic()
    for mutant in chosen:
        if time.monotonic() - began > options.seconds:
            break
        tried += 1
        signal.setitimer(signal.ITIMER_PROF, MUTANT_LIMIT_S)
        try:
            caught = contract.catches(mutant)
        except _TookTooLong:
            caught = True
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if not caught:
            survivors.append(mutant.what)
            print(f"survived: {mutant.what}", flush=True)
    share = 100 * (tried - len(survivors)) / max(tried, 1)
    print(
        f"{len(everything)} mutants, {tried} tried, {len(survivors)} survived: {share:.1f} % caught"
    )
    return 0 if share >= 95 else 1


if __name__ == "__main__":
    sys.exit(main())
