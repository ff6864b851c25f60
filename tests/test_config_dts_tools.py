# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is said where dtc or libfdt is missing, or fails; these tests need neither."""

import sys
from pathlib import Path

import pytest

from xshmd.config import devicetree_blob
from xshmd.config.devicetree import read_devicetree
from xshmd.errors import ConfigUnreadable

BLOB = b"\xd0\x0d\xfe\xed" + bytes(60)
SOURCE = b"/dts-v1/; / { };"


def refuse(data: bytes) -> ConfigUnreadable:
    with pytest.raises(ConfigUnreadable) as caught:
        read_devicetree(data, file="host.dts")
    error = caught.value
    assert error.message.startswith("host.dts")
    assert error.message.isprintable()
    assert error.facts["file"] == "host.dts"
    return error


@pytest.fixture
def dtc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dtc of the test's own, the only program there is but the shell's."""
    program = tmp_path / "dtc"
    monkeypatch.setenv("PATH", str(tmp_path))
    return program


def write(program: Path, text: str) -> None:
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)


def test_without_libfdt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libfdt", None)
    error = refuse(BLOB)
    assert error.message == "host.dts: no device tree can be read here"
    assert error.hint == "install python3-libfdt"


def test_without_dtc(dtc: Path) -> None:
    error = refuse(SOURCE)
    assert "dtc to compile it cannot be run: No such file" in error.message
    assert "install device-tree-compiler" in error.hint


def test_a_dtc_that_may_not_be_run(dtc: Path) -> None:
    dtc.write_bytes(b"")
    assert "cannot be run: Permission denied" in refuse(SOURCE).message


def test_dtc_takes_too_long(dtc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devicetree_blob, "_DTC_SECONDS", 0.2)
    write(dtc, "while :; do :; done")
    error = refuse(SOURCE)
    assert error.message == "host.dts: dtc did not compile it in 0.2 s"


def test_dtc_dies(dtc: Path) -> None:
    write(dtc, "kill -SEGV $$")
    assert "it ended with status -11" in refuse(SOURCE).message


def test_dtc_has_limits_before_it_has_the_source(dtc: Path) -> None:
    write(dtc, 'read -r line; echo "limits: $(ulimit -v) $(ulimit -f) $(ulimit -c)" >&2')
    assert "limits: 524288 16384 0" in refuse(SOURCE + b"\n").message


def test_dtc_that_floods_us_is_stopped(dtc: Path) -> None:
    write(dtc, 'while :; do echo "0123456789012345678901234567890123456789" >&2 || exit 9; done')
    assert "0123456789" in refuse(SOURCE).message


def test_what_dtc_says_is_made_printable(dtc: Path) -> None:
    write(dtc, r"printf 'Error: <stdin>:7.1-2 \033[1m odd\n' >&2; exit 1")
    error = refuse(SOURCE)
    assert error.message.startswith("host.dts:7: ")
    assert r"\x1b[1m odd" in error.message


def test_dtc_that_says_nothing(dtc: Path) -> None:
    write(dtc, "exit 0")
    assert "it ended with status 0" in refuse(SOURCE).message


@pytest.mark.parametrize(
    ("source", "line", "what"),
    [
        (b'/dts-v1/;\n/include/ "/etc/passwd"\n', 2, "/include/"),
        (b'/dts-v1/; / { a =\n/incbin/("/etc/passwd"); };', 2, "/incbin/"),
        (b'/dts-v1/;\n\n  #include "board.dtsi"\n', 3, "#include"),
        (b'/dts-v1/;\n# include <board.dtsi>\n', 2, "# include"),
    ],
)  # fmt: skip
def test_no_other_file_is_read(source: bytes, line: int, what: str) -> None:
    error = refuse(source)
    assert error.message.startswith(f"host.dts:{line}: {what}: other files are not read")
    assert "dtc" in error.hint


def test_a_source_with_a_nul_byte() -> None:
    error = refuse(SOURCE + b"\n\0" + SOURCE)
    assert error.message == "host.dts:2: it is no device tree blob, and a source has no NUL byte"


def test_the_largest_tree() -> None:
    error = refuse(SOURCE + b" " * devicetree_blob.MAX_BYTES)
    assert "more than the 2097152 of the largest device tree" in error.message
