# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is known of xshmd's reliability is what commands found: `make reliability` runs them.

    python3 -m integration.reliability [ROW...] [--budget SECONDS]

Each row of docs/reliability.md is one command, what it said, how long it took and of which commit.
Rows that are not run keep what an earlier run found.  Returns 1 if a command failed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).resolve().parent.parent
CARD: Final = PROJECT / "docs" / "reliability.md"
LOGS: Final = PROJECT / "artefacts" / "reliability"
HEAD: Final = """\
# Report card

What `make reliability` found; every row can be made again by its command, and a failure by what it
prints (a seed, a sequence, a place). "Simulated" is the engine with its own xenstore client on the
verified model of Xen and a byte-level xenstored; the contract binds that model to real Xen 4.20.

| what | found | seconds | commit | command |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """A line of the card.

    Attributes:
        name: what it is called on the command line.
        what: what it shows, for people.
        command: words for make; `{budget}` is the budget in seconds.
        says: what of its output is the result; all that matches, in order.
    """

    name: str
    what: str
    command: str
    says: str = r"^=* ?(\d+ passed.*?) in [\d.]+s"

    def words(self, budget_s: float) -> list[str]:
        return self.command.format(budget=round(budget_s)).split()


ROWS: Final = (
    Row(
        "contract", "cases of the contract, on the model of both architectures",
        "unit TESTS=tests/test_contract_fake.py",
    ),
    *(
        Row(
            f"contract-{arch}", f"the same cases on real Xen, {arch}",
            f"contract ARCH={arch}", r"^(\d+ passed, \d+ failed)$",
        )
        for arch in ("arm64", "x86_64")
    ),
    *(
        Row(
            f"rings-{arch}", f"real Xen, {arch}: a guest rings as fast as it can; none is lost",
            f"rings ARCH={arch} RINGS=1000000", r"^(\d+ rings in .*)$",
        )
        for arch in ("arm64", "x86_64")
    ),
    *(
        Row(
            f"traces-{arch}", f"random calls answered by the model as by real Xen, {arch}",
            f"differential ARCH={arch} TRACES=1000:100",
        )
        for arch in ("arm64", "x86_64")
    ),
    Row("mutants", "the model broken in small ways: noticed by the contract", "mutants",
        r"^(\d+ mutants, .* caught)$"),
    Row("sweep", "simulated: a crash, an error and a cancellation at every step", "sweep"),
    Row("call-sites", "simulated: places where an error was injected", "call-sites",
        r"^(\d+ call sites, \d+ not struck)$"),
    Row("crashes", "simulated: a crash at every step of up to three operations, and in recoveries",
        "crashes CRASH_SECONDS={budget} CRASH_SHARE=0.5", r"^(\d+ sequences, .*) in \d+ s$"),
    Row("races", "simulated: a guest destroyed, crashed, rebooted, renamed at every step",
        "races RACE_SECONDS={budget}", r"^(\d+ sequences, .*) in \d+ s$"),
    Row("soak-simulated", "simulated: thirty days of guests that come and go",
        "soak-simulated SOAK_DAYS=30", r"^((?:\w+: \S+ a day)|(?:\d+ days, \d+ operations))"),
    Row("scale", "simulated: what the k-th of 500 guests and 1000 regions costs", "scale",
        r"^(.*(?:calls|messages) from .*)$"),
    *(
        Row(
            f"crash-on-xen-{arch}",
            f"real Xen, {arch}: killed before every effect of an operation",
            f"crash-on-xen ARCH={arch} CRASH_SECONDS={{budget}}", r"^(\d+ kills, \d+ failures)$",
        )
        for arch in ("arm64", "x86_64")
    ),
    *(
        Row(
            f"scale-on-xen-{arch}",
            f"real Xen, {arch}: what the k-th tiny guest and a recovery of k of them cost",
            f"scale-on-xen ARCH={arch}", r"^(.*(?:(?:calls|messages) from|pages lacking) .*)$",
        )
        for arch in ("arm64", "x86_64")
    ),
    *(
        Row(
            f"soak-{arch}",
            f"real Xen, {arch}: guests, regions, leases and daemons come and go; what is left",
            f"soak ARCH={arch} SOAK_SECONDS={{budget}}", r"^(\d+ s, \d+ operations .*)$",
        )
        for arch in ("arm64", "x86_64")
    ),
)  # fmt: skip


def run(row: Row, budget_s: float) -> tuple[bool, str]:
    """Run a row's command; return whether it went well, and its line of the card."""
    LOGS.mkdir(parents=True, exist_ok=True)
    words, began = row.words(budget_s), time.monotonic()
    log = LOGS / f"{row.name}.log"
    with log.open("w") as output:
        done = subprocess.run(
            ["make", "--no-print-directory", *words], cwd=PROJECT, stdout=output,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    found = re.findall(row.says, log.read_text(errors="replace"), re.MULTILINE)
    result = "; ".join(dict.fromkeys(found)) or "nothing was said"
    if done.returncode:
        result = f"**failed**: {result}"
    return done.returncode == 0, line(row, result, time.monotonic() - began, " ".join(words))


def line(row: Row, result: str, seconds: float, command: str) -> str:
    """A line of the card."""
    return f"| {row.what} | {result} | {seconds:.0f} | {commit()} | `make {command}` |"


def commit() -> str:
    """The commit at hand, with a plus if the tree is another; "?" where nothing can say."""
    if shutil.which("git") is None:
        return "?"
    words = ["git", "describe", "--always", "--dirty=+"]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "?"


def known(text: str) -> dict[str, str]:
    """The lines of a card, by what they show."""
    lines = (one for one in text.splitlines() if one.startswith("| "))
    return {one.split(" | ")[0].removeprefix("| "): one for one in lines}


def card(lines: dict[str, str]) -> str:
    """The card: what is known, in order."""
    return HEAD + "".join(f"{lines[row.what]}\n" for row in ROWS if row.what in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows and write the card."""
    parser = argparse.ArgumentParser(prog="python3 -m integration.reliability", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(row.name for row in ROWS))
    parser.add_argument("--budget", type=float, default=3600, help="seconds of those that take one")
    options = parser.parse_args(arguments)
    unknown = set(options.rows) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    failed = [row.name for row, well in _run_all(options.rows, options.budget) if not well]
    if failed:
        print(f"reliability: {', '.join(failed)} failed; see {LOGS}", file=sys.stderr)
    return 1 if failed else 0


def _run_all(names: list[str], budget_s: float) -> Iterator[tuple[Row, bool]]:
    for row in ROWS:
        if names and row.name not in names:
            continue
        well, text = run(row, budget_s)
        print(text, flush=True)
        lines = known(CARD.read_text()) if CARD.exists() else {}
        lines[row.what] = text
        CARD.write_text(card(lines))
        yield row, well


if __name__ == "__main__":
    sys.exit(main())
