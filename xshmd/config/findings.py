# SPDX-License-Identifier: LGPL-2.1-or-later
"""All that is wrong with a configuration at once, so that it is mended in one go."""

from __future__ import annotations

from collections.abc import Sequence

from xshmd.errors import ConfigError, Fact, XshmError, combined
from xshmd.model import Place


def config_error(place: Place, what: str, *, hint: str = "", rule: str = "") -> ConfigError:
    """Return the error that says ``what`` is wrong at ``place``.

    Args:
        place: Where it is.
        what: What is wrong, in one sentence without a final full stop.
        hint: What to do about it.
        rule: The broken rule's name for programs, e.g. ``unknown-key``; names do not change.
    """
    facts: dict[str, Fact] = {"file": place.file, "place": place.key, "line": place.line}
    if rule:
        facts["rule"] = rule
    return ConfigError(f"{place}: {what}", hint=hint, **facts)


def raise_all(errors: Sequence[ConfigError]) -> None:
    """Raise nothing, the only error, or one that speaks for all of them."""
    if errors:
        raise combined(errors)


def errors_of(error: XshmError) -> tuple[XshmError, ...]:
    """Return the errors that ``error`` speaks for: those it was made of, or just itself."""
    return error.parts or (error,)
