# SPDX-License-Identifier: LGPL-2.1-or-later
"""The setting ``static_shm`` of an xl configuration: one string, one region of one guest.

An entry may be written in any of three published forms (:mod:`xshmd.config.entry_forms`) and is
read by :mod:`xshmd.config.entry`; we always write the final one:

    ``id=ID, begin=BYTES, size=BYTES, role=owner|borrower``

and, if wanted, ``offset`` (borrowers), ``prot``, ``cache_policy`` (owners).  Of our own, for what
the published syntax cannot say: ``begin`` may be left out (a safe frame is chosen, see
:mod:`xshmd.policy.placement`), a borrower may leave out ``size`` (to the region's end), and an
owner may say ``lifetime=owner|members|system``, ``transport=physmap|grant``,
``isolation=group|sealed|region``, ``prot_enforcement=required|advisory``, ``doorbells=PEERS`` and
``doorbell_route=auto|relayed``
(:class:`xshmd.model.RegionTerms`).
"""

from __future__ import annotations

from typing import Final

from xshmd.config.entry import Entry
from xshmd.config.entry_forms import KEY, OLD_KEY
from xshmd.config.entry_values import EXAMPLE
from xshmd.config.findings import config_error
from xshmd.config.xlcfg import XlSetting, XlString
from xshmd.errors import ConfigError
from xshmd.model import (
    UNPLACED,
    WHOLE_REGION,
    DoorbellRoute,
    Place,
    ProtEnforcement,
    RegionRequest,
    Role,
    Transport,
)
from xshmd.units import address_of, bytes_of

__all__ = ["EXAMPLE", "KEY", "KEYS", "OLD_KEY", "parse_entry", "render_entry", "requests"]

KEYS: Final = (KEY, OLD_KEY)
"""The keys of a configuration that are about us; both may be there."""
ENOUGH_ERRORS: Final = 100
"""After so many the rest of a list is not read: it is no list of ours, or one mistake is in all."""


def requests(
    setting: XlSetting, file: str, errors: list[ConfigError], *, key: str = KEY
) -> tuple[RegionRequest, ...]:
    """Read the value of ``static_shm``.

    Args:
        setting: What the configuration has for the key.
        file: What messages call the configuration.
        errors: Every broken rule is appended here, up to some hundred; the entry it is in is then
            left out.
        key: Which of :data:`KEYS` it is; the older one has entries of the older form.
    """
    if isinstance(setting.value, XlString):
        place = Place(file=file, key=key, line=setting.line)
        hint = f'write {KEY} = [ "{EXAMPLE}" ]'
        errors.append(
            config_error(place, f"{key} is a string, not a list", hint=hint, rule="not-a-list")
        )
        return ()
    found: list[RegionRequest] = []
    for index, item in enumerate(setting.value.items):
        place = Place(file=file, key=f"{key}[{index}]", line=item.line)
        if len(errors) >= ENOUGH_ERRORS:
            left = len(setting.value.items) - index
            what = f"this entry and the {left - 1} after it are not read: too much is wrong before"
            errors.append(config_error(place, what, hint="mend that first", rule="too-much-wrong"))
            break
        if not isinstance(item, XlString):
            what, hint = "the entry is a list, not a string", f'write it as "{EXAMPLE}"'
            errors.append(config_error(place, what, hint=hint, rule="not-a-string"))
            continue
        request = parse_entry(item.text, place, errors, key=key)
        if request is not None:
            found.append(request)
    return tuple(found)


def parse_entry(
    text: str, place: Place, errors: list[ConfigError], *, key: str = KEY
) -> RegionRequest | None:
    """Read one entry; return None if anything was wrong, each thing of which is in ``errors``."""
    entry = Entry(text, place, key)
    request = entry.request()
    errors.extend(entry.errors)
    return None if entry.errors else request


def render_entry(request: RegionRequest) -> str:
    """Write the entry that :func:`parse_entry` reads as ``request``.

    The entry of a region that is backed by host memory does not say so: xl's syntax cannot.
    """
    parts = [f"id={request.region_id}"]
    if request.first_gfn != UNPLACED:
        parts.append(f"begin={address_of(request.first_gfn):#x}")
    if request.nr_frames != WHOLE_REGION:
        parts.append(f"size={request.size_bytes:#x}")
    parts.append(f"role={request.role}")
    if request.offset_frames:
        parts.append(f"offset={bytes_of(request.offset_frames):#x}")
    parts.append(f"prot={request.prot}")
    if request.cache_policy is not None:
        parts.append(f"cache_policy={request.cache_policy}")
    if request.role is Role.OWNER:
        parts += _terms_in_words(request)
    return ", ".join(parts)


def _terms_in_words(request: RegionRequest) -> list[str]:
    terms = request.terms
    parts = []
    if terms.lifetime is not None:
        parts.append(f"lifetime={terms.lifetime}")
    if terms.transport is not Transport.PHYSMAP:
        parts.append(f"transport={terms.transport}")
    if terms.isolation is not None:
        parts.append(f"isolation={terms.isolation}")
    if terms.prot_enforcement is not ProtEnforcement.REQUIRED:
        parts.append(f"prot_enforcement={terms.prot_enforcement}")
    if terms.doorbells:
        parts.append(f"doorbells={terms.doorbells}")
    if terms.doorbell_route is not DoorbellRoute.AUTO:
        parts.append(f"doorbell_route={terms.doorbell_route}")
    return parts
