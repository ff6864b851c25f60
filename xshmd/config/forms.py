# SPDX-License-Identifier: LGPL-2.1-or-later
"""The forms in which regions are written, each read into the model and written from it.

Files of several forms are read together here, as the daemon takes them together: a guest's xl
configuration says what the guest is, any file may add to its regions.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from xshmd.config.files import read_regular
from xshmd.config.findings import errors_of
from xshmd.config.joining import agreed, by_name, is_open, joined, put_together, sizes_of
from xshmd.config.lookup import drop_ins_beside
from xshmd.declarations import Declarations
from xshmd.errors import XshmError
from xshmd.host_policy import NO_POLICY
from xshmd.machine import Arch
from xshmd.model import GuestConfig

_TREE_SUFFIXES: Final = (".dts", ".dtb", ".dtsi", ".dtbo")
_TREE_MAGIC: Final = b"\xd0\x0d\xfe\xed"
_OWN_DIRECTORY: Final = "guests.d"


class Form(enum.StrEnum):
    """A language that regions are written in."""

    XL = "xl"
    TOML = "toml"
    DTS = "dts"
    """A dom0less device tree, as source or blob."""


@dataclasses.dataclass(frozen=True, slots=True)
class Parsed:
    """What one file says, or why that cannot be known."""

    file: str
    form: Form
    result: Declarations | XshmError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """What files say together, each guest once; and all that is wrong with them."""

    declarations: Declarations
    """As written: nothing is placed."""
    errors: tuple[XshmError, ...]

    def placed(self, arch: Arch) -> tuple[Declarations, tuple[XshmError, ...]]:
        """Return the declarations with everything in its place, and what finds none."""
        from xshmd.policy.placement import placed

        sizes = sizes_of(self.declarations.guests, self.declarations.regions)
        guests: list[GuestConfig] = []
        errors: list[XshmError] = []
        for guest in self.declarations.guests:
            try:
                guests.append(placed(guest, arch, sizes=sizes) if is_open(guest) else guest)
            except XshmError as error:
                errors += errors_of(error)
                guests.append(guest)
        return dataclasses.replace(self.declarations, guests=tuple(guests)), tuple(errors)


def form_of(file: str, data: bytes) -> Form:
    """Return the form of a file, by its name and, where that does not tell, its beginning."""
    suffix = Path(file).suffix
    if suffix == ".toml":
        return Form.TOML
    if suffix in _TREE_SUFFIXES or data.startswith((_TREE_MAGIC, b"/dts-v1/")):
        return Form.DTS
    return Form.XL


def read_file(file: str, *, arch: Arch | None = None) -> Parsed:
    """Read a file in whichever form it is, with the drop-ins that are beside it.

    Args:
        file: Its path.
        arch: Where the guests will run; None where that is not known.
    """
    form = form_of(file, b"")
    try:
        data = read_regular(Path(file))
        form = form_of(file, data)
        return Parsed(file, form, _read(data, file, form, arch))
    except XshmError as error:
        return Parsed(file, form, error)


def take_together(parsed: Iterable[Parsed]) -> Together:
    """Join what files say; a file that is wrong is left out of it, and what is wrong is listed."""
    errors: list[XshmError] = []
    good: list[Parsed] = []
    for one in parsed:
        if isinstance(one.result, XshmError):
            errors += errors_of(one.result)
        else:
            good.append(one)
    whole = put_together(one.result for one in good if isinstance(one.result, Declarations))
    guests: list[GuestConfig] = []
    for configs in by_name(whole.guests):
        try:
            guests.append(joined(_counting(configs, good)))
        except XshmError as error:
            errors += errors_of(error)
            guests.append(configs[0])
    declarations = dataclasses.replace(whole, guests=tuple(guests))
    return Together(declarations=declarations, errors=tuple(errors))


def render(declarations: Declarations, form: Form, arch: Arch) -> tuple[str, tuple[str, ...]]:
    """Write declarations in a form.

    Returns:
        The text; and what it does not say, a sentence each.
    """
    text, losses = _rendered(declarations, form, arch)
    if declarations.policy != NO_POLICY:
        losses = (*losses, "limits and allow-lists are of no region: they stay in xshmd.toml")
    return text, losses


def _rendered(declarations: Declarations, form: Form, arch: Arch) -> tuple[str, tuple[str, ...]]:
    match form:
        case Form.XL:
            from xshmd.config.xl_write import render_xl

            return render_xl(declarations)
        case Form.TOML:
            from xshmd.config.toml_write import render_toml

            return render_toml(declarations)
        case Form.DTS:
            from xshmd.config.devicetree_write import render_dts

            return render_dts(declarations, arch=arch)


def _read(data: bytes, file: str, form: Form, arch: Arch | None) -> Declarations:
    match form:
        case Form.TOML:
            from xshmd.config import host_policy
            from xshmd.config.toml import read_toml
            from xshmd.config.toml_tree import Source

            drop_ins = [
                Source(str(path), read_regular(path)) for path in drop_ins_beside(Path(file))
            ]
            if Path(file).name == host_policy.NAME:
                policy = host_policy.read_policy(data, file=file, drop_ins=drop_ins)
                return Declarations(policy=policy)
            return read_toml(data, file=file, drop_ins=drop_ins)
        case Form.DTS:
            from xshmd.config.devicetree import read_devicetree

            return read_devicetree(data, file=file)
        case Form.XL:
            from xshmd.config.guest import guest_config

            # Files of ours go by the guest's name, and need not say it.
            own_name = Path(file).stem if _is_own(file) else ""
            return Declarations(
                guests=(guest_config(data, file=file, arch=arch, own_name=own_name),)
            )


def _counting(configs: Sequence[GuestConfig], parsed: Sequence[Parsed]) -> list[GuestConfig]:
    """Return those of a guest's configurations that count, what says what it is first.

    Raises:
        ConfigError: two xl configurations are the guest's, and differ.
    """
    xl_files = {one.file for one in parsed if one.form is Form.XL}
    ours = [config for config in configs if config.place.file not in xl_files]
    of_xl = [config for config in configs if config.place.file in xl_files]
    own = [config for config in of_xl if _is_own(config.place.file)]
    if not of_xl:
        return ours
    decide_in = f"/etc/xshmd/guests.d/{of_xl[0].name}.cfg"
    return [agreed(own or of_xl, decide_in=decide_in), *ours]


def _is_own(file: str) -> bool:
    return Path(file).absolute().parent.name == _OWN_DIRECTORY
