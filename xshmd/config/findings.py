# SPDX-License-Identifier: LGPL-2.1-or-later
"""All that is wrong with a configuration at once, so that it is mended in one go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from xshmd.errors import ConfigError, XshmError
from xshmd.model import Place


def config_error(place: Place, what: str, *, hint: str = "") -> ConfigError:
    """Return the error that says ``what`` is wrong at ``place``."""
    return ConfigError(
        f"{place}: {what}", hint=hint, file=place.file, place=place.key, line=place.line
    )


def raise_all(errors: Sequence[ConfigError]) -> None:
    """Raise nothing, the only error, or one that speaks for all of them.

    The one that speaks for several has the facts and the hint of the first and names the others;
    :func:`errors_of` takes it apart again.
    """
    if errors:
        _raise(tuple(errors))


def _raise(errors: tuple[ConfigError, ...]) -> NoReturn:
    first, others = errors[0], errors[1:]
    if not others:
        raise first
    rest = "; ".join(other.one_line() for other in others)
    # The first's hint would otherwise follow all the others' messages.
    message = f"{first.one_line()}; and {len(others)} more: {rest}"
    spokesman = ConfigError(message, hint="", **first.facts)
    vars(spokesman)["errors"] = errors
    raise spokesman


def errors_of(error: XshmError) -> tuple[XshmError, ...]:
    """Return the errors that ``error`` speaks for: those it was made of, or just itself."""
    errors: tuple[XshmError, ...] = vars(error).get("errors", (error,))
    return errors
