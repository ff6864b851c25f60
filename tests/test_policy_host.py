# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is said of a host, by its Xen's version, command line and abilities."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from xshmd.machine import Arch, HostInfo
from xshmd.policy.host import Finding, Verdict, findings

GOOD = HostInfo(
    arch=Arch.X86_64,
    xen_version=(4, 21),
    xen_extra=".2",
    xen_command_line="dom0_mem=1024M scrub-domheap",
    has_hvm=True,
    has_hap=True,
    free_pages=1 << 18,
    total_pages=1 << 20,
)


def finding(topic: str, **changed: Any) -> Finding:
    (found,) = [
        each for each in findings(dataclasses.replace(GOOD, **changed)) if each.topic == topic
    ]
    return found


def test_a_good_host_has_nothing_to_mend() -> None:
    assert {found.verdict for found in findings(GOOD)} == {Verdict.OK}
    assert [found.hint for found in findings(GOOD)] == [""] * 6


@pytest.mark.parametrize(
    ("arch", "version", "verdict"),
    [
        (Arch.X86_64, (4, 17), Verdict.FAILED),
        (Arch.X86_64, (4, 18), Verdict.FAILED),
        (Arch.X86_64, (4, 19), Verdict.OK),
        (Arch.X86_64, (5, 0), Verdict.OK),
        (Arch.ARM64, (4, 17), Verdict.FAILED),
        (Arch.ARM64, (4, 18), Verdict.OK),
    ],
)
def test_the_first_xen_that_can(arch: Arch, version: tuple[int, int], verdict: Verdict) -> None:
    assert finding("Xen version", arch=arch, xen_version=version).verdict is verdict


@pytest.mark.parametrize(
    ("version", "extra", "verdict", "words"),
    [
        ((4, 18), ".5", Verdict.WARNING, "older than 4.18.6"),
        ((4, 18), ".6", Verdict.OK, "fixed"),
        ((4, 19), ".5", Verdict.WARNING, "older than 4.19.6"),
        ((4, 19), ".6", Verdict.OK, "fixed"),
        ((4, 20), ".3", Verdict.WARNING, "older than 4.20.4"),
        ((4, 20), ".3-pre", Verdict.WARNING, "older than 4.20.4"),
        ((4, 20), ".4-pre", Verdict.WARNING, "pre-release of 4.20.4"),
        ((4, 20), ".4", Verdict.OK, "fixed"),
        ((4, 20), ".4-debian", Verdict.OK, "fixed"),
        ((4, 20), ".5-pre", Verdict.OK, "fixed"),
        ((4, 20), ".10", Verdict.OK, "fixed"),
        ((4, 21), ".1", Verdict.WARNING, "older than 4.21.2"),
        ((4, 22), ".0", Verdict.OK, "fixed"),
        ((4, 22), ".0-rc3", Verdict.WARNING, "pre-release of 4.22.0"),
        ((4, 22), "-rc", Verdict.WARNING, "pre-release of 4.22"),
        ((4, 22), "-unstable", Verdict.WARNING, "pre-release of 4.22"),
        ((4, 23), "-unstable", Verdict.OK, "fixed"),
        ((5, 0), "", Verdict.OK, "fixed"),
        ((4, 17), ".9", Verdict.WARNING, "no longer"),
        ((4, 21), "", Verdict.WARNING, "older than"),
    ],
)
def test_the_security_fixes(
    version: tuple[int, int], extra: str, verdict: Verdict, words: str
) -> None:
    found = finding("Xen security fixes", xen_version=version, xen_extra=extra)
    assert (found.verdict, words in found.text) == (verdict, True), found.text
    assert (found.hint != "") or verdict is Verdict.OK
    assert "XSA-492" in found.text


def test_the_holes_named_are_those_of_the_architecture() -> None:
    assert "XSA-473" in finding("Xen security fixes", arch=Arch.ARM64, xen_extra=".0").text
    assert "XSA-480" in finding("Xen security fixes", arch=Arch.X86_64, xen_extra=".0").text


@pytest.mark.parametrize(
    ("changed", "word"),
    [({"has_hvm": False}, "no HVM"), ({"has_hap": False}, "no hardware-assisted paging")],
)
def test_guests_need_hvm_and_hap(changed: dict[str, bool], word: str) -> None:
    found = finding("guest types", **changed)
    assert found.verdict is Verdict.FAILED
    assert word in found.text


@pytest.mark.parametrize(
    ("arch", "command_line", "verdict", "words"),
    [
        (Arch.X86_64, "", Verdict.OK, "both work"),
        (Arch.ARM64, "", Verdict.OK, "Xen's build decides"),
        (Arch.ARM64, "xsm=dummy", Verdict.OK, "both work"),
        (Arch.ARM64, "xsm=silo", Verdict.OK, "grant regions are refused"),
        (Arch.X86_64, "xsm=dummy xsm=silo", Verdict.OK, "grant regions are refused"),
        (Arch.X86_64, "noxsm=silo", Verdict.OK, "both work"),
        (Arch.X86_64, "xsm=flask", Verdict.WARNING, "policy"),
        (Arch.X86_64, "xsm=other", Verdict.WARNING, "xsm=other"),
    ],
)
def test_the_security_module(arch: Arch, command_line: str, verdict: Verdict, words: str) -> None:
    found = finding("security module", arch=arch, xen_command_line=command_line)
    assert (found.verdict, words in found.text) == (verdict, True), found.text


@pytest.mark.parametrize(
    ("command_line", "verdict"),
    [
        ("scrub-domheap", Verdict.OK),
        ("a=b scrub-domheap=yes c", Verdict.OK),
        ("scrub-domheap=1", Verdict.OK),
        ("no-scrub-domheap scrub-domheap", Verdict.OK),
        ("no-scrub-domheap=0", Verdict.OK),
        ("", Verdict.WARNING),
        ("scrub-domheap=no", Verdict.WARNING),
        ("scrub-domheap=0", Verdict.WARNING),
        ("scrub-domheap no-scrub-domheap", Verdict.WARNING),
        ("bootscrub=scrub-domheap", Verdict.WARNING),
    ],
)
def test_scrubbing(command_line: str, verdict: Verdict) -> None:
    assert finding("memory scrubbing", xen_command_line=command_line).verdict is verdict


def test_free_memory() -> None:
    assert finding("free memory").text == "1024 MiB of 4096 MiB are free for regions and guests"
    assert finding("free memory", free_pages=100).verdict is Verdict.WARNING
