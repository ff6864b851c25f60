# SPDX-License-Identifier: LGPL-2.1-or-later
"""One entry of ``static_shm`` on its way from text to record, in whichever form it is written."""

from __future__ import annotations

import difflib
import re
from typing import Final

from xshmd.config.entry_forms import (
    FORMS_OF_FLAG,
    FORMS_OF_KEY,
    KEY,
    AmbiguousFormError,
    Form,
    MixedFormsError,
    form_of,
)
from xshmd.config.entry_values import EXAMPLE, Values
from xshmd.config.xlcfg import shown
from xshmd.model import (
    MAX_DOORBELLS,
    MAX_REGION_ID_LENGTH,
    UNPLACED,
    USUAL_TERMS,
    WHOLE_REGION,
    CachePolicy,
    DoorbellRoute,
    Isolation,
    Lifetime,
    Place,
    Prot,
    ProtEnforcement,
    RegionRequest,
    RegionTerms,
    Role,
    Transport,
)
from xshmd.units import ADDRESS_LIMIT, PAGE_SIZE, Gfn, is_within

_ROLES: Final = {
    "owner": Role.OWNER, "borrower": Role.BORROWER,
    "master": Role.OWNER, "slave": Role.BORROWER,
}  # fmt: skip
_PROTS: Final = {one.value: one for one in Prot}
_POLICIES: Final = {one.value: one for one in CachePolicy}
_LIFETIMES: Final = {one.value: one for one in Lifetime}
_TRANSPORTS: Final = {one.value: one for one in Transport}
_ISOLATIONS: Final = {one.value: one for one in Isolation}
_ENFORCEMENTS: Final = {one.value: one for one in ProtEnforcement}
_ROUTES: Final = {one.value: one for one in DoorbellRoute}
_OWNERS_ONLY: Final = (
    "cache_policy", "lifetime", "transport", "isolation", "prot_enforcement", "doorbells",
    "doorbell_route",
)  # fmt: skip
_NO_SUCH_PROT: Final = {
    "wo": "no machine that Xen runs on can map memory for writing only",
    "x": "Xen maps shared memory as not executable",
}
"""Protections that the proposal of 2017 speaks of, and why nobody can have them."""
_NEEDED: Final = {
    "id": "name the region, as in id=ID1",
    "begin": "say where in the guest it begins",
    "end": "say where in the guest it ends: the first address or frame after it",
    "size": "say how large the region is, in bytes; only a borrower may leave it out",
    "role": "say role=owner in the one guest that defines the region, role=borrower in the others",
    "granularity": "the proposal of 2017 wants it of every master: add granularity=4k",
}
_ID: Final = re.compile(r"[_a-zA-Z0-9][_a-zA-Z0-9@-]*")
"""The published form has no ``-`` and ``@``; ids of dom0less device trees do."""
_FRAMES_LIMIT: Final = ADDRESS_LIMIT // PAGE_SIZE
_BLANKS: Final = " \t\n\v\f\r"
"""What the published parsers' regular expression takes for blanks."""


class Entry:
    """One entry; ``errors`` has everything that is wrong with it.

    Args:
        text: What is between the quotes.
        place: Where it is.
        key: The key of the configuration that it is in.
    """

    def __init__(self, text: str, place: Place, key: str = KEY) -> None:
        self._place = place
        self._key = key
        self._values = Values(place)
        self.errors = self._values.errors
        self._flags: set[str] = set()
        self._split(text)

    def request(self) -> RegionRequest | None:
        """Return what the entry says; None if it is wrong, with all that is in ``errors``."""
        try:
            form = form_of(self._key, self._values.texts, self._flags)
        except MixedFormsError as err:
            hint = f'write all of it as in "{EXAMPLE}"'
            self._values.wrong("mixed-forms", f"it mixes two forms of entries: {err}", hint)
            return None
        except AmbiguousFormError:
            self._values.wrong(
                "ambiguous-form",
                "begin and end may be bytes (the series of 2018) or frame numbers (the proposal of"
                " 2017)",
                "say size instead of end, in bytes; or role=slave for bytes, granularity=4k for"
                " frames",
            )
            return None
        role = self._role(form)
        self._need(form, role)
        region_id = self._id(form)
        if form is Form.PROPOSAL_2017:
            first, count = self._span_of_frames()
            self._granularity()
        elif form is Form.SERIES_2018:
            first, count = self._span_of_bytes()
        else:
            first, count = self._begin_and_size()
        offset = self._values.pages("offset") or 0
        prot = self._prot(form) or Prot.RW
        terms = self._owners_terms(prot) if role is not Role.BORROWER else USUAL_TERMS
        if count and not is_within(offset, count, _FRAMES_LIMIT):
            self._values.wrong(
                "beyond-64-bits", "offset + size is beyond 64 bits", "choose a smaller offset"
            )
        self._only_for_its_role(role)
        if self.errors or region_id is None or first is None or count is None or role is None:
            return None
        return RegionRequest(
            region_id=region_id,
            first_gfn=Gfn(first),
            nr_frames=count,
            role=role,
            prot=prot,
            offset_frames=offset,
            cache_policy=terms.cache_policy,
            terms=terms,
            is_whole=form is Form.PROPOSAL_2017,
            place=self._place,
        )

    # --- its parts --------------------------------------------------------------------------------

    def _split(self, text: str) -> None:
        parts = text.split(",")
        # The published grammar is "[<key>=<value>,]*": the last comma is one too many to us only.
        if len(parts) > 1 and not parts[-1].strip(_BLANKS):
            del parts[-1]
        for part in parts:
            key, equals, value = (word.strip(_BLANKS) for word in part.partition("="))
            if not key and not equals:
                self._values.wrong(
                    "empty-part", "there is nothing before or between commas", f"as in {EXAMPLE}"
                )
            elif not equals and key in FORMS_OF_FLAG:
                if key in self._flags:
                    self._values.wrong(
                        "key-twice", f"'{key}' is given twice", "leave one of the two out"
                    )
                self._flags.add(key)
            elif not equals and key in _ROLES:
                self._values.wrong("no-value", f"'{key}' stands alone", f"say role={_ROLES[key]}")
            elif not equals:
                hint = f"write key=value, as in {EXAMPLE}"
                self._values.wrong("no-value", f"'{shown(key)}' has no value", hint)
            elif key not in FORMS_OF_KEY:
                self._values.wrong("unknown-key", f"unknown key '{shown(key)}'", _did_you_mean(key))
            elif key in self._values.texts:
                self._values.wrong(
                    "key-twice", f"'{key}' is given twice", "leave one of the two out"
                )
            else:
                self._values.texts[key] = value

    def _need(self, form: Form, role: Role | None) -> None:
        needed = ["id"]
        if form is Form.FINAL:
            needed += ["role"] if role is Role.BORROWER else ["size", "role"]
        else:
            needed += ["begin", "end"]
            if form is Form.PROPOSAL_2017 and role is Role.OWNER:
                needed.append("granularity")
        for key in needed:
            if key not in self._values.texts:
                self._values.wrong("missing-key", f"'{key}' is missing", _NEEDED[key])

    def _only_for_its_role(self, role: Role | None) -> None:
        if role is Role.OWNER and "offset" in self._values.texts:
            self._values.wrong(
                "owner-offset",
                "an owner has no offset: it defines the region from its start",
                "leave 'offset' out, or say role=borrower",
            )
        for key in _OWNERS_ONLY:
            if role is Role.BORROWER and key in self._values.texts:
                self._values.wrong(
                    "owners-only",
                    f"a borrower has no {key}: the owner's counts",
                    "say it in the owner's entry only",
                )

    # --- how much and where -----------------------------------------------------------------------

    def _begin_and_size(self) -> tuple[int | None, int | None]:
        said = self._values.texts
        begin = self._values.pages("begin") if "begin" in said else UNPLACED
        count = self._values.pages("size") if "size" in said else WHOLE_REGION
        if count == 0 and "size" in said:
            self._values.wrong(
                "size-zero",
                "size=0: a region has at least one page",
                f"say size={PAGE_SIZE:#x} or more",
            )
        if begin is None or count is None or begin == UNPLACED:
            return begin, count
        if not is_within(begin, count, _FRAMES_LIMIT):
            self._values.wrong(
                "beyond-64-bits",
                "begin + size is beyond 64 bits",
                "choose a lower begin or a smaller size",
            )
        return begin, count

    def _span_of_bytes(self) -> tuple[int | None, int | None]:
        # libxl_sshm.c of the series: (end - begin) >> XC_PAGE_SHIFT pages, so end is exclusive.
        return self._span(self._values.pages("begin"), self._values.pages("end"))

    def _span_of_frames(self) -> tuple[int | None, int | None]:
        # The proposal does not say whether "end" belongs to the area.  Its author's next version
        # has it as the first byte after, and so have we: 0x20000 to 0x20010 are 16 frames.
        return self._span(self._values.frame("begin"), self._values.frame("end"))

    def _span(self, begin: int | None, end: int | None) -> tuple[int | None, int | None]:
        if begin is None or end is None:
            return begin, None
        if end <= begin:
            what = (
                f"end={self._values.texts['end']} is not after begin={self._values.texts['begin']}"
            )
            self._values.wrong(
                "size-zero", what, "end is the first address or frame after the region"
            )
            return begin, None
        return begin, end - begin

    # --- who and how ------------------------------------------------------------------------------

    def _role(self, form: Form) -> Role | None:
        if form is Form.PROPOSAL_2017:
            return Role.OWNER if self._flags else Role.BORROWER
        if form is Form.SERIES_2018 and "role" not in self._values.texts:
            # libxl__sshm_setdefault in libxl_sshm.c of the series.
            return Role.BORROWER
        return self._values.word("role", _ROLES)

    def _id(self, form: Form) -> str | None:
        text = self._values.text("id")
        if text is None:
            return None
        if form is Form.PROPOSAL_2017 and text[0].isdigit():
            # There it is a number, so 0x7 and 7 are one region.
            hint = "an id is a number, decimal or 0x..., or a name"
            number = self._values.number("id", "an unsigned number", hint)
            return None if number is None else str(number)
        if not _ID.fullmatch(text):
            what = f"id '{shown(text)}' has other than a-z A-Z 0-9 _ - @"
            self._values.wrong("bad-id", what, "rename the region")
        elif len(text) > MAX_REGION_ID_LENGTH:
            what = f"id '{shown(text)}' has {len(text)} characters"
            self._values.wrong("bad-id", what, f"at most {MAX_REGION_ID_LENGTH} are possible")
        else:
            return text
        return None

    def _granularity(self) -> None:
        text = self._values.text("granularity")
        if text is not None and text.lower() != "4k":
            what = f"granularity={shown(text)} is not possible"
            self._values.wrong("bad-granularity", what, "memory is shared in pages of 4k: say that")

    def _prot(self, form: Form) -> Prot | None:
        text = self._values.text("prot")
        if text is None:
            return None
        why = _NO_SUCH_PROT.get(text.lower())
        if why:
            self._values.wrong("no-such-prot", f"prot={text} is not possible: {why}", "say prot=rw")
            return None
        if form is Form.PROPOSAL_2017:
            self._values.texts["prot"] = text.lower()
        return self._values.word("prot", _PROTS)

    def _owners_terms(self, prot: Prot) -> RegionTerms:
        # What stands in for a misspelt word does not matter: the entry is then not used.
        return RegionTerms(
            prot=prot,
            cache_policy=self._values.word("cache_policy", _POLICIES),
            lifetime=self._values.word("lifetime", _LIFETIMES),
            transport=self._values.word("transport", _TRANSPORTS) or Transport.PHYSMAP,
            isolation=self._values.word("isolation", _ISOLATIONS),
            prot_enforcement=self._values.word("prot_enforcement", _ENFORCEMENTS)
            or ProtEnforcement.REQUIRED,
            doorbells=self._doorbells(),
            doorbell_route=self._values.word("doorbell_route", _ROUTES) or DoorbellRoute.AUTO,
        )

    def _doorbells(self) -> int:
        hint = f"say how many peers are to have doorbells, 2 to {MAX_DOORBELLS}"
        number = self._values.number("doorbells", "a number of peers", hint)
        if number is not None and not 2 <= number <= MAX_DOORBELLS:
            self._values.wrong("bad-number", f"doorbells={number} is not possible", hint)
        return number or 0


def _did_you_mean(key: str) -> str:
    close = difflib.get_close_matches(key[:40].lower(), FORMS_OF_KEY, n=1, cutoff=0.5)
    keys = [known for known, forms in FORMS_OF_KEY.items() if Form.FINAL in forms]
    return f"did you mean '{close[0]}'?" if close else f"possible are {', '.join(keys)}"
