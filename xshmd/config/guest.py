# SPDX-License-Identifier: LGPL-2.1-or-later
"""From an xl configuration to what matters to shared memory in it.

A configuration without ``static_shm`` is none of our business: whatever else is odd in it is left
to xl, so that no guest without shared memory can fail because of us.
"""

from __future__ import annotations

import re
from typing import Final

from xshmd.config import static_shm
from xshmd.config.findings import config_error, raise_all
from xshmd.config.xlcfg import XlConfig, XlList, parse, shown
from xshmd.errors import ConfigError
from xshmd.machine import Arch
from xshmd.model import GuestConfig, GuestType, RegionRequest
from xshmd.policy.entry_rules import region_twice

MEMORY_MAP_KEY: Final = "static_shm_memory_map"
EXTENDED_REGIONS_KEY: Final = "static_shm_extended_regions"
"""Whether an x86 guest's memory map is to say where its regions are: ``reserve`` or ``leave``."""
ALTP2M_MODES: Final = ("disabled", "mixed", "external", "limited")
"""libxl_altp2m_mode in libxl_types.idl: each by its name, or by its index here."""

_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_C_LONG: Final = re.compile(r"\s*([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)", re.ASCII)
_LONG_LIMIT: Final = 1 << 63


def guest_config(
    text: str | bytes, *, file: str, arch: Arch | None = None, own_name: str = ""
) -> GuestConfig:
    """Read a guest's configuration.

    Args:
        text: The configuration in xl's language.
        file: What messages call it.
        arch: Where the guest will run: xl's default type depends on it.  None where that is not
            known; a configuration that says no type is then taken for PVH.
        own_name: For files of ours, which may be only about shared memory: the guest's name where
            the file says none; its type is then PVH where the file says none.

    Raises:
        ConfigUnreadable: it is not of xl's language.
        ConfigError: it is, and something that matters to us is wrong; see
            :func:`xshmd.config.findings.errors_of`.
    """
    return from_xl(parse(text, file), arch=arch, own_name=own_name)


def from_xl(config: XlConfig, *, arch: Arch | None = None, own_name: str = "") -> GuestConfig:
    """Do as :func:`guest_config` with a configuration that is parsed already."""
    reader = _Reader(config)
    requests = reader.requests()
    reader.strict = bool(requests or reader.errors)
    guest_type = reader.guest_type(arch, unsaid=GuestType.PVH if own_name else None)
    if guest_type is GuestType.PVH:
        reader.no_shim()
    guest = GuestConfig(
        name=reader.name(own_name),
        uuid=reader.uuid(),
        guest_type=guest_type,
        memory_mib=reader.size("memory"),
        maxmem_mib=reader.size("maxmem"),
        hap=reader.flag("hap", default=True),
        altp2m=reader.altp2m(),
        nestedhvm=reader.flag("nestedhvm"),
        reserve=reader.wish(MEMORY_MAP_KEY, "reserve", "leave"),
        extended_regions=reader.wish(EXTENDED_REGIONS_KEY, "used", "unused"),
        requests=requests,
        place=config.place("name"),
    )
    raise_all(reader.errors)
    return guest


def normalised_uuid(text: str) -> str:
    """Return the UUID in lower case with dashes, or nothing if it is none that xl would take."""
    return text.lower() if _UUID.fullmatch(text) else ""


def c_long(text: str) -> int | None:
    """Read a number as C's ``strtol(text, &end, 0)`` does in xl; None where xl ignores it."""
    found = _C_LONG.fullmatch(text)
    if not found or len(text) > 100:
        return None
    sign, digits = found.groups()
    base = 16 if digits[1:2] in ("x", "X") else 8 if digits[0] == "0" else 10
    value = int(digits, base) * (-1 if sign == "-" else 1)
    return value if -_LONG_LIMIT <= value < _LONG_LIMIT else None


class _Reader:
    """Reads keys as ``parse_config_data`` in tools/xl/xl_parse.c does, and collects errors."""

    def __init__(self, config: XlConfig) -> None:
        self.errors: list[ConfigError] = []
        self.strict = True
        """False: what xl would warn about and ignore is ignored here too."""
        self._config = config

    def requests(self) -> tuple[RegionRequest, ...]:
        found: list[RegionRequest] = []
        for key in static_shm.KEYS:
            setting = self._config.get(key)
            if setting is not None:
                file = self._config.file
                found += static_shm.requests(setting, file, self.errors, key=key)
        for error in region_twice(found):
            what, hint = error.message, error.hint
            self.errors.append(ConfigError(what, hint=hint, **error.facts))
        return tuple(found)

    def name(self, own_name: str) -> str:
        # As in xl, a list is no name.
        name = self._config.text("name") or own_name
        if not name:
            place = self._config.place("name")
            hint = 'say name = "..."'
            what = "the guest has no name"
            self.errors.append(config_error(place, what, hint=hint, rule="bad-name"))
        return name

    def uuid(self) -> str:
        text = self._text("uuid")
        uuid = normalised_uuid(text or "")
        if text is not None and not uuid:
            self._wrong("uuid", "it is no UUID", "32 hexadecimal digits as 8-4-4-4-12")
        return uuid

    def guest_type(self, arch: Arch | None, *, unsaid: GuestType | None) -> GuestType:
        said = self._type_of("type", ("hvm", "pv", "pvh"))
        built = self._type_of("builder", ("hvm", "generic"))
        if said and built and said != built:
            self._wrong("builder", f"it contradicts type={said}", "leave 'builder' out")
        found = built or said or unsaid
        if arch is Arch.ARM64:
            # libxl_arm.c: "Arm guest are now PVH"; it converts PV, and HVM has no other meaning.
            return GuestType.PVH
        if found is None:
            return GuestType.PV if arch is Arch.X86_64 else GuestType.PVH
        return found

    def _type_of(self, key: str, words: tuple[str, ...]) -> GuestType | None:
        text = self._text(key)
        if text is None:
            return None
        # xl_parse.c compares strlen(value) characters: any prefix will do, the first that fits.
        for word in words:
            if word.startswith(text):
                return GuestType.PV if word == "generic" else GuestType(word)
        self._wrong(key, f"'{shown(text)}' is not known", f"possible are {', '.join(words)}")
        return None

    def no_shim(self) -> None:
        if self.flag("pvshim"):
            self._wrong(
                "pvshim",
                "the PV guest inside the shim would never see the shared memory",
                'use type="pvh" without pvshim',
            )

    def size(self, key: str) -> int:
        number = self._number(key)
        if number is not None and number < 0:
            self._wrong(key, f"{number} MiB is less than nothing", "write MiB as a number")
            return 0
        return number or 0

    def flag(self, key: str, *, default: bool = False) -> bool:
        number = self._number(key)
        return default if number is None else number != 0

    def altp2m(self) -> bool:
        if self.flag("altp2mhvm"):
            return True
        mode = self._text("altp2m")
        if mode is None:
            return False
        if mode in ALTP2M_MODES:
            return mode != ALTP2M_MODES[0]
        number = c_long(mode)
        if number is None or not 0 <= number < len(ALTP2M_MODES):
            self._wrong(
                "altp2m", f"'{shown(mode)}' is not known", f"possible are {', '.join(ALTP2M_MODES)}"
            )
            return False
        return number != 0

    def wish(self, key: str, usual: str, other: str) -> bool:
        """Read a key of ours, which xl does not know; return whether it is as usual."""
        said = self._text(key)
        if said not in (None, usual, other):
            self._wrong(key, f"'{shown(said)}' is not known", f"say {usual} or {other}")
        return said != other

    def _number(self, key: str) -> int | None:
        text = self._text(key)
        if text is None:
            return None
        number = c_long(text)
        if number is None:
            self._wrong(
                key, f"'{shown(text)}' is not a number", "xl would ignore it; write a plain number"
            )
        elif self._config[key].added:
            self._wrong(key, "xl takes no number from '+='", "write it with '='")
            return None
        return number

    def _text(self, key: str) -> str | None:
        setting = self._config.get(key)
        if setting is not None and isinstance(setting.value, XlList):
            self._wrong(key, f"{key} is a list, not a single value", "write one value")
        return self._config.text(key)

    def _wrong(self, key: str, what: str, hint: str) -> None:
        if self.strict:
            place = self._config.place(key)
            self.errors.append(config_error(place, what, hint=hint, rule=f"bad-{key}"))
