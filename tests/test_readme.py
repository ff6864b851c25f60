# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the README shows works as it is shown."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import pytest

from xshmd.config.guest import guest_config
from xshmd.ctl.__main__ import main
from xshmd.ctl.args import parse
from xshmd.machine import Arch
from xshmd.policy.rules import check_config
from xshmd.vhost_user.backend import Backend

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
WORDS = {
    "GUEST": "ctl", "ID": "r0", "CFG": "/etc/xen/ctl.cfg", "FILE": "x.cfg",
    "ENTRY": "id=r0,begin=0x3a000000,size=4096,role=borrower", "[xl arguments]": "vcpus=2",
    "...": "", "[": "", "]": "",
    "serve|connect SOCKET": "serve /run/x.sock",
}  # fmt: skip


def test_the_regions_of_the_first_page_may_be_had() -> None:
    blocks = re.findall(r"# in /etc/xen/(\w+)\.cfg\n +(static_shm = .*)\n", README)
    assert [name for name, _ in blocks] == ["sensor", "control"]
    for name, entry in blocks:
        text = f'name = "{name}"\ntype = "pvh"\nmemory = 16\n{entry}\n'
        config = guest_config(text, file="README.md", arch=Arch.ARM64)
        assert check_config(config, Arch.ARM64) == ()
        assert config.requests[0].region_id == "frames"


def test_toml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        named = re.match(r"# /etc/xshmd/(\S+)\n", block)
        file = tmp_path / (named[1] if named else f"example-{number}.toml")
        file.write_text(block)
        assert main(["check", "--arch", "arm64", str(file)]) == 0, capsys.readouterr().err


def test_every_command_line_is_one() -> None:
    lines = re.findall(r"^    xshmctl (.*?)(?:  .*)?$", README, re.MULTILINE)
    assert len(lines) > 12
    for line in lines:
        for choice in _choices(line):
            for word, value in WORDS.items():
                choice = choice.replace(word, value)
            assert parse(shlex.split(choice)).verb == choice.split()[0]


def _choices(line: str) -> list[str]:
    """``check | convert FILE`` stands for two."""
    first, *others = line.split(" | ")
    if not others:
        return [first]
    rest = others[-1].split(maxsplit=1)[1]
    verbs = [first, *(other.split()[0] for other in others)]
    return [f"{verb} {'--to toml ' if verb == 'convert' else ''}{rest}" for verb in verbs]


def test_every_make_target_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    shown = set(re.findall(r"(?:^    |`)make ([a-z-]+)", README, re.MULTILINE))
    assert shown
    assert shown <= targets


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_backend_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is run as it stands, until it would wait."""
    text = (ROOT / "docs/vhost-user.md").read_text()
    pattern = r"^    from pathlib.*?backend\.run\(\)\n"
    (code,) = re.findall(pattern, text, re.MULTILINE | re.DOTALL)
    served: list[Backend] = []
    monkeypatch.setattr(Backend, "run", lambda self: served.append(self))
    program = textwrap.dedent(code).replace("/run/", f"{tmp_path}/")
    exec(compile(program, "docs/vhost-user.md", "exec"), {})
    (backend,) = served
    assert (tmp_path / "shouter.sock").is_socket()
    backend.close()


def test_the_command_lines_of_the_documentation() -> None:
    text = (ROOT / "docs/vhost-user.md").read_text().replace("\\\n", "")
    lines = re.findall(r"^    xshmctl (.*)$", text, re.MULTILINE)
    assert [parse(shlex.split(line)).guest for line in lines] == ["sensor"]
