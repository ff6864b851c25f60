# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make fuzz``: each reader in turn, guided by coverage, for as long as asked.

Needs atheris.  An input that breaks something is written beside the corpus and named; put it into
the corpus, where ``tests/test_fuzz.py`` plays it from then on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fuzz.targets import TARGETS

MAX_INPUT_BYTES = 4096


def main() -> int:
    """Run the fuzzer; return how many targets failed."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--inputs", type=int, default=0, help="for each target; 0: no limit")
    parser.add_argument("--seed", type=int, default=0, help="0: another each time")
    parser.add_argument("--one", choices=sorted(TARGETS), help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    options = parser.parse_args()
    if options.one:
        _fuzz_here(options.one, options)
    failed = [name for name in options.targets or TARGETS if not _in_process(name, options)]
    if failed:
        print(f"fuzz: {', '.join(failed)} failed", file=sys.stderr)
    return len(failed)


def _in_process(name: str, options: argparse.Namespace) -> bool:
    """Fuzz one target in a process of its own: libFuzzer ends the one it runs in."""
    command = [sys.executable, "-m", "fuzz", "--one", name]
    for option in ("seconds", "inputs", "seed"):
        command += [f"--{option}", str(getattr(options, option))]
    print(f"fuzz: {name}", flush=True)
    return subprocess.run(command, check=False).returncode == 0


def _fuzz_here(name: str, options: argparse.Namespace) -> None:
    import atheris

    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as scratch:
        known = Path(scratch, "corpus")
        shutil.copytree(target.folder, known)
        words = Path(scratch, "words")
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
        arguments = [
            "fuzz", str(known), f"-dict={words}", f"-max_total_time={options.seconds}",
            f"-max_len={MAX_INPUT_BYTES}", f"-artifact_prefix={os.getcwd()}/{name}-", "-timeout=10",
            "-print_final_stats=1", "-verbosity=0",
        ]  # fmt: skip
        if options.inputs:
            arguments.append(f"-runs={options.inputs}")
        if options.seed:
            arguments.append(f"-seed={options.seed}")
        atheris.instrument_all()
        atheris.Setup(arguments, target.run)
        atheris.Fuzz()


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    sys.exit(main())
