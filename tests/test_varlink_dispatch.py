# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which reply a call gets, with no socket in sight."""

from __future__ import annotations

from typing import Any

import pytest
import structlog.testing

from xshmd.errors import Conflict, XshmError
from xshmd.varlink import idl, wire
from xshmd.varlink.dispatch import (
    Dispatcher,
    Emit,
    Implementation,
    InvalidParameter,
    Method,
    Stream,
)
from xshmd.varlink.wire import Call, Flag, Parameters, ProtocolViolation, Reply

INTERFACE = idl.parse(
    """interface org.example
method Echo(text: string, times: ?int) -> (text: string)
method Count(to: int) -> (at: ?int)
method Raise() -> ()
method Missing() -> ()
error Conflict (message: string, hint: ?string)
error Failed (message: string, hint: ?string)"""
)


class Undeclared(XshmError):
    varlink_error = "Undeclared"


class Service:
    def __init__(self) -> None:
        self.error: BaseException = Conflict("no", hint="yes")
        self.echoed: list[Parameters] = []

    async def echo(self, parameters: Parameters) -> Parameters:
        self.echoed.append(parameters)
        if parameters["times"] == 0:
            raise InvalidParameter("times")
        return {"text": parameters["text"]}

    async def count(self, parameters: Parameters, emit: Emit) -> Parameters:
        for at in range(parameters["to"]):
            await emit({"at": at})
        return {}

    async def fail(self, _parameters: Parameters) -> Parameters:
        raise self.error

    def dispatcher(self) -> Dispatcher:
        methods: dict[str, Method | Stream] = {
            "Echo": Method(run=self.echo, max_call_bytes=1000),
            "Count": Stream(run=self.count),
            "Raise": Method(run=self.fail),
        }
        return Dispatcher(
            [Implementation(interface=INTERFACE, methods=methods)],
            vendor="v",
            product="p",
            version="1",
            url="u",
        )


@pytest.fixture
def service() -> Service:
    return Service()


async def replies(
    service: Service, method: str, flag: Flag = Flag.NONE, **parameters: Any
) -> list[Reply]:
    sent: list[Reply] = []

    async def send(reply: Reply) -> None:
        sent.append(reply)

    await service.dispatcher().handle(Call(method, parameters, flag), send)
    return sent


async def test_a_call_is_answered_once(service: Service) -> None:
    assert await replies(service, "org.example.Echo", text="a") == [Reply({"text": "a"})]


async def test_parameters_not_given_are_none(service: Service) -> None:
    await replies(service, "org.example.Echo", text="a")
    assert service.echoed == [{"text": "a", "times": None}]


async def test_more_on_a_simple_method_gives_one_last_reply(service: Service) -> None:
    assert await replies(service, "org.example.Echo", Flag.MORE, text="a") == [Reply({"text": "a"})]


async def test_oneway_is_run_and_not_answered(service: Service) -> None:
    assert await replies(service, "org.example.Echo", Flag.ONEWAY, text="a") == []
    assert service.echoed
    assert await replies(service, "org.example.Raise", Flag.ONEWAY) == []
    assert await replies(service, "no.such.Method", Flag.ONEWAY) == []
    assert await replies(service, "org.example.Count", Flag.ONEWAY, to=3) == []


async def test_a_stream_continues_until_its_last_reply(service: Service) -> None:
    assert await replies(service, "org.example.Count", Flag.MORE, to=2) == [
        Reply({"at": 0}, continues=True),
        Reply({"at": 1}, continues=True),
        Reply({}),
    ]


@pytest.mark.parametrize(
    ("method", "flag", "parameters", "error", "details"),
    [
        ("org.example.Nope", Flag.NONE, {}, "MethodNotFound", {"method": "org.example.Nope"}),
        ("org.other.Nope", Flag.NONE, {}, "InterfaceNotFound", {"interface": "org.other"}),
        ("Nope", Flag.NONE, {}, "InterfaceNotFound", {"interface": ""}),
        ("", Flag.NONE, {}, "InterfaceNotFound", {"interface": ""}),
        (
            "org.example.Missing",
            Flag.NONE,
            {},
            "MethodNotImplemented",
            {"method": "org.example.Missing"},
        ),
        (
            "org.example.Echo",
            Flag.UPGRADE,
            {"text": "a"},
            "MethodNotImplemented",
            {"method": "org.example.Echo"},
        ),
        ("org.example.Count", Flag.NONE, {"to": 1}, "ExpectedMore", {}),
        ("org.example.Echo", Flag.NONE, {}, "InvalidParameter", {"parameter": "text"}),
        ("org.example.Echo", Flag.NONE, {"text": 1}, "InvalidParameter", {"parameter": "text"}),
        (
            "org.example.Echo",
            Flag.NONE,
            {"text": "a", "x": 1},
            "InvalidParameter",
            {"parameter": "x"},
        ),
        (
            "org.example.Echo",
            Flag.NONE,
            {"text": "a", "times": 0},
            "InvalidParameter",
            {"parameter": "times"},
        ),
        ("org.example.Count", Flag.MORE, {"to": None}, "InvalidParameter", {"parameter": "to"}),
        (
            "org.varlink.service.GetInterfaceDescription",
            Flag.NONE,
            {"interface": "org.nope"},
            "InterfaceNotFound",
            {"interface": "org.nope"},
        ),
    ],
)
async def test_calls_that_cannot_be(
    service: Service,
    method: str,
    flag: Flag,
    parameters: Parameters,
    error: str,
    details: Parameters,
) -> None:
    assert await replies(service, method, flag, **parameters) == [
        Reply(details, f"org.varlink.service.{error}")
    ]


async def test_an_error_of_ours_is_replied_as_declared(service: Service) -> None:
    assert await replies(service, "org.example.Raise") == [
        Reply({"message": "no", "hint": "yes"}, "org.example.Conflict")
    ]


@pytest.mark.parametrize("error", [KeyError("secret"), Undeclared("secret")])
async def test_a_bug_is_logged_and_replied_without_details(
    service: Service, error: Exception
) -> None:
    service.error = error
    with structlog.testing.capture_logs() as logs:
        (reply,) = await replies(service, "org.example.Raise")
    assert reply.error == "org.example.Failed"
    assert type(error).__name__ in reply.parameters["message"]
    assert "secret" not in str(reply)
    assert [entry["log_level"] for entry in logs] == ["error"]


async def test_get_info_lists_every_interface(service: Service) -> None:
    (reply,) = await replies(service, "org.varlink.service.GetInfo")
    assert reply.parameters == {
        "vendor": "v",
        "product": "p",
        "version": "1",
        "url": "u",
        "interfaces": ["org.example", "org.varlink.service"],
    }


async def test_the_description_is_the_file_itself(service: Service) -> None:
    (reply,) = await replies(
        service, "org.varlink.service.GetInterfaceDescription", interface="org.example"
    )
    assert reply.parameters == {"description": INTERFACE.text}


def test_how_long_a_call_may_be_depends_on_its_method(service: Service) -> None:
    dispatcher = service.dispatcher()

    def call_of(method: str, size: int) -> bytes:
        data = wire.encode_call(Call(method, {"text": ""}))[:-1]
        return data[:-3] + b"x" * (size - len(data)) + data[-3:]

    assert dispatcher.parse(call_of("org.example.Echo", 1000)).size_bytes == 1000
    with pytest.raises(ProtocolViolation):
        dispatcher.parse(call_of("org.example.Echo", 1001))
    for method in ("org.example.Nope", "org.example.Raise"):
        dispatcher.parse(call_of(method, wire.MAX_CALL_BYTES))
        with pytest.raises(ProtocolViolation):
            dispatcher.parse(call_of(method, wire.MAX_CALL_BYTES + 1))


def test_a_method_table_cannot_have_what_is_not_declared(service: Service) -> None:
    with pytest.raises(ValueError, match="Ecko"):
        Implementation(interface=INTERFACE, methods={"Ecko": Method(run=service.echo)})
