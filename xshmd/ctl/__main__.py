# SPDX-License-Identifier: LGPL-2.1-or-later
"""Entry point of ``xshmctl``: from the command line to a verb, from an error to an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from xshmd import errors
from xshmd.ctl import args, render


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``xshmctl`` and return its exit status."""
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
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


def _run(argv: Sequence[str]) -> int:
    options = args.parse(argv)
    # Each verb is imported only when called: the others' imports would be most of the run time.
    match options.verb:
        case "list":
            from xshmd.ctl import listing as verb
        case "show":
            from xshmd.ctl import show as verb  # type: ignore[no-redef]
        case "create":
            from xshmd.ctl import create as verb  # type: ignore[no-redef]
        case _:
            from xshmd.ctl import doctor as verb  # type: ignore[no-redef]
    return verb.run(options)


if __name__ == "__main__":
    sys.exit(main())
