# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a machine and its Xen mean for the promises xshmd makes: facts in, findings out.

The limits are those of the security review (reference: security.md F1, F6, sections 3 and 5).
"""

from __future__ import annotations

import dataclasses
import enum
import re
from typing import Final

from xshmd.machine import Arch, HostInfo
from xshmd.units import PAGE_SIZE, human_size

FIRST_XEN: Final = {Arch.X86_64: (4, 19), Arch.ARM64: (4, 18)}
"""The first Xen that maps a foreign page into an HVM/PVH guest at dom0's request (F1)."""
PATCH_FLOOR: Final = {(4, 18): 6, (4, 19): 6, (4, 20): 4, (4, 21): 2, (4, 22): 0}
"""By minor version, the first release with every fix of XSAS (F6); newer minors have them all."""
XSAS: Final = {
    Arch.X86_64: ("XSA-480", "XSA-491", "XSA-492", "XSA-506"),
    Arch.ARM64: ("XSA-473", "XSA-491", "XSA-492", "XSA-506"),
}
"""Holes a member's kernel could reach through its privilege over the holder (F6)."""
FIRST_NARROW_XEN: Final = (4, 21)
"""From here on x86 no longer lets a member flush the caches of the whole host at will."""
LOW_MEMORY_BYTES: Final = 32 * 1024 * 1024

_EXTRA: Final = re.compile(r"\.(\d+)(.*)", re.DOTALL)
_UNRELEASED: Final = re.compile(r"-?(pre|rc|unstable)")
_NO: Final = ("no", "off", "false", "disable", "0")


class Verdict(enum.StrEnum):
    """How a check of the host came out."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing about the host that bears on what can be promised."""

    topic: str
    verdict: Verdict
    text: str
    hint: str = ""


def findings(host: HostInfo) -> tuple[Finding, ...]:
    """Return what the facts about a host mean, most important first."""
    return (
        _version(host),
        _patches(host),
        _paging(host),
        _xsm(host),
        _scrubbing(host),
        _memory(host),
    )


def _version(host: HostInfo) -> Finding:
    first = FIRST_XEN[host.arch]
    if host.xen_version < first:
        return Finding(
            topic="Xen version",
            verdict=Verdict.FAILED,
            text=f"Xen {host.xen_text} cannot map memory of one guest into another on {host.arch}",
            hint=f"use Xen {first[0]}.{first[1]} or later",
        )
    return Finding(
        topic="Xen version", verdict=Verdict.OK, text=f"Xen {host.xen_text} on {host.arch}"
    )


def _patches(host: HostInfo) -> Finding:
    topic = "Xen security fixes"
    minor_floor = PATCH_FLOOR.get(host.xen_version)
    name = f"{host.xen_version[0]}.{host.xen_version[1]}"
    xsas = ", ".join(XSAS[host.arch])
    if minor_floor is None:
        if host.xen_version > max(PATCH_FLOOR):
            return Finding(topic=topic, verdict=Verdict.OK, text=f"Xen {name} has {xsas} fixed")
        return Finding(
            topic=topic,
            verdict=Verdict.WARNING,
            text=f"Xen {name} no longer gets security fixes, and needs those of {xsas}",
            hint="use a Xen that is still maintained",
        )
    floor = f"{name}.{minor_floor}"
    match = _EXTRA.match(host.xen_extra)
    patch = int(match[1]) if match else -1
    unreleased = bool(_UNRELEASED.match(match[2] if match else host.xen_extra))
    if patch > minor_floor or (patch == minor_floor and not unreleased):
        return _patched(topic, host, xsas)
    if patch == minor_floor or (not match and unreleased):
        return Finding(
            topic=topic,
            verdict=Verdict.WARNING,
            text=f"Xen {host.xen_text} is a pre-release of {floor if match else name}: "
            f"it may lack some of the fixes for {xsas}",
            hint=f"look for them in the changelog of its package, or use {floor} itself",
        )
    return Finding(
        topic=topic,
        verdict=Verdict.WARNING,
        text=f"Xen {host.xen_text} is older than {floor}, the first with all of {xsas} fixed",
        hint=f"update to {floor} or later, or look for the fixes in the changelog of its package",
    )


def _patched(topic: str, host: HostInfo, xsas: str) -> Finding:
    wide = host.arch is Arch.X86_64 and host.xen_version < FIRST_NARROW_XEN
    narrow = f"{FIRST_NARROW_XEN[0]}.{FIRST_NARROW_XEN[1]}"
    return Finding(
        topic=topic,
        verdict=Verdict.OK,
        text=f"Xen {host.xen_text} has {xsas} fixed",
        hint=f"{narrow} or later leaves a member's kernel fewer ways to slow the host down"
        if wide
        else "",
    )


def _paging(host: HostInfo) -> Finding:
    missing = [
        name
        for name, there in (("HVM", host.has_hvm), ("hardware-assisted paging", host.has_hap))
        if not there
    ]
    if missing:
        return Finding(
            topic="guest types",
            verdict=Verdict.FAILED,
            text=f"this machine or its Xen has no {' and no '.join(missing)}",
            hint="enable VT-x with EPT, or AMD-V with NPT, in the firmware"
            if host.arch is Arch.X86_64
            else "boot Xen at EL2",
        )
    return Finding(
        topic="guest types",
        verdict=Verdict.OK,
        text="HVM and PVH guests with hardware-assisted paging can be made",
    )


def security_module(host: HostInfo) -> str:
    """Return the name of Xen's security module: what its command line says, or its usual choice.

    On Arm that is silo (xen/common/Kconfig), on x86 dummy; a Xen that was configured otherwise
    can be told on its command line.
    """
    usual = "silo" if host.arch is Arch.ARM64 else "dummy"
    return _value_of(host.xen_command_line, "xsm") or usual


def _xsm(host: HostInfo) -> Finding:
    topic = "security module"
    chosen = _value_of(host.xen_command_line, "xsm")
    if chosen == "flask":
        return Finding(
            topic=topic,
            verdict=Verdict.WARNING,
            text="xsm=flask: what physmap and grant regions may do is up to the loaded policy",
            hint="let the policy allow dom0 to create holders, to set them as target and to map "
            "their pages into members",
        )
    if chosen == "silo":
        return Finding(
            topic=topic,
            verdict=Verdict.OK,
            text="xsm=silo: physmap regions work, across a wall that silo otherwise keeps between "
            "guests; grant regions are refused, as a guest may map grants of dom0 alone",
            hint="say xsm=dummy on Xen's command line to have grants between guests",
        )
    if chosen == "dummy" or (not chosen and host.arch is Arch.X86_64):
        return Finding(
            topic=topic,
            verdict=Verdict.OK,
            text=f"{'xsm=dummy' if chosen else 'no xsm= given'}: "
            "physmap and grant regions both work",
        )
    if not chosen:
        return Finding(
            topic=topic,
            verdict=Verdict.OK,
            text="no xsm= given, so Xen's build decides (Debian's arm64 build: silo): physmap "
            "regions work either way; grant regions are refused, as under silo a guest may map "
            "grants of dom0 alone",
            hint="say xsm=dummy on Xen's command line to have grants between guests",
        )
    return Finding(
        topic=topic,
        verdict=Verdict.WARNING,
        text=f"xsm={chosen} is not a module xshmd knows",
        hint="known are dummy, silo and flask",
    )


def _scrubbing(host: HostInfo) -> Finding:
    topic = "memory scrubbing"
    if _is_set(host.xen_command_line, "scrub-domheap"):
        return Finding(
            topic=topic, verdict=Verdict.OK, text="Xen scrubs every page that a guest gives back"
        )
    return Finding(
        topic=topic,
        verdict=Verdict.WARNING,
        text="Xen does not scrub pages that a living domain gives back; xshmd wipes those it can "
        "still reach, but not one that a member keeps mapped longer",
        hint="say scrub-domheap on Xen's command line",
    )


def _memory(host: HostInfo) -> Finding:
    text = (
        f"{_about(host.free_bytes)} of {_about(host.total_pages * PAGE_SIZE)} "
        "are free for regions and guests"
    )
    if host.free_bytes < LOW_MEMORY_BYTES:
        return Finding(
            topic="free memory",
            verdict=Verdict.WARNING,
            text=text,
            hint="give dom0 less with dom0_mem= on Xen's command line or xl mem-set 0",
        )
    return Finding(topic="free memory", verdict=Verdict.OK, text=text)


def _about(size_bytes: int) -> str:
    """Say a size in whole MiB, which is all that a changing figure is good for."""
    return human_size(size_bytes).split(" + ")[0] if size_bytes < 1 << 20 else _mib(size_bytes)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB"


def _value_of(command_line: str, option: str) -> str:
    """Return the value an option has on Xen's command line: the last counts; empty if none."""
    value = ""
    for word in command_line.split():
        name, _, given = word.partition("=")
        if name == option:
            value = given
    return value


def _is_set(command_line: str, option: str) -> bool:
    """Return what a boolean option is set to, by the rules of Xen's ``parse_boolean``."""
    value = False
    for word in command_line.split():
        name, has_value, given = word.partition("=")
        if name == option:
            value = not has_value or given not in _NO
        elif name == f"no-{option}":
            value = bool(has_value) and given in _NO
    return value
