# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where log lines go: readable on a terminal, with a priority the journal understands elsewhere."""

from __future__ import annotations

import logging
import sys
from typing import Any, Final, TextIO

import structlog

_PRIORITY: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def _journal_line(_: Any, level: str, event: Any) -> str:
    """Render one line as sd-daemon(3) wants it on stderr: ``<3>message key=value ...``."""
    words = [str(event.pop("event"))]
    trace = event.pop("exception", "")
    words += [f"{key}={value!r}" for key, value in event.items()]
    priority = f"<{_PRIORITY.get(level, 6)}>"
    line = priority + " ".join(words)
    for extra in trace.splitlines():
        line += f"\n{priority}{extra}"
    return line


def set_up(level: str, stream: TextIO = sys.stderr) -> None:
    """Configure structlog for this process; ``level`` is debug, info, warning or error."""
    on_terminal = stream.isatty()
    processors: list[Any] = [structlog.contextvars.merge_contextvars]
    if on_terminal:
        processors += [
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(),
        ]
    else:
        processors += [structlog.processors.format_exc_info, _journal_line]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
