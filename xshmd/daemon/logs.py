# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where log lines go: into the journal with a field a fact, else onto stderr as lines of text."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final, TextIO

import structlog

from xshmd.daemon.journal import SOCKET, Field, Journal, field_name, leads_to_journal

_PRIORITY: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
MESSAGE_ID: Final = "message_id"
"""The key of a log call whose value says what kind of entry it is (``journalctl MESSAGE_ID=``)."""


def _words(event: Mapping[str, Any]) -> str:
    words = [str(event["event"])]
    words += [
        f"{key}={value!r}"
        for key, value in event.items()
        if key not in ("event", "exception", MESSAGE_ID)
    ]
    return " ".join(words)


def _stderr_line(_: Any, level: str, event: Any) -> str:
    """Render one line as sd-daemon(3) wants it on stderr: ``<3>message key=value ...``."""
    priority = f"<{_PRIORITY.get(level, 6)}>"
    lines = [_words(event), *event.get("exception", "").splitlines()]
    return "\n".join(priority + line for line in lines)


def _journal_fields(_: Any, level: str, event: Any) -> dict[str, list[Field]]:
    """Render one entry for the journal: the same words, and each fact as a field."""
    trace = event.get("exception", "")
    fields = [
        ("MESSAGE", _words(event) + (f"\n{trace}" if trace else "")),
        ("PRIORITY", str(_PRIORITY.get(level, 6))),
        ("SYSLOG_IDENTIFIER", "xshmd"),
    ]
    for key, value in event.items():
        if key == MESSAGE_ID:
            fields.append(("MESSAGE_ID", str(value)))
        elif key not in ("event", "exception") and value is not None:
            many = value if isinstance(value, list | tuple) else (value,)
            fields += [(field_name(key), str(each)) for each in many]
    return {"fields": fields}


class _JournalLogger:
    """What structlog writes to when that is the journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def msg(self, fields: list[Field]) -> None:
        self._journal.send(fields)

    debug = info = warning = error = critical = msg


def set_up(
    level: str, stream: TextIO = sys.stderr, *, journal: Journal | None = None
) -> Journal | None:
    """Configure structlog for this process.

    Args:
        level: debug, info, warning or error.
        stream: Where lines of text go, if not into the journal.
        journal: The journal to write to; None finds out whether ``stream`` leads to the machine's.

    Returns:
        The journal that is written to, or None if lines of text are.
    """
    if journal is None and _leads_to_journal(stream) and SOCKET.exists():
        journal = Journal()
    factory: Callable[..., Any]
    processors: list[Any] = [structlog.contextvars.merge_contextvars]
    if journal is not None:
        processors += [structlog.processors.format_exc_info, _journal_fields]
        logger = _JournalLogger(journal)
        factory = lambda *_: logger  # noqa: E731
    elif stream.isatty():
        processors += [
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(),
        ]
        factory = structlog.PrintLoggerFactory(stream)
    else:
        processors += [structlog.processors.format_exc_info, _stderr_line]
        factory = structlog.PrintLoggerFactory(stream)
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )
    return journal


def _leads_to_journal(stream: TextIO) -> bool:
    try:
        return leads_to_journal(stream.fileno())
    except OSError:  # a stream that is no file
        return False
