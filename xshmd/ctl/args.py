# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of ``xshmctl``: its verbs and what each of them takes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NoReturn

from xshmd import __version__
from xshmd.ctl import create_args
from xshmd.ctl.arguments import add_dry_run, add_timeout, size, timeout
from xshmd.ctl.verbs import DEFAULT_SOCKET, SOCKET_VARIABLE, VERBS, Options
from xshmd.errors import UsageError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are ours."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see {self.prog} --help")


def parse(argv: Sequence[str]) -> Any:
    """Return the options of a command line, complete and checked.

    Raises:
        UsageError: The command line is wrong.
    """
    verb = _verb_in(argv)
    parser, _ = parsers([verb]) if verb else parsers(VERBS, whole=False)
    options: Any
    options, more = parser.parse_known_args(argv, namespace=Options())
    if options.verb == "create":
        create_args.take_words(options, more)
    elif more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if options.json == "auto":
        options.json = "pretty" if sys.stdout.isatty() else "short"
    return options


def print_help(verb: str | None) -> None:
    """Print the help of a verb, or of the whole."""
    if verb:
        parsers([verb])[1][verb].print_help()
    else:
        parsers(VERBS, whole=False)[0].print_help()


def parsers(
    verbs: Iterable[str], *, whole: bool = True
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of command lines with one of these verbs, and that of each of them.

    Args:
        verbs: Which ones; to make them all takes as long as all else that xshmctl does.
        whole: Whether with the verbs' own options.
    """
    parser = Parser(
        prog="xshmctl",
        description="Show and use the static shared memory of Xen guests.",
        epilog="Exit status: 0 ok, 1 failed, 2 wrong usage, 3 no daemon answers, 4 no such object, "
        "5 refused or in conflict with what exists, 6 no Xen here, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"xshmctl {__version__}")
    common = Parser(add_help=False)
    _add_common(parser, suppressed=False)
    _add_common(common, suppressed=True)
    group = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    made: dict[str, argparse.ArgumentParser] = {}
    for name in verbs:
        summary = VERBS[name]
        made[name] = group.add_parser(
            name, help=summary, description=summary, parents=[common], allow_abbrev=False
        )
        if whole and name in _ADDERS:
            _ADDERS[name](made[name])
    return parser, made


def _verb_in(argv: Sequence[str]) -> str:
    """Return the verb of a command line; empty if it has none, as when it asks for help.

    Raises:
        UsageError: There is no such verb.  argparse would not say which may have been meant.
    """
    skip = False
    for word in argv:
        if skip or word.startswith("-"):
            skip = word in ("--socket", "--json")
        elif word in VERBS:
            return word
        else:
            # Only for who mistyped: difflib takes long to import.
            import difflib

            close = difflib.get_close_matches(word, VERBS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else "xshmctl help names the verbs"
            raise UsageError(f"there is no verb {word}", hint=hint)
    return ""


def _add_common(parser: argparse.ArgumentParser, *, suppressed: bool) -> None:
    """Add the options that may stand before the verb and after it."""

    def default(value: object) -> object:
        return argparse.SUPPRESS if suppressed else value

    parser.add_argument(
        "--json",
        choices=("pretty", "short", "off"),
        default=default("off"),
        help="print JSON as the daemon's interface defines it",
    )
    parser.add_argument(
        "-j",
        dest="json",
        action="store_const",
        const="auto",
        default=default("off"),
        help="--json=pretty on a terminal, --json=short elsewhere",
    )
    parser.add_argument(
        "--no-legend",
        dest="legend",
        action="store_false",
        default=default(True),
        help="print no header and no count",
    )
    parser.add_argument(
        "--socket",
        metavar="PATH",
        default=default(os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET),
        help=f"the daemon's socket (default: ${SOCKET_VARIABLE} or {DEFAULT_SOCKET})",
    )


def _add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--guests", action="store_true", help="list guests instead of regions")


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="+", metavar="REGION", help="id of a region")


def _add_attach(parser: argparse.ArgumentParser) -> None:
    add_dry_run(parser)
    parser.add_argument("guest", metavar="GUEST", help="name or domain id of a running guest")
    parser.add_argument(
        "entries", nargs="+", metavar="ENTRY",
        help="what it gets, as in static_shm: id=ID,begin=ADDRESS,size=BYTES,role=borrower",
    )  # fmt: skip


def _add_detach(parser: argparse.ArgumentParser) -> None:
    add_dry_run(parser)
    parser.add_argument("guest", metavar="GUEST", help="name or domain id of a running guest")
    parser.add_argument("ids", nargs="+", metavar="REGION", help="id of a region")


def _add_remove(parser: argparse.ArgumentParser) -> None:
    add_dry_run(parser)
    parser.add_argument(
        "--force", action="store_true", help="withdraw the regions from their members first"
    )
    parser.add_argument("ids", nargs="+", metavar="REGION", help="id of a region")


def _add_monitor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout", type=timeout, metavar="S", help="end after so many seconds (default: never)"
    )


def _add_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("guest", metavar="GUEST", help="name or domain id of a guest")
    add_timeout(parser)


def _add_dump(parser: argparse.ArgumentParser) -> None:
    _add_offset(parser)
    parser.add_argument(
        "--length", type=size, metavar="BYTES",
        help="how many bytes (default: to the region's end)",
    )  # fmt: skip


def _add_load(parser: argparse.ArgumentParser) -> None:
    add_dry_run(parser)
    _add_offset(parser)


def _add_offset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="REGION", help="id of the region")
    parser.add_argument(
        "--offset", type=size, default=0, metavar="BYTES",
        help="where in the region to begin: bytes, or a number with KiB, MiB or GiB (default: 0)",
    )  # fmt: skip


def _add_check(parser: argparse.ArgumentParser) -> None:
    from xshmd.ctl import check

    check.add_arguments(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    from xshmd.ctl import convert

    convert.add_arguments(parser)


def _add_vhost_user(parser: argparse.ArgumentParser) -> None:
    from xshmd.ctl import vhost_user_args

    vhost_user_args.add_arguments(parser)


def _add_help(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("about", nargs="?", choices=tuple(VERBS), metavar="VERB", help="a verb")


_ADDERS: Final[dict[str, Callable[[argparse.ArgumentParser], None]]] = {
    "list": _add_list,
    "show": _add_show,
    "create": create_args.add_arguments,
    "attach": _add_attach,
    "detach": _add_detach,
    "remove": _add_remove,
    "reload": add_dry_run,
    "check": _add_check,
    "convert": _add_convert,
    "monitor": _add_monitor,
    "wait": _add_wait,
    "dump": _add_dump,
    "load": _add_load,
    "hexdump": _add_dump,
    "vhost-user": _add_vhost_user,
    "help": _add_help,
}
