# SPDX-License-Identifier: LGPL-2.1-or-later
"""The entries of ``static_shm`` in an xl configuration: one string, one region of one guest.

The syntax is the last one published for xl (``docs/man/xl-static-shm-configuration.pod.5`` in
Xilinx's Xen): ``id=ID, begin=BYTES, size=BYTES, role=owner|borrower`` and, if wanted, ``offset``,
``prot`` and ``cache_policy``.  ``master|slave`` are the older words for the roles.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from xshmd.config.findings import config_error
from xshmd.config.xlcfg import XlSetting, XlString, shown
from xshmd.errors import ConfigError
from xshmd.model import (
    MAX_REGION_ID_LENGTH,
    CachePolicy,
    Place,
    Prot,
    RegionRequest,
    Role,
)
from xshmd.units import PAGE_SIZE, address_of, bytes_of, frames_of, gfn_of, human_size

KEY: Final = "static_shm"
OLD_KEY: Final = "static_shared_mem"
"""What the first proposal (2017) called it; its entries have another syntax."""

EXAMPLE: Final = '"id=ID1, begin=0x3a000000, size=0x100000, role=owner"'

_T = TypeVar("_T")

_KEYS: Final = ("id", "begin", "size", "role", "offset", "prot", "cache_policy")
_NEEDED: Final = {
    "id": "name the region, as in id=ID1",
    "begin": "say at which guest-physical address it appears, in bytes",
    "size": "say how large it is, in bytes",
    "role": "say role=owner in the one guest that defines the region, role=borrower in the others",
}
_FORMER: Final = {
    "end": "the form with 'end' is older: say size, in bytes",
    "granularity": "the granularity is always 4096 bytes: leave it out",
    "gran": "the granularity is always 4096 bytes: leave it out",
}
_ROLES: Final = {
    "owner": Role.OWNER, "borrower": Role.BORROWER,
    "master": Role.OWNER, "slave": Role.BORROWER,
}  # fmt: skip
_PROTS: Final = {prot.value: prot for prot in Prot}
_POLICIES: Final = {policy.value: policy for policy in CachePolicy}
_ID: Final = re.compile(r"[_a-zA-Z0-9]+")
_NUMBER: Final = re.compile(r"0[xX][0-9a-fA-F]+|0|[1-9][0-9]*")
_ADDRESS_LIMIT: Final = 1 << 64


def requests(setting: XlSetting, file: str, errors: list[ConfigError]) -> tuple[RegionRequest, ...]:
    """Read the value of ``static_shm``.

    Args:
        setting: What the configuration has for :data:`KEY`.
        file: What messages call the configuration.
        errors: Every broken rule is appended here; the entry it is in is then left out.
    """
    if isinstance(setting.value, XlString):
        place = Place(file=file, key=KEY, line=setting.line)
        hint = f"write {KEY} = [ {EXAMPLE} ]"
        errors.append(config_error(place, f"{KEY} is a string, not a list", hint=hint))
        return ()
    found: list[RegionRequest] = []
    for index, item in enumerate(setting.value.items):
        place = Place(file=file, key=f"{KEY}[{index}]", line=item.line)
        if not isinstance(item, XlString):
            what = "the entry is a list, not a string"
            errors.append(config_error(place, what, hint=f"write it as {EXAMPLE}"))
            continue
        request = parse_entry(item.text, place, errors)
        if request is not None:
            found.append(request)
    errors.extend(_twice(found))
    return tuple(found)


def parse_entry(text: str, place: Place, errors: list[ConfigError]) -> RegionRequest | None:
    """Read one entry; return None if anything was wrong, each thing of which is in ``errors``."""
    entry = _Entry(text, place)
    request = entry.request()
    errors.extend(entry.errors)
    return None if entry.errors else request


def render_entry(request: RegionRequest) -> str:
    """Write the entry that :func:`parse_entry` reads as ``request``."""
    parts = [
        f"id={request.region_id}",
        f"begin={address_of(request.first_gfn):#x}",
        f"size={request.size_bytes:#x}",
        f"role={request.role}",
    ]
    if request.offset_frames:
        parts.append(f"offset={bytes_of(request.offset_frames):#x}")
    parts.append(f"prot={request.prot}")
    if request.cache_policy is not None:
        parts.append(f"cache_policy={request.cache_policy}")
    return ", ".join(parts)


def _twice(found: Iterable[RegionRequest]) -> Iterable[ConfigError]:
    first: dict[str, RegionRequest] = {}
    for request in found:
        before = first.setdefault(request.region_id, request)
        if before is not request:
            said = f"{before.place.key} (line {before.place.line})"
            what = f"region '{request.region_id}' is already in {said}"
            hint = "a guest can have a region once; give the other one another id"
            yield config_error(request.place, what, hint=hint)


class _Entry:
    """One entry on its way from text to record; ``errors`` has what is wrong with it."""

    def __init__(self, text: str, place: Place) -> None:
        self.errors: list[ConfigError] = []
        self._place = place
        self._values: dict[str, str] = {}
        self._split(text)

    def request(self) -> RegionRequest | None:
        for key, remedy in _NEEDED.items():
            if key not in self._values:
                self._wrong(f"'{key}' is missing", remedy)
        region_id = self._get("id", self._id)
        begin = self._get("begin", self._bytes)
        size = self._get("size", self._bytes)
        offset = self._get("offset", self._bytes) or 0
        role = self._get("role", lambda text: self._word("role", text, _ROLES))
        prot = self._get("prot", lambda text: self._word("prot", text, _PROTS)) or Prot.RW
        policy = self._get("cache_policy", lambda text: self._word("cache_policy", text, _POLICIES))
        if size == 0:
            self._wrong(
                "size=0: a region has at least one page", f"say size={PAGE_SIZE:#x} or more"
            )
        if begin is not None and size is not None and begin + size > _ADDRESS_LIMIT:
            self._wrong("begin + size is beyond 64 bits", "choose a lower begin or a smaller size")
        if size is not None and offset + size > _ADDRESS_LIMIT:
            self._wrong("offset + size is beyond 64 bits", "choose a smaller offset")
        if role is Role.OWNER and "offset" in self._values:
            self._wrong(
                "an owner has no offset: it defines the region from its start",
                "leave 'offset' out, or say role=borrower",
            )
        if role is Role.BORROWER and policy is not None:
            self._wrong(
                "a borrower has no cache_policy: the owner's counts",
                "say it in the owner's entry only",
            )
        if self.errors or region_id is None or begin is None or size is None or role is None:
            return None
        return RegionRequest(
            region_id=region_id,
            first_gfn=gfn_of(begin),
            nr_frames=frames_of(size),
            role=role,
            prot=prot,
            offset_frames=frames_of(offset),
            cache_policy=policy,
            place=self._place,
        )

    def _wrong(self, what: str, hint: str) -> None:
        self.errors.append(config_error(self._place, what, hint=hint))

    def _split(self, text: str) -> None:
        for part in text.split(","):
            key, equals, value = (word.strip(" \t") for word in part.partition("="))
            if not key and not equals:
                self._wrong("there is nothing before, after or between commas", f"as in {EXAMPLE}")
            elif not equals and key in _ROLES:
                self._wrong(f"'{shown(key)}' stands alone", f"say role={_ROLES[key]}")
            elif not equals:
                self._wrong(f"'{shown(key)}' has no value", f"write key=value, as in {EXAMPLE}")
            elif key not in _KEYS:
                self._wrong(f"unknown key '{shown(key)}'", _FORMER.get(key) or _did_you_mean(key))
            elif key in self._values:
                self._wrong(f"'{key}' is given twice", "leave one of the two out")
            else:
                self._values[key] = value

    def _get(self, key: str, read: Callable[[str], _T | None]) -> _T | None:
        text = self._values.get(key)
        if text == "":
            self._wrong(f"'{key}' has no value", f"as in {EXAMPLE}")
            return None
        self._reading = key
        return None if text is None else read(text)

    def _id(self, text: str) -> str | None:
        if not _ID.fullmatch(text):
            self._wrong(f"id '{shown(text)}' has other than a-z A-Z 0-9 _", "rename the region")
        elif len(text) > MAX_REGION_ID_LENGTH:
            what = f"id '{shown(text)}' has {len(text)} characters"
            self._wrong(what, f"at most {MAX_REGION_ID_LENGTH} are possible")
        else:
            return text
        return None

    def _bytes(self, text: str) -> int | None:
        said = f"{self._reading}={shown(text)}"
        if not _NUMBER.fullmatch(text):
            hint = "write bytes, decimal or 0x..., without a unit or a leading zero"
            self._wrong(f"{said} is not a number of bytes", hint)
            return None
        # Python limits how many decimal digits it converts; 64 bits are long done by then.
        number = int(text, 0) if len(text) < 100 else _ADDRESS_LIMIT
        if number >= _ADDRESS_LIMIT:
            self._wrong(f"{said} does not fit in 64 bits", "choose a smaller number")
            return None
        if number % PAGE_SIZE:
            below = number - number % PAGE_SIZE
            choices = f"{below:#x} or {below + PAGE_SIZE:#x}" if below else f"{PAGE_SIZE:#x}"
            self._wrong(
                f"{said} is not a multiple of {human_size(PAGE_SIZE)}",
                f"memory is shared in whole pages: say {choices}",
            )
            return None
        return number

    def _word(self, key: str, text: str, words: dict[str, _T]) -> _T | None:
        if text not in words:
            close = {word.lower(): word for word in words}.get(text.lower())
            hint = f"say {close}" if close else f"possible are {', '.join(words)}"
            self._wrong(f"{key}={shown(text)} is not known", hint)
        return words.get(text)


def _did_you_mean(key: str) -> str:
    close = difflib.get_close_matches(key[:40].lower(), _KEYS, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"possible are {', '.join(_KEYS)}"
