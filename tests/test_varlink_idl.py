# SPDX-License-Identifier: LGPL-2.1-or-later
"""The contract is readable by everybody who must read it, and says what the code does."""

from __future__ import annotations

import enum
import re
import typing
from typing import Any

import pytest
import varlink

from xshmd import changes, events, model
from xshmd.policy.host import Verdict
from xshmd.varlink import idl
from xshmd.varlink.client import INTERFACE
from xshmd.varlink.dispatch import SERVICE

CONTRACT = idl.load(INTERFACE)


@pytest.mark.parametrize("name", [INTERFACE, SERVICE])
def test_python3_varlink_reads_the_same_members(name: str) -> None:
    ours = idl.load(name)
    theirs = varlink.Interface(ours.text)
    assert ours.name == theirs.name == name
    assert set(theirs.members) == {*ours.types, *ours.methods, *ours.errors}


def structs(kind: idl.Type) -> list[idl.Struct | idl.Enumeration]:
    match kind:
        case idl.Struct(fields):
            return [kind, *(found for inner in fields.values() for found in structs(inner))]
        case idl.Enumeration():
            return [kind]
        case idl.Maybe(inner) | idl.Array(inner) | idl.Dictionary(inner):
            return structs(inner)
        case _:
            return []


def test_it_keeps_to_what_systemd_257_can_read() -> None:
    code = re.sub(r"#.*", "", CONTRACT.text)
    assert not re.search(r"\bany\b", code)
    assert not re.search(r",\s*\)", code)
    assert "-" not in code.replace("->", "")


def test_field_names_are_camel_case() -> None:
    declared = [
        *CONTRACT.types.values(),
        *CONTRACT.errors.values(),
        *(each for method in CONTRACT.methods.values() for each in (method.takes, method.gives)),
    ]
    names = {
        name
        for top in declared
        for found in structs(top)
        if isinstance(found, idl.Struct)
        for name in found.fields
    }
    assert len(names) > 40
    assert not [name for name in names if not re.fullmatch(r"[a-z]+([A-Z][a-z0-9]+)*", name)]


@pytest.mark.parametrize("name", [INTERFACE, SERVICE])
def test_every_member_and_every_field_has_a_comment(name: str) -> None:
    lines = idl.load(name).text.splitlines()
    declaration = re.compile(r"(interface|type|method|error) |  [a-zA-Z]")
    bare = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if declaration.match(line) and not before.lstrip().startswith("# ")
    ]
    assert bare == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Role", model.Role),
        ("Prot", model.Prot),
        ("Lifetime", model.Lifetime),
        ("CachePolicy", model.CachePolicy),
        ("Backing", model.Backing),
        ("Transport", model.Transport),
        ("Isolation", model.Isolation),
        ("ProtEnforcement", model.ProtEnforcement),
        ("GuestState", model.GuestState),
        ("DoorbellRoute", model.DoorbellRoute),
        ("PeerState", model.PeerState),
        ("Verdict", Verdict),
    ],
)
def test_its_enumerations_are_the_models(name: str, words: type[enum.StrEnum]) -> None:
    assert CONTRACT.types[name] == idl.Enumeration(tuple(word.value for word in words))


def test_it_knows_every_kind_of_event() -> None:
    kinds = tuple(kind.value.replace("-", "_") for kind in events.EventKind)
    assert CONTRACT.types["EventKind"] == idl.Enumeration(kinds)


def test_the_union_of_changes_is_the_models() -> None:
    change = CONTRACT.types["Change"]
    assert isinstance(change, idl.Struct)
    assert len(change.fields) == len(typing.get_args(changes.Change))


GRAMMAR = """
# About it.
interface org.example.a-b.c2
type E (one, two_three) # trailing remark
type S (a: ?[]E, b: [string](x: int), c: ?(p, q), d: object, e: float, f: bool)
method M(s: S) -> ()
error X ()"""


def test_the_whole_grammar() -> None:
    read = idl.parse(GRAMMAR)
    assert read.name == "org.example.a-b.c2"
    assert read.types["E"] == idl.Enumeration(("one", "two_three"))
    assert read.types["S"] == idl.Struct(
        {
            "a": idl.Maybe(idl.Array(idl.Named("E"))),
            "b": idl.Dictionary(idl.Struct({"x": idl.Scalar("int")})),
            "c": idl.Maybe(idl.Enumeration(("p", "q"))),
            "d": idl.Scalar("object"),
            "e": idl.Scalar("float"),
            "f": idl.Scalar("bool"),
        }
    )
    assert read.methods["M"] == idl.MethodType(idl.Struct({"s": idl.Named("S")}), idl.Struct({}))
    assert read.errors["X"] == idl.Struct({})


@pytest.mark.parametrize(
    "body",
    [
        "type E (one, two,)",
        "type S (a: int,)",
        "type S (a: int, b)",
        "type S (a: any)",
        "type S (a: ??int)",
        "type S (a: Missing)",
        "type S (a: int) error S ()",
        "type S (a: int, a: int)",
        "type s (a: int)",
        "type S (a_: int)",
        "type E (one-two, three)",
        "method M(a: int)",
        "method M(one, two) -> ()",
        "frobnicate M ()",
        "type S (a: int",
        "type S (a: int) %",
        "error",
    ],
)
def test_what_is_not_of_the_language_is_refused(body: str) -> None:
    with pytest.raises(idl.IdlError):
        idl.parse(f"interface org.example\n{body}")


def test_an_interface_name_has_a_dot() -> None:
    with pytest.raises(idl.IdlError):
        idl.parse("interface example\nerror X ()")


TYPED = idl.parse(
    """interface org.example
type E (one, two)
method M(i: ?int, f: ?float, s: ?string, b: ?bool, o: ?object, e: ?E, a: ?[]int,
  d: ?[string]int, n: ?(x: int)) -> ()
method Needs(s: string) -> ()"""
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("i", 1),
        ("i", idl.INT_MIN),
        ("i", idl.INT_MAX),
        ("f", 1.5),
        ("f", 1),
        ("s", ""),
        ("b", False),
        ("o", {"any": [1, None]}),
        ("e", "two"),
        ("a", []),
        ("d", {"k": 1}),
        ("n", {"x": 1}),
        ("n", None),
    ],
)
def test_values_that_fit(field: str, value: Any) -> None:
    TYPED.check(TYPED.methods["M"].takes, {field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("i", 1.0),
        ("i", True),
        ("i", "1"),
        ("i", idl.INT_MAX + 1),
        ("i", idl.INT_MIN - 1),
        ("f", True),
        ("s", 1),
        ("b", 0),
        ("o", []),
        ("e", "three"),
        ("e", ["one"]),
        ("a", [1, "x"]),
        ("a", [None]),
        ("a", {}),
        ("d", {"k": "v"}),
        ("d", []),
        ("n", {}),
        ("n", {"x": 1, "y": 2}),
        ("n", []),
        ("unknown", None),
    ],
)
def test_values_that_do_not_fit(field: str, value: Any) -> None:
    with pytest.raises(idl.Mismatch) as caught:
        TYPED.check(TYPED.methods["M"].takes, {field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("values", [{}, {"s": None}])
def test_what_is_needed_must_be_there(values: dict[str, Any]) -> None:
    with pytest.raises(idl.Mismatch):
        TYPED.check(TYPED.methods["Needs"].takes, values)
