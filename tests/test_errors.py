# SPDX-License-Identifier: LGPL-2.1-or-later
"""One class is one Varlink error is one exit status, and an error survives the wire."""

from __future__ import annotations

import pytest

from xshmd import errors
from xshmd.errors import XshmError
from xshmd.varlink import idl, wire
from xshmd.varlink.client import INTERFACE, error_of
from xshmd.varlink.dispatch import error_reply

LOCAL = {errors.DaemonUnreachable}
"""Said by a client about the daemon, so the daemon can never reply it."""
EXIT_STATUS = {
    "Failed": 1,
    "InvalidArgument": 2,
    "DaemonUnreachable": 3,
    "NoSuchRegion": 4,
    "NoSuchGuest": 4,
    "InvalidConfiguration": 5,
    "UnreadableConfiguration": 1,
    "Refused": 5,
    "Conflict": 5,
    "OutOfMemory": 5,
    "QuotaExceeded": 5,
    "OutOfRange": 2,
    "NoSuchBuffer": 4,
    "AlreadyFreed": 4,
    "ForeignBuffer": 5,
    "BufferBusy": 5,
    "NoSuchList": 4,
    "ListCancelled": 5,
    "TimedOut": 1,
    "XenUnavailable": 6,
    "HypercallFailed": 1,
    "DomainGone": 4,
    "PartialMap": 1,
    "StoreLost": 1,
    "StoreError": 1,
    "StoreTimedOut": 1,
}
CLASSES = [cls for cls in errors.all_errors() if cls.__module__ == errors.__name__]
CONTRACT = idl.load(INTERFACE)


def test_every_class_has_its_own_error_and_the_agreed_exit_status() -> None:
    assert {cls.varlink_error: cls.exit_status for cls in CLASSES} == EXIT_STATUS
    assert len(CLASSES) == len(EXIT_STATUS)


def test_the_interface_declares_exactly_the_errors_there_are() -> None:
    remote = {cls.varlink_error for cls in CLASSES if cls not in LOCAL}
    assert set(CONTRACT.errors) == remote


@pytest.mark.parametrize("error", CONTRACT.errors)
def test_every_error_has_a_message_a_hint_and_room_for_facts(error: str) -> None:
    fields = CONTRACT.errors[error].fields
    assert fields["message"] == idl.Scalar("string")
    assert fields["hint"] == idl.Maybe(idl.Scalar("string"))
    assert fields["facts"] == idl.Maybe(idl.Scalar("object"))


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls not in LOCAL])
def test_an_error_comes_out_as_it_went_in(cls: type[XshmError]) -> None:
    error = cls("r0 is not there", hint="make it", first_gfn=0x38000, file="a.cfg", fatal=True)
    reply = error_reply(CONTRACT, error)
    CONTRACT.check(CONTRACT.errors[cls.varlink_error], reply.parameters)
    received = wire.parse_reply(wire.encode_reply(reply)[:-1])
    again = error_of(received, method="Ping")
    assert type(again) is cls
    assert (again.message, again.hint, again.facts) == (error.message, error.hint, error.facts)


def test_facts_an_error_declares_are_fields_of_their_own() -> None:
    error = errors.PartialMap("frame 3 failed", call="XENMEM_x", errno=12, first_bad=3)
    assert error_reply(CONTRACT, error).parameters == {
        "message": "frame 3 failed",
        "call": "XENMEM_x",
        "errno": 12,
        "facts": {"first_bad": 3},
    }
    again = error_of(error_reply(CONTRACT, error), method="Ping")
    assert isinstance(again, errors.PartialMap)
    assert (again.call, again.errno) == ("XENMEM_x", 12)


def test_a_fact_of_another_type_than_declared_becomes_text() -> None:
    error = errors.StoreError("no", path="/a", error=13)
    parameters = error_reply(CONTRACT, error).parameters
    CONTRACT.check(CONTRACT.errors["StoreError"], parameters)
    assert parameters["error"] == "13"
