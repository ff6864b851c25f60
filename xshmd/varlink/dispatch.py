# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a checked message to the method that answers it, and from its outcome to the replies.

Knows nothing of sockets or trio: replies leave through the callable the caller gives.  What a call
may carry is what the ``.varlink`` files declare; nothing undeclared reaches a method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import structlog

from xshmd.errors import Fact, XshmError
from xshmd.varlink import idl, wire
from xshmd.varlink.wire import Call, Flag, Parameters, Reply

SERVICE: Final = "org.varlink.service"

Emit = Callable[[Parameters], Awaitable[None]]
Send = Callable[[Reply], Awaitable[None]]

log = structlog.get_logger()


class InvalidParameter(Exception):
    """A method found a parameter out of range, which its declared type cannot say.

    Args:
        parameter: The parameter's name.
    """

    def __init__(self, parameter: str) -> None:
        super().__init__(parameter)
        self.parameter = parameter


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What answers one method with one reply; parameters not given reach it as None."""

    run: Callable[[Parameters], Awaitable[Parameters]]
    max_call_bytes: int = wire.MAX_CALL_BYTES
    interruptible: bool = False
    """Whether it may be cancelled when its client goes away, because it changes nothing."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """What answers a method called with ``more``: it emits replies and returns the last one."""

    run: Callable[[Parameters, Emit], Awaitable[Parameters]]
    max_call_bytes: int = wire.MAX_CALL_BYTES
    interruptible: bool = True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """An interface and what answers its methods; one that is missing is not implemented."""

    interface: idl.Interface
    methods: Mapping[str, Method | Stream]

    def __post_init__(self) -> None:
        if unknown := self.methods.keys() - self.interface.methods.keys():
            raise ValueError(f"{self.interface.name} declares no {', '.join(sorted(unknown))}")


class _Refusal(Exception):
    """Ends a call with one of the errors every service has."""

    def __init__(self, error: str, **parameters: str) -> None:
        super().__init__(error)
        self.reply = Reply(dict(parameters), f"{SERVICE}.{error}")


class Dispatcher:
    """Answers calls of some interfaces and of ``org.varlink.service``.

    Args:
        implementations: The interfaces there are.
        vendor, product, version, url: What GetInfo says of the service.
    """

    def __init__(
        self,
        implementations: Sequence[Implementation],
        *,
        vendor: str,
        product: str,
        version: str,
        url: str,
    ) -> None:
        self._info = {"vendor": vendor, "product": product, "version": version, "url": url}
        service = Implementation(
            interface=idl.load(SERVICE),
            methods={
                "GetInfo": Method(run=self._get_info),
                "GetInterfaceDescription": Method(run=self._get_interface_description),
            },
        )
        self._implementations = {each.interface.name: each for each in (service, *implementations)}

    def parse(self, message: bytes) -> Call:
        """Return the call a message holds.

        Raises:
            ProtocolViolation: It is none, or is longer than its method allows.
        """
        call = wire.parse_call(message)
        found = self._method(call)
        if call.size_bytes > (found.max_call_bytes if found else wire.MAX_CALL_BYTES):
            raise wire.ProtocolViolation(f"a call is too long: {call.size_bytes} bytes")
        return call

    def interruptible(self, call: Call) -> bool:
        """Return whether the call may be cancelled when its client goes away."""
        found = self._method(call)
        return found is not None and found.interruptible

    def last_reply(self, call: Call) -> Reply | None:
        """Return the reply that ends the call's stream if it must end now; None if it has none."""
        streams = isinstance(self._method(call), Stream) and call.flag is Flag.MORE
        return Reply({}) if streams else None

    async def handle(self, call: Call, send: Send) -> None:
        """Run the call and send its replies, if it wants any.  Raises nothing of its own."""
        reply = await self._outcome(call, send)
        if call.flag is not Flag.ONEWAY:
            await send(reply)

    async def _outcome(self, call: Call, send: Send) -> Reply:
        interface_name, _, _ = call.method.rpartition(".")
        try:
            return await self._run(call, send)
        except _Refusal as exc:
            return exc.reply
        except InvalidParameter as exc:
            return _Refusal("InvalidParameter", parameter=exc.parameter).reply
        except XshmError as exc:
            interface = self._implementations[interface_name].interface
            if exc.varlink_error in interface.errors:
                return error_reply(interface, exc)
            log.exception("undeclared error raised", method=call.method)
            return _internal_error(interface, exc)
        except Exception as exc:
            log.exception("method failed", method=call.method)
            return _internal_error(self._implementations[interface_name].interface, exc)

    async def _run(self, call: Call, send: Send) -> Reply:
        interface_name, _, method_name = call.method.rpartition(".")
        implementation = self._implementations.get(interface_name)
        if implementation is None:
            raise _Refusal("InterfaceNotFound", interface=interface_name)
        declared = implementation.interface.methods.get(method_name)
        if declared is None:
            raise _Refusal("MethodNotFound", method=call.method)
        method = implementation.methods.get(method_name)
        # None of ours takes a connection over, and a success would tell the client that it did.
        if method is None or call.flag is Flag.UPGRADE:
            raise _Refusal("MethodNotImplemented", method=call.method)
        try:
            implementation.interface.check(declared.takes, call.parameters)
        except idl.Mismatch as exc:
            raise _Refusal("InvalidParameter", parameter=exc.field) from exc
        parameters = {name: call.parameters.get(name) for name in declared.takes.fields}
        if isinstance(method, Method):
            return Reply(await method.run(parameters))
        if call.flag is not Flag.MORE:
            raise _Refusal("ExpectedMore")

        async def emit(values: Parameters) -> None:
            await send(Reply(values, continues=True))

        return Reply(await method.run(parameters, emit))

    def _method(self, call: Call) -> Method | Stream | None:
        interface_name, _, method_name = call.method.rpartition(".")
        implementation = self._implementations.get(interface_name)
        return implementation.methods.get(method_name) if implementation else None

    async def _get_info(self, _parameters: Parameters) -> Parameters:
        return {**self._info, "interfaces": sorted(self._implementations)}

    async def _get_interface_description(self, parameters: Parameters) -> Parameters:
        implementation = self._implementations.get(parameters["interface"])
        if implementation is None:
            raise _Refusal("InterfaceNotFound", interface=parameters["interface"])
        return {"description": implementation.interface.text}


def permission_denied() -> Reply:
    """Return the reply to whoever may not speak to the service."""
    return _Refusal("PermissionDenied").reply


def error_reply(interface: idl.Interface, error: XshmError) -> Reply:
    """Return an error as its declaration wants it; facts it has no field for go into ``facts``."""
    declared = interface.errors[error.varlink_error].fields
    facts = dict(error.facts)
    parameters: Parameters = {"message": error.message}
    if error.hint:
        parameters["hint"] = error.hint
    for name, kind in declared.items():
        if name in facts and name not in ("message", "hint", "facts"):
            parameters[name] = _fitting(kind, facts.pop(name))
    if facts:
        parameters["facts"] = facts
    return Reply(parameters, f"{interface.name}.{error.varlink_error}")


def _fitting(kind: idl.Type, fact: Fact) -> Fact:
    wants_text = kind in (idl.Scalar("string"), idl.Maybe(idl.Scalar("string")))
    return str(fact) if wants_text else fact


def _internal_error(interface: idl.Interface, cause: Exception) -> Reply:
    """Return what a client is told of a bug of ours: that it is one, and where to read of it."""
    error = XshmError(
        f"internal error in xshmd: {type(cause).__name__}",
        hint="journalctl -u xshmd has the details; please report it",
    )
    return Reply({"message": error.message, "hint": error.hint}, f"{interface.name}.Failed")
