# SPDX-License-Identifier: LGPL-2.1-or-later
"""The man pages say what there is: every verb, option, key and status; and their examples work."""

from __future__ import annotations

import importlib.resources
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from xshmd import errors
from xshmd.config import host_policy, static_shm, toml
from xshmd.config.entry_forms import FORMS_OF_KEY, Form
from xshmd.ctl import args, verbs
from xshmd.ctl.__main__ import main
from xshmd.daemon import __main__ as daemon_main
from xshmd.errors import UsageError
from xshmd.varlink.client import DEFAULT_PATH

FOLDER = importlib.resources.files("xshmd").joinpath("resources/man")
PAGES = {page.name: page.read_text(encoding="utf-8") for page in FOLDER.iterdir()}
COMMON = {"--json", "-j", "--no-legend", "--socket", "--help", "-h"}


def plain(roff: str) -> str:
    """Take the markup away that would stand between words."""
    return re.sub(r"\\f[RBI]", "", roff).replace(r"\-", "-").replace(r"\(dq", '"')


def tagged(roff: str) -> list[str]:
    """Return the line below each .TP, without markup: what the paragraph explains."""
    lines = [plain(line) for line in re.findall(r"^\.TP\n\.?(?:[BI]+ )?(.*)$", roff, re.M)]
    return [line.replace('" "', " ").replace('"', "") for line in lines]


def options_in(roff: str) -> set[str]:
    return {
        word for line in tagged(roff) for word in re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", line)
    }


def sections(page: str, macro: str) -> dict[str, str]:
    """Return the text of each section, by the first word of its title."""
    parts = re.split(rf"^\.{macro} (.*)$", PAGES[page], flags=re.M)[1:]
    return dict(zip((plain(title).strip('"') for title in parts[::2]), parts[1::2], strict=True))


def test_there_are_four_pages() -> None:
    assert set(PAGES) == {"xshmctl.1", "xshmd.8", "xshmd.toml.5", "xshm-regions.7"}


@pytest.mark.parametrize("page", PAGES)
def test_the_form(page: str) -> None:
    text = PAGES[page]
    name, _, section = page.rpartition(".")
    assert re.search(rf"^\.TH {re.escape(name.upper())} {section} ", plain(text), re.M)
    assert re.search(rf"^\.SH NAME\n{re.escape(name)} - \S", plain(text), re.M)
    assert [c for c in text if not c.isascii()] == []
    for other, number in re.findall(r"^\.BR (xsh\S+) \((\d)\)", plain(text), re.M):
        assert f"{other}.{number}" in PAGES


def examples(kind: str) -> Iterator[str]:
    for text in PAGES.values():
        pattern = rf'^\.\\" example: {kind}\n\.EX\n(.*?)^\.EE$'
        for block in re.findall(pattern, text, re.M | re.S):
            yield plain(block)


MACROS = {".TH", ".SH", ".SS", ".TP", ".PP", ".IP", ".RS", ".RE", ".EX", ".EE", ".B", ".I", ".br"}
FONTS = {f".{one}{other}" for one in "BRI" for other in "BRI" if one != other}


@pytest.mark.parametrize("page", PAGES)
def test_the_markup(page: str) -> None:
    lines = PAGES[page].splitlines()
    used = {line.split()[0] for line in lines if line.startswith(".")}
    assert used <= MACROS | FONTS | {'.\\"'}
    for opens, closes in ((".EX", ".EE"), (".RS", ".RE")):
        assert lines.count(opens) == lines.count(closes)
    bare = re.sub(r"^\.EX\n.*?^\.EE\n", "", PAGES[page], flags=re.M | re.S)
    assert [line for line in lines if line != line.rstrip()] == []
    assert "\n\n" not in bare


def groff_says(page: str) -> str:
    done = subprocess.run(
        ["groff", "-man", "-ww", "-z", "-Tutf8"],
        input=PAGES[page], capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stderr


if shutil.which("groff"):  # no dependency: what it would find is in the two tests above as well

    @pytest.mark.parametrize("page", PAGES)
    def test_groff_has_nothing_to_say(page: str) -> None:
        assert groff_says(page) == ""


def test_every_verb_has_its_section() -> None:
    documented = [title.split()[0] for title in sections("xshmctl.1", "SS")]
    assert documented == list(verbs.VERBS)


@pytest.mark.parametrize("verb", verbs.VERBS)
def test_the_options_of_a_verb_are_those_it_has(verb: str) -> None:
    _, parsers = args.parsers([verb])
    real = {
        option
        for action in parsers[verb]._actions
        if action.help != "==SUPPRESS=="
        for option in action.option_strings
    }
    verb_sections = {t.split()[0]: text for t, text in sections("xshmctl.1", "SS").items()}
    text = verb_sections[verb].partition(".SH ")[0]
    assert options_in(text) == real - COMMON


@pytest.mark.parametrize("verb", ["check", "convert", "vhost-user"])
def test_every_value_of_a_choice_is_explained(verb: str) -> None:
    _, parsers = args.parsers([verb])
    text = {t.split()[0]: text for t, text in sections("xshmctl.1", "SS").items()}[verb]
    words = set(re.findall(r"[\w-]+", plain(text)))
    for action in parsers[verb]._actions:
        if action.choices and not COMMON & set(action.option_strings):
            assert set(map(str, action.choices)) <= words


def test_the_common_options_are_those_there_are() -> None:
    assert options_in(sections("xshmctl.1", "SH")["OPTIONS"]) == COMMON | {"--version"}


def test_the_daemons_options_are_those_it_has() -> None:
    real = {o for a in daemon_main._parser()._actions for o in a.option_strings}
    assert options_in(sections("xshmd.8", "SH")["OPTIONS"]) == real


def test_every_exit_status_is_explained() -> None:
    said = {int(line) for line in tagged(sections("xshmctl.1", "SH")["EXIT STATUS"])}
    real = {cls.exit_status for cls in errors.all_errors()}
    assert said == real | {0, 130}


@pytest.mark.parametrize(
    ("title", "keys"),
    [
        ("[region.ID]", set(toml.REGION_KEYS) - {"guest"}),
        ("[region.ID.guest.NAME]", set(toml.MEMBER_KEYS)),
        ("[guest.NAME]", set(toml.GUEST_KEYS)),
        ("[limits]", {*host_policy.COUNTS, *host_policy.SIZES, *host_policy.TIMES}),
        ("[allow.NAME]", set(host_policy.ALLOW_KEYS)),
    ],
)
def test_every_key_of_toml_is_explained(title: str, keys: set[str]) -> None:
    text = sections("xshmd.toml.5", "SH")[title]
    assert {key for line in tagged(text) for key in line.split(", ")} == keys


def test_every_key_that_an_entry_shows_is_explained() -> None:
    text = sections("xshm-regions.7", "SH")["REGIONS IN XL.CFG"]
    explained = {key for line in tagged(text) for key in line.split(", ")}
    assert {key for key, _ in re.findall(r"(\w+)=(\w+)", static_shm.EXAMPLE)} <= explained
    assert {key for key, forms in FORMS_OF_KEY.items() if Form.FINAL in forms} <= explained


def test_the_socket_is_where_it_is() -> None:
    assert DEFAULT_PATH == verbs.DEFAULT_SOCKET
    for page in ("xshmctl.1", "xshmd.8"):
        assert DEFAULT_PATH in PAGES[page]


def test_every_example_says_what_it_is() -> None:
    for page, text in PAGES.items():
        assert text.count("\n.EX\n") == len(
            re.findall(r'^\.\\" example: \w+\n\.EX$', text, re.M)
        ), page


@pytest.mark.parametrize("kind", ["xl", "toml"])
def test_the_examples_hold(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ending = {"xl": "cfg", "toml": "toml"}[kind]
    files = []
    for number, text in enumerate(examples(kind)):
        files.append(tmp_path / f"example{number}.{ending}")
        files[-1].write_text(text)
    assert len(files) >= 2
    # Guests of TOML files are checked one file at a time: the examples are not of one machine.
    for together in [files] if kind == "xl" else [[file] for file in files]:
        status = main(["check", "--arch", "x86_64", *map(str, together)])
        assert status == 0, capsys.readouterr()


def test_the_example_of_limits_holds(tmp_path: Path) -> None:
    (text,) = examples("policy")
    (tmp_path / host_policy.NAME).write_text(text)
    assert main(["check", str(tmp_path / host_policy.NAME)]) == 0
    policy = host_policy.read_policy(text.encode(), file="example")
    assert [one.name for one in policy.allowed] == ["control", "video"]


COMMANDS = [line for block in examples("command") for line in block.splitlines() if line]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_examples_of_commands(line: str) -> None:
    words = shlex.split(re.split(r"[<>|]", line)[0])
    assert words.pop(0) == "xshmctl"
    options = args.parse(words)
    for text in getattr(options, "entries", ()):
        from xshmd.ctl.changes import _entries

        assert _entries([text])[0]["region"] == "frames"


def test_a_wrong_example_would_be_seen() -> None:
    assert len(COMMANDS) >= 8
    with pytest.raises(UsageError):
        args.parse(["attach", "--nonsense", "a", "b"])


def test_an_installation_has_every_page_where_man_looks() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    placed = project["tool"]["setuptools"]["data-files"]
    for page in PAGES:
        assert f"xshmd/resources/man/{page}" in placed[f"share/man/man{page[-1]}"]
    completions = placed["share/bash-completion/completions"]
    assert completions == ["xshmd/resources/completion/xshmctl"]
