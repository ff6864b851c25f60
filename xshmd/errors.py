# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every error a user may see, so that each says what is wrong, with what, and what to do about it.

One class is one Varlink error is one exit status; ``tests/test_errors.py`` holds the three
together.  Anything raised that is *not* an :class:`XshmError` is a bug of ours and ends in a
traceback.
"""

from __future__ import annotations

# xshmctl starts in the time that importing typing would take.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import ClassVar

Fact = str | int | bool

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_NO_SUCH = 4
EXIT_REFUSED = 5
EXIT_NO_XEN = 6


class XshmError(Exception):
    """An error that may be shown to the user as it is.

    Args:
        message: What is wrong with which object, in one sentence without a final full stop.
        hint: What to do about it; empty where nothing can be said.
        facts: The values the message speaks of, for programs.
    """

    varlink_error: ClassVar[str] = "Failed"
    exit_status: ClassVar[int] = EXIT_FAILED

    def __init__(self, message: str, *, hint: str = "", **facts: Fact) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.facts = facts
        self.parts: tuple[XshmError, ...] = ()
        """The errors this one speaks for, where there are several; see :func:`combined`."""

    def one_line(self) -> str:
        """Return message and hint as the one sentence a log line or a terminal shows."""
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(XshmError):
    """The call itself is wrong: an unknown verb, a missing or malformed argument."""

    varlink_error = "InvalidArgument"
    exit_status = EXIT_USAGE


class DaemonUnreachable(XshmError):
    """No daemon answers on the socket, or it went away in the middle of a call."""

    varlink_error = "DaemonUnreachable"
    exit_status = EXIT_UNREACHABLE


class NoSuchRegion(XshmError):
    """No region of that id is known to the daemon."""

    varlink_error = "NoSuchRegion"
    exit_status = EXIT_NO_SUCH


class NoSuchGuest(XshmError):
    """No guest of that name or domid is known, or it ended meanwhile."""

    varlink_error = "NoSuchGuest"
    exit_status = EXIT_NO_SUCH


class ConfigError(XshmError):
    """A configuration cannot be read or is not valid; ``facts`` have ``file`` and ``place``."""

    varlink_error = "InvalidConfiguration"
    exit_status = EXIT_REFUSED


class ConfigUnreadable(XshmError):
    """A configuration file cannot be read or is not of its language at all."""

    varlink_error = "UnreadableConfiguration"
    exit_status = EXIT_FAILED


class Refused(XshmError):
    """What is asked for is understood but cannot be kept on this machine or for this guest."""

    varlink_error = "Refused"
    exit_status = EXIT_REFUSED


class Conflict(XshmError):
    """What is asked for contradicts what exists: another size, owner, holder or frame."""

    varlink_error = "Conflict"
    exit_status = EXIT_REFUSED


class OutOfMemory(XshmError):
    """The host has too little free memory for what is asked for."""

    varlink_error = "OutOfMemory"
    exit_status = EXIT_REFUSED


class QuotaExceeded(XshmError):
    """Somebody would have more of something than one may; ``facts`` have ``limit``."""

    varlink_error = "QuotaExceeded"
    exit_status = EXIT_REFUSED


class OutOfRange(XshmError):
    """An offset, a length or a reference reaches beyond what it is about."""

    varlink_error = "OutOfRange"
    exit_status = EXIT_USAGE


class NoSuchBuffer(XshmError):
    """There never was a hypercall buffer of that id."""

    varlink_error = "NoSuchBuffer"
    exit_status = EXIT_NO_SUCH


class AlreadyFreed(XshmError):
    """The hypercall buffer, or the memory in it, has been freed: a double free, or a late use."""

    varlink_error = "AlreadyFreed"
    exit_status = EXIT_NO_SUCH


class ForeignBuffer(XshmError):
    """The hypercall buffer is another client's."""

    varlink_error = "ForeignBuffer"
    exit_status = EXIT_REFUSED


class BufferBusy(XshmError):
    """A hypercall uses the memory at this moment."""

    varlink_error = "BufferBusy"
    exit_status = EXIT_REFUSED


class NoSuchList(XshmError):
    """No list of that id, or for that purpose, is posted (any more)."""

    varlink_error = "NoSuchList"
    exit_status = EXIT_NO_SUCH


class ListCancelled(XshmError):
    """A list ended without a transfer: it was unregistered, or its guest left the region."""

    varlink_error = "ListCancelled"
    exit_status = EXIT_REFUSED


class TimedOut(XshmError):
    """Something outside did not answer or happen in the time allowed for it."""

    varlink_error = "TimedOut"
    exit_status = EXIT_FAILED


class XenUnavailable(XshmError):
    """This is no Xen control domain, or the compiled binding does not fit the running Xen."""

    varlink_error = "XenUnavailable"
    exit_status = EXIT_NO_XEN


class HypercallFailed(XshmError):
    """Xen refused a hypercall in a way nobody above expected.

    Args:
        call: The libxenctrl function or XENMEM operation, as in Xen's headers.
        errno: The positive errno.
    """

    varlink_error = "HypercallFailed"
    exit_status = EXIT_FAILED

    def __init__(
        self, message: str, *, call: str = "", errno: int = 0, hint: str = "", **facts: Fact
    ) -> None:
        super().__init__(message, hint=hint, call=call, errno=errno, **facts)
        self.call = call
        self.errno = errno


class DomainGone(HypercallFailed):
    """The domain a hypercall named does not exist (any more): ESRCH."""

    varlink_error = "DomainGone"
    exit_status = EXIT_NO_SUCH


class PartialMap(HypercallFailed):
    """Some frames of a batch were not mapped; what was done by the batch has been undone."""

    varlink_error = "PartialMap"
    exit_status = EXIT_FAILED


class StoreLost(XshmError):
    """The connection to xenstored broke; whatever was in flight may or may not have happened."""

    varlink_error = "StoreLost"
    exit_status = EXIT_FAILED


class StoreError(XshmError):
    """xenstored answered with an error nobody expected; ``facts`` have ``path`` and ``error``."""

    varlink_error = "StoreError"
    exit_status = EXIT_FAILED


class StoreTimedOut(TimedOut):
    """xenstored did not answer in time; whatever was in flight may or may not have happened."""

    varlink_error = "StoreTimedOut"
    exit_status = EXIT_FAILED


StoreTrouble = (StoreLost, StoreError, StoreTimedOut)
"""What xenstored may do to any piece of work, none of which is the fault of what it is about."""


def combined(errors: Sequence[XshmError]) -> XshmError:
    """Return one error that speaks for all of ``errors``, of which there is at least one.

    It is of the first's kind and has its facts; its message names the others too.
    """
    first, others = errors[0], tuple(errors[1:])
    if not others:
        return first
    rest = "; ".join(other.one_line() for other in others)
    # Each hint stands with its own message, so the spokesman has none.
    message = f"{first.one_line()}; and {len(others)} more: {rest}"
    spokesman = type(first)(message, hint="", **first.facts)
    spokesman.parts = tuple(errors)
    return spokesman


def rules_of(error: XshmError) -> tuple[str, ...]:
    """Return the names of the rules that an error says are broken, or of what else it says."""
    parts = error.parts or (error,)
    return tuple(dict.fromkeys(str(one.facts.get("rule") or one.varlink_error) for one in parts))


def all_errors() -> tuple[type[XshmError], ...]:
    """Return :class:`XshmError` and every class below it, parents first."""
    found: list[type[XshmError]] = [XshmError]
    for cls in found:
        found.extend(sub for sub in cls.__subclasses__() if sub not in found)
    return tuple(found)
