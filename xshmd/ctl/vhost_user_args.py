# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ``xshmctl vhost-user`` takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xshmd.vhost_user.frontend import Queue
from xshmd.vhost_user.offer import NO_ADVANCE_FLAGS, Addresses, parse_queue


class _AddQueue(argparse.Action):
    """Numbers the queues in the order they are said."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: Any,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        queues = list(getattr(namespace, self.dest))
        try:
            size, where = parse_queue(str(values), len(queues))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        setattr(namespace, self.dest, [*queues, Queue(size=size, where=where)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options and operands."""
    parser.add_argument(
        "mode", choices=("serve", "connect"), metavar="serve|connect",
        help="wait for back-ends at the socket, or connect to the one that does",
    )  # fmt: skip
    parser.add_argument("path", type=Path, metavar="SOCKET", help="path of the UNIX socket")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--region", metavar="ID", help="offer this region")
    what.add_argument(
        "--guest", metavar="GUEST", help="offer all regions of this guest: name or domain id"
    )
    parser.add_argument(
        "--addresses", choices=[each.value for each in Addresses], default=Addresses.HOLDER.value,
        help="whose addresses the guest addresses are (default: holder)",
    )  # fmt: skip
    parser.add_argument(
        "--no-advance-map", choices=list(NO_ADVANCE_FLAGS), default="never", metavar="FLAG",
        help="have it mapped only while it is used, as this says it: specification or rust-vmm "
        "(default: never)",
    )  # fmt: skip
    parser.add_argument(
        "--queue", dest="queues", action=_AddQueue, default=[], metavar="QUEUE",
        help="a split virtqueue the back-end is to look into: "
        "size=N,descriptors=ADDRESS,available=ADDRESS,used=ADDRESS; may be given again",
    )  # fmt: skip
