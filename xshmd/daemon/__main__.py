# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ``xshmd`` command: reads the command line, runs the daemon, turns its end into a status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog
import trio

from xshmd import __version__
from xshmd.daemon import app, logs
from xshmd.engine.options import REBOOT_GRACE_S, Options
from xshmd.errors import XshmError

DEFAULT_SOCKET = Path("/run/xshmd/io.xshmd.Regions")
log = structlog.get_logger()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xshmd",
        description="Give Xen guests shared memory at the frames they are configured for.",
    )
    parser.add_argument("--version", action="version", version=f"xshmd {__version__}")
    parser.add_argument(
        "--socket", type=Path, default=DEFAULT_SOCKET, metavar="PATH",
        help="Varlink socket to serve, unless systemd passes one (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--on-failure", choices=("destroy", "keep-paused"), default="destroy",
        help="what becomes of a new guest whose regions cannot be given (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--reboot-grace", type=float, default=REBOOT_GRACE_S, metavar="SECONDS",
        help="how long regions wait for a guest that rebooted or crashed (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--metrics-file", type=Path, metavar="PATH",
        help="keep figures for Prometheus' node_exporter in this file (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info"
    )
    return parser


def _first_error(problem: BaseException) -> XshmError | None:
    if isinstance(problem, XshmError):
        return problem
    if isinstance(problem, BaseExceptionGroup):
        for inner in problem.exceptions:
            if (found := _first_error(inner)) is None:
                return None
        return found
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon; return its exit status."""
    chosen = _parser().parse_args(arguments)
    journal = logs.set_up(chosen.log_level)
    settings = app.Settings(
        socket_path=chosen.socket,
        options=Options(
            reboot_grace_s=chosen.reboot_grace,
            destroy_on_failure=chosen.on_failure == "destroy",
        ),
        metrics_path=chosen.metrics_file,
        journal=journal,
    )
    try:
        trio.run(app.run, settings)
    except BaseException as problem:
        # Only what is the user's to mend is said in one sentence; a bug keeps its traceback.
        error = _first_error(problem)
        if error is None:
            raise
        log.error("cannot go on", reason=error.one_line())
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
