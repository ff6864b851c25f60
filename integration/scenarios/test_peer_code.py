# SPDX-License-Identifier: LGPL-2.1-or-later
"""The C code that guests may embed, and the relay, under sanitizers: a compiler, and no Xen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from integration.cache import Cache
from integration.sources import PROJECT
from integration.toolroot import ToolRoot

FLAGS = """-std=gnu11 -O1 -g -Wall -Wextra -Werror -fsanitize=address,undefined
    -fno-sanitize-recover=all -DXSHM_HYPERCALL=test_hypercall"""
ROUNDS = 200_000

# It has no machine, and is in the part of one all the same, so that it runs once.
pytestmark = [pytest.mark.alike, pytest.mark.usefixtures("arch")]


def test_it_keeps_its_word_and_survives_a_peer_that_lies(tmp_path: Path) -> None:
    tools = ToolRoot.get(Cache())
    binds = {PROJECT: "/rig/src", tmp_path: "/rig/out"}
    offered = "/rig/src/xshmd/resources/guest"
    check = "/rig/src/integration/guests/peer_check.c"
    tools.run(
        ["gcc", *FLAGS.split(), f"-I{offered}", "-o", "/rig/out/check", check,
         f"{offered}/xshm_peer.c"],
        binds=binds,
    )  # fmt: skip
    said = tools.run(["/rig/out/check", str(ROUNDS)], binds=binds, capture=True, timeout_s=600)
    messages, survived = said.split("\n")[:2]
    assert int(re.fullmatch(r"messages (\d+)", messages)[1]) > ROUNDS // 10  # type: ignore[index]
    assert survived == "survived"


def test_the_relay_holds_up_whoever_rings_without_end_and_nobody_else(tmp_path: Path) -> None:
    tools = ToolRoot.get(Cache())
    binds = {PROJECT: "/rig/src", tmp_path: "/rig/out"}
    tools.run(
        ["gcc", *FLAGS.split(), "-Wno-unused-function", "-I/rig/src/xshmd/xen/c",
         "-o", "/rig/out/check", "/rig/src/integration/relay_check.c"],
        binds=binds,
    )  # fmt: skip
    said = tools.run(["/rig/out/check"], binds=binds, capture=True)
    assert re.fullmatch(r"flood \d+ calm \d+\n", said)


def test_the_documented_example_compiles(tmp_path: Path) -> None:
    tools = ToolRoot.get(Cache())
    text = (PROJECT / "docs/doorbells.md").read_text()
    example = re.search(r"^```c\n(.*?)^```", text, re.M | re.S)[1]  # type: ignore[index]
    page, struct, loop = re.split(r"\n(?=struct)|\n\n(?=if)", example)
    guest = f"void guest(void);\nvoid guest(void)\n{{\n{struct}\n{loop}}}\n"
    (tmp_path / "example.c").write_text(f'#include "xshm_peer.h"\n{page}\n{guest}')
    binds = {PROJECT: "/rig/src", tmp_path: "/rig/out"}
    offered = "-I/rig/src/xshmd/resources/guest"
    tools.run(["gcc", *FLAGS.split(), offered, "-fsyntax-only", "/rig/out/example.c"], binds=binds)


def test_it_is_as_short_as_it_promises() -> None:
    offered = PROJECT / "xshmd/resources/guest"
    files = [offered / name for name in ("xshm_peer.c", "xshm_peer.h")]
    assert sum(len(file.read_text().splitlines()) for file in files) < 600
