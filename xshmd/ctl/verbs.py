# SPDX-License-Identifier: LGPL-2.1-or-later
"""What verbs ``xshmctl`` has, and the options they share: one table for parsing, help and hints.

Nothing is imported here, so that the commonest command lines need not wait for argparse.
"""

from __future__ import annotations

VERBS = {
    "list": "list regions, or guests",
    "show": "show everything about regions",
    "status": "say how the daemon is",
    "create": "create a guest with xl, whole or not at all; or the regions of a TOML file",
    "attach": "give a running guest regions",
    "detach": "withdraw regions from a running guest",
    "remove": "free regions",
    "reload": "have the daemon read its configuration files again",
    "check": "check configuration files, without a daemon or Xen",
    "convert": "write one form of configuration from another",
    "monitor": "print what happens to regions and guests",
    "wait": "wait until a guest has its regions",
    "dump": "write the bytes of a region to the standard output",
    "load": "write the standard input into a region",
    "hexdump": "show the bytes of a region",
    "vhost-user": "give a vhost-user back-end in dom0 a region's memory, or a guest's",
    "doctor": "say what on this machine is not as it should be",
    "help": "say what a verb does",
}
DEFAULT_SOCKET = "/run/xshmd/io.xshmd.Regions"
SOCKET_VARIABLE = "XSHMD_SOCKET"


class Options:
    """The options of one command line, as attributes."""

    def __init__(self, **values: object) -> None:
        self.__dict__.update(values)


def quick(argv: list[str], socket: str) -> Options | None:
    """Parse a plain ``list`` or ``show``; None if it is anything that argparse should look at.

    Args:
        argv: The command line.
        socket: Where the daemon is unless the command line says.
    """
    json, legend, guests = "off", True, False
    words: list[str] = []
    for word in argv:
        if word == "--no-legend":
            legend = False
        elif word == "--guests":
            guests = True
        elif word in ("--json=short", "--json=pretty", "--json=off"):
            json = word[len("--json=") :]
        elif word.startswith("--socket=") and len(word) > len("--socket="):
            socket = word[len("--socket=") :]
        elif not word or word.startswith("-"):
            return None
        else:
            words.append(word)
    common = {"json": json, "legend": legend, "socket": socket}
    match words:
        # An option of a verb counts after it only.
        case ["list"] if not guests or argv.index("--guests") > argv.index("list"):
            return Options(verb="list", guests=guests, **common)
        case ["show", _, *_] if not guests:
            return Options(verb="show", ids=words[1:], **common)
        case _:
            return None
