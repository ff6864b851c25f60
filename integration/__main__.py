# SPDX-License-Identifier: LGPL-2.1-or-later
"""A person wants real Xen at hand: `python3 -m integration shell --arch arm64` is all it takes."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
import tempfile
from pathlib import Path

from integration.arch import ARCHES
from integration.cache import BuildError, Cache
from integration.dom0 import CommandFailed, Dom0Error
from integration.images import PLAIN, VARIANTS
from integration.machine import BootError, Machine, prepare
from integration.toolroot import ToolError


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    # What ends this program must end the machine too, in good order.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if arguments.verb == "images":
            return _images(arguments)
        if arguments.verb == "demo":
            return _demo(arguments)
        with tempfile.TemporaryDirectory(prefix="xshmd-rig-") as scratch:
            return _on_machine(arguments, arguments.artefacts or Path(scratch))
    except CommandFailed as error:
        print(error, file=sys.stderr)
        return error.completed.status if error.completed.status > 0 else 1
    except (BootError, BuildError, Dom0Error, ToolError, OSError, ValueError) as error:
        print(f"integration: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m integration", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, what in (
        ("boot", "boot, say how long it took, and power off"),
        ("shell", "boot and open a shell in dom0"),
        ("exec", "boot and run a command in dom0"),
        ("demo", "show what xshmd does"),
        ("images", "build everything that can be built beforehand, and report the cache"),
    ):
        verb = verbs.add_parser(name, help=what, description=what)
        verb.add_argument("--arch", choices=tuple(ARCHES), default=None)
        if name in ("boot", "shell", "exec"):
            verb.add_argument("--image", choices=VARIANTS, default=PLAIN)
            verb.add_argument("--init", choices=("rig", "systemd"), default="rig")
            verb.add_argument(
                "--xenstored", choices=("xenstored", "oxenstored"), default="xenstored"
            )
            verb.add_argument("--artefacts", type=Path, help="keep the console log there")
            verb.add_argument("--time-limit", type=float, metavar="S", default=None)
            verb.add_argument("--smp", type=int, default=2)
            verb.add_argument("--dom0", choices=("pv", "pvh"), default="pv")
            verb.add_argument("--memory", type=int, metavar="MIB", default=3072)
            verb.add_argument("--xen-arg", action="append", default=[], metavar="WORD")
            verb.add_argument("--print-qemu", action="store_true", help="show QEMU's command")
        if name == "exec":
            verb.add_argument("--timeout", type=float, metavar="S", default=300)
            verb.add_argument("command", nargs=argparse.REMAINDER)
    return parser


def _on_machine(arguments: argparse.Namespace, artefacts: Path) -> int:
    # Somebody at a shell may think for an hour; a command that hangs should not.
    limit_s = arguments.time_limit or (86400 if arguments.verb == "shell" else 1800)
    with Machine(
        arguments.arch or "x86_64",
        artefacts=artefacts,
        time_limit_s=limit_s,
        image=arguments.image,
        init=arguments.init,
        xenstored=arguments.xenstored,
        smp=arguments.smp,
        dom0=arguments.dom0,
        memory_mib=arguments.memory,
        xen_args=tuple(arguments.xen_arg),
    ) as machine:
        if arguments.print_qemu:
            print(machine.command)
        if arguments.verb == "shell":
            return machine.shell()
        if arguments.verb == "exec":
            words = arguments.command
            words = words[1:] if words[:1] == ["--"] else words
            command = words[0] if len(words) == 1 else words
            done = machine.dom0.run(
                command, timeout_s=arguments.timeout, check=False, on_output=_show
            )
            return done.status
        print(machine.dom0.run("xl info; xl list").text)
        print(f"dom0 answered {machine.boot_seconds:.1f} s after power-on")
    return 0


def _show(stream: int, data: bytes) -> None:
    out = sys.stdout if stream == 1 else sys.stderr
    out.buffer.write(data)
    out.flush()


def _images(arguments: argparse.Namespace) -> int:
    cache = Cache()
    for arch in [arguments.arch] if arguments.arch else list(ARCHES):
        prepare(arch, cache)
    print(f"cache: {cache.root}")
    for entry in sorted(cache.root.glob("*-*/stamp.json")):
        size = sum(p.lstat().st_blocks * 512 for p in entry.parent.rglob("*"))
        print(f"  {size / 2**20:8.1f} MiB  {entry.parent.name}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("integration.demo") is None:
        print("integration: there is no demo yet", file=sys.stderr)
        return 1
    module = importlib.import_module("integration.demo")
    return int(module.main(["--arch", arguments.arch] if arguments.arch else []))


if __name__ == "__main__":
    sys.exit(main())
