# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of ``xshmctl``: verbs, options, and what xl's own ``create`` would take."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

from xshmd import __version__
from xshmd.errors import UsageError
from xshmd.varlink.client import DEFAULT_PATH

DEFAULT_TIMEOUT_S: Final = 60
MAX_TIMEOUT_S: Final = 3600
_XL_FLAGS: Final = (
    ("-q", "--quiet", "let xl print less"),
    ("-d", None, "let xl print the parsed configuration"),
    ("-e", None, "let no xl stay behind to watch the guest: it cannot reboot then"),
    ("-i", "--ignore-global-affinity-masks", "ignore the vCPU masks of xl.conf"),
    ("-V", "--vncviewer", "start a VNC viewer"),
    ("-A", "--vncviewer-autopass", "start a VNC viewer and give it the password"),
)
"""Options of ``xl create`` that are handed to it as they are."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see {self.prog} --help")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line, complete and checked.

    Raises:
        UsageError: The command line is wrong.
    """
    parser = _parser()
    options, more = parser.parse_known_args(argv)
    if options.verb == "create":
        _take_xl_words(options, more)
    elif more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if options.json == "auto":
        options.json = "pretty" if sys.stdout.isatty() else "short"
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="xshmctl",
        description="Show and use the static shared memory of Xen guests.",
        epilog="Exit status: 0 ok, 1 failed, 2 wrong usage, 3 no daemon answers, 4 no such object, "
        "5 refused or in conflict with what exists, 6 no Xen here, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"xshmctl {__version__}")
    common = _Parser(add_help=False)
    _add_common(parser, suppressed=False)
    _add_common(common, suppressed=True)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        return verbs.add_parser(
            name, help=summary, description=summary, parents=[common], allow_abbrev=False
        )

    listing = add("list", "list regions, or guests")
    listing.add_argument("--guests", action="store_true", help="list guests instead of regions")
    show = add("show", "show everything about regions")
    show.add_argument("ids", nargs="+", metavar="ID", help="id of a region")
    _add_create(add("create", "create a guest with xl, whole or not at all"))
    add("doctor", "say what on this machine is not as it should be")
    return parser


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
        default=default(os.environ.get("XSHMD_SOCKET") or DEFAULT_PATH),
        help=f"the daemon's socket (default: $XSHMD_SOCKET or {DEFAULT_PATH})",
    )


def _add_create(create: argparse.ArgumentParser) -> None:
    create.usage = "xshmctl create [--timeout S] [-N] CFG [KEY=VALUE...] [xl create's options]"
    create.add_argument("words", nargs="*", metavar="CFG|KEY=VALUE", help="as for xl create")
    create.add_argument(
        "--timeout",
        type=_timeout,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help=f"seconds to wait for the regions (default: {DEFAULT_TIMEOUT_S})",
    )
    create.add_argument(
        "-N",
        "--dry-run",
        "-n",
        "--dryrun",
        dest="dry_run",
        action="store_true",
        help="only check, and print what would be done",
    )
    create.add_argument("-f", "--defconfig", metavar="CFG", help="the configuration file")
    create.add_argument("-p", dest="paused", action="store_true", help="leave the guest paused")
    create.add_argument(
        "-c", dest="console", action="store_true", help="attach to the console at the end"
    )
    create.add_argument("-F", dest="foreground", action="store_true", help=argparse.SUPPRESS)
    for short, long, summary in _XL_FLAGS:
        create.add_argument(
            *filter(None, (short, long)),
            dest="xl_flags",
            action="append_const",
            const=short,
            help=summary,
        )


def _take_xl_words(options: argparse.Namespace, more: Sequence[str]) -> None:
    """Sort the words of ``create`` as xl does: with a ``=`` a setting, else the one file."""
    overrides: list[str] = []
    for word in (*options.words, *more):
        if word.startswith("-"):
            raise UsageError(
                f"xl create has no option {word} that xshmctl knows",
                hint="see xshmctl create --help",
            )
        if "=" in word:
            overrides.append(word)
        elif options.defconfig is None:
            options.defconfig = word
        else:
            raise UsageError(f"{options.defconfig} and {word} are two configuration files")
    if options.defconfig is None:
        raise UsageError(
            "create needs a configuration file", hint="/dev/null if KEY=VALUE is to say everything"
        )
    if options.foreground:
        raise UsageError(
            "create cannot keep xl in the foreground: it would never get to unpause the guest",
            hint="leave out -F, or use xl create -F, which xshmd serves just as well",
        )
    options.overrides = overrides


def _timeout(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_TIMEOUT_S:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds up to {MAX_TIMEOUT_S}")
    return int(text)
