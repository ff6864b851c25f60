# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ``xshmctl create`` takes: its own options, and all that ``xl create`` would."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, Final

from xshmd.ctl.arguments import add_dry_run, add_timeout
from xshmd.errors import UsageError

_XL_FLAGS: Final = (
    ("-q", "--quiet", "let xl print less"),
    ("-d", None, "let xl print the parsed configuration"),
    ("-e", None, "let no xl stay behind to watch the guest: it cannot reboot then"),
    ("-i", "--ignore-global-affinity-masks", "ignore the vCPU masks of xl.conf"),
    ("-V", "--vncviewer", "start a VNC viewer"),
    ("-A", "--vncviewer-autopass", "start a VNC viewer and give it the password"),
)
"""Options of ``xl create`` that are handed to it as they are."""


def add_arguments(create: argparse.ArgumentParser) -> None:
    """Add what only this verb takes."""
    create.usage = (
        "xshmctl create [--timeout S] [-N] CFG [KEY=VALUE...] [xl create's options]\n"
        "       xshmctl create [-N] FILE.toml"
    )
    create.add_argument(
        "words", nargs="*", metavar="CFG|KEY=VALUE",
        help="as for xl create; a file whose name ends in .toml has regions for the system",
    )  # fmt: skip
    add_timeout(create)
    add_dry_run(create, "-n", "--dryrun")
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


def take_words(options: Any, more: Sequence[str]) -> None:
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
