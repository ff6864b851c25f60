# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which of three published forms an entry of ``static_shm`` is written in.

* *2017*, the proposal "RFC v2" on xen-devel:
  ``id=1, begin=0x20000, end=0x20010, granularity=4k, prot=RW, master``
* *2018*, v4 of the series (libxlu_sshm.c):
  ``id=ID1, begin=0x100000, end=0x200000, role=master``
* *final*, its last posting, as Xilinx's Xen has it (xl-static-shm-configuration.pod.5):
  ``id=ID1, begin=0x100000, size=0x100000, role=owner``

The forms give the same words other meanings (``begin`` is a frame in 2017 and an address in bytes
since), so an entry's form is never guessed: each word below exists in some of the forms, and the
entry is of the form that has all of its words.  With words of no common form it is an error, and so
is the one entry that two forms can read, ``end`` without any word that tells 2017 from 2018.  An
entry with nothing but words of all forms is of the final one.  What is ours and no form ever had
(``lifetime`` and so on) goes with the final form only.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Set
from typing import Final

KEY: Final = "static_shm"
OLD_KEY: Final = "static_shared_mem"
"""What the proposal of 2017 called it: entries under this key are of that form."""


class Form(enum.Flag):
    """A published form, or several."""

    PROPOSAL_2017 = enum.auto()
    SERIES_2018 = enum.auto()
    FINAL = enum.auto()

    @property
    def words(self) -> str:
        """Name the forms, for messages."""
        return " and ".join(_NAMES[form] for form in self)


_NAMES: Final = {
    Form.PROPOSAL_2017: "the proposal of 2017",
    Form.SERIES_2018: "the series of 2018",
    Form.FINAL: "the final form",
}
_ANY: Final = Form.PROPOSAL_2017 | Form.SERIES_2018 | Form.FINAL
_BYTES: Final = Form.SERIES_2018 | Form.FINAL

FORMS_OF_KEY: Final[Mapping[str, Form]] = {
    "id": _ANY,
    "begin": _ANY,
    "size": Form.FINAL,
    "end": Form.PROPOSAL_2017 | Form.SERIES_2018,
    "role": _BYTES,
    "offset": _BYTES,
    "prot": _ANY,
    "cache_policy": _BYTES,
    "granularity": Form.PROPOSAL_2017,
    "lifetime": Form.FINAL,
    "transport": Form.FINAL,
    "isolation": Form.FINAL,
    "prot_enforcement": Form.FINAL,
    "doorbells": Form.FINAL,
    "doorbell_route": Form.FINAL,
}
"""Every key of any form, in the order that messages list them."""
FORMS_OF_FLAG: Final[Mapping[str, Form]] = {"master": Form.PROPOSAL_2017}
"""Words that stand alone."""
_FORMS_OF_ROLE: Final[Mapping[str, Form]] = {
    "owner": Form.FINAL,
    "borrower": Form.FINAL,
    # With size and not end they are those of Xilinx's 2018.3, between the two.
    "master": _BYTES,
    "slave": _BYTES,
}


class MixedFormsError(Exception):
    """The entry has words of no common form; the text says which two."""


class AmbiguousFormError(Exception):
    """Two forms can read the entry, each in its own way."""


def form_of(setting: str, values: Mapping[str, str], flags: Set[str]) -> Form:
    """Return the one form an entry is of.

    Args:
        setting: Which of the two keys of the configuration the entry is in.
        values: Its keys, all of them known, with their values.
        flags: Its words that stand alone, all of them known.

    Raises:
        MixedFormsError, AmbiguousFormError: there is no such form, or it cannot be told.
    """
    marks = [(f"'{key}'", FORMS_OF_KEY[key]) for key in values]
    marks += [(f"'{flag}' alone", FORMS_OF_FLAG[flag]) for flag in sorted(flags)]
    role = values.get("role", "")
    if role in _FORMS_OF_ROLE:
        marks.append((f"'role={role}'", _FORMS_OF_ROLE[role]))
    if setting == OLD_KEY:
        marks.insert(0, (f"the key {OLD_KEY}", Form.PROPOSAL_2017))
    possible = _ANY
    for index, (word, forms) in enumerate(marks):
        if not possible & forms:
            # Each word is of neighbouring forms, so words without a common form are so by pairs.
            other, its = next((one, at) for one, at in marks[:index] if not at & forms)
            raise MixedFormsError(f"{other} is of {its.words}, {word} of {forms.words}")
        possible &= forms
    if possible == Form.PROPOSAL_2017 | Form.SERIES_2018:
        raise AmbiguousFormError
    return Form.FINAL if Form.FINAL in possible else possible
