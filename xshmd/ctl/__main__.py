# SPDX-License-Identifier: LGPL-2.1-or-later
"""Entry point of ``xshmctl``: from the command line to a verb, from an error to an exit status."""

from __future__ import annotations

import os
import sys

from xshmd import errors
from xshmd.ctl import render, verbs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


def command() -> None:
    """Run ``xshmctl`` as a process of its own, and end it."""
    status = main()
    try:
        sys.stdout.flush()  # an error leaves what was printed before it
    except OSError:
        status = status or errors.EXIT_FAILED
    # All that is left is to take the interpreter down, which would take a tenth of the whole.
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``xshmctl`` and return its exit status."""
    try:
        status = _run(_options(list(sys.argv[1:] if argv is None else argv)))
        sys.stdout.flush()
        return status
    except errors.XshmError as exc:
        render.complain(exc)
        return exc.exit_status
    except KeyboardInterrupt as exc:
        return 128 + getattr(exc, "signum", 2)
    except BrokenPipeError:
        # Whoever read our output has had enough; the interpreter must not complain of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.EXIT_FAILED


def _options(argv: list[str]) -> Any:
    socket = os.environ.get(verbs.SOCKET_VARIABLE) or verbs.DEFAULT_SOCKET
    options = verbs.quick(argv, socket)
    if options is None:
        from xshmd.ctl import args

        return args.parse(argv)
    return options


def _run(options: Any) -> int:
    # Each verb is imported only when called: the others' imports would be most of the run time.
    match options.verb:
        case "list":
            from xshmd.ctl import listing

            return listing.run(options)
        case "show":
            from xshmd.ctl import show

            return show.run(options)
        case "status":
            from xshmd.ctl import status

            return status.run(options)
        case "create":
            from xshmd.ctl import create

            return create.run(options)
        case "attach" | "detach" | "remove" | "reload":
            from xshmd.ctl import changes

            return changes.run(options)
        case "check":
            from xshmd.ctl import check

            return check.run(options)
        case "convert":
            from xshmd.ctl import convert

            return convert.run(options)
        case "monitor":
            from xshmd.ctl import monitor

            return monitor.run(options)
        case "wait":
            from xshmd.ctl import wait

            return wait.run(options)
        case "dump" | "load":
            from xshmd.ctl import transfer

            return transfer.run(options)
        case "hexdump":
            from xshmd.ctl import hexdump

            return hexdump.run(options)
        case "vhost-user":
            from xshmd.ctl import vhost_user

            return vhost_user.run(options)
        case "help":
            return _help(options)
        case _:
            from xshmd.ctl import doctor

            return doctor.run(options)


def _help(options: Any) -> int:
    from xshmd.ctl import args

    args.print_help(options.about)
    return 0


if __name__ == "__main__":
    command()
