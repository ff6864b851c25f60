# SPDX-License-Identifier: LGPL-2.1-or-later
"""All that is wrong with a configuration at once, so that it is mended in one go."""

from __future__ import annotations

from collections.abc import Sequence

from xshmd.errors import ConfigError, XshmError, combined
from xshmd.model import Place


def config_error(place: Place, what: str, *, hint: str = "") -> ConfigError:
    """Return the error that says ``what`` is wrong at ``place``."""
    return ConfigError(
        f"{place}: {what}", hint=hint, file=place.file, place=place.key, line=place.line
    )


def raise_all(errors: Sequence[ConfigError]) -> None:
    """Raise nothing, the only error, or one that speaks for all of them."""
    if errors:
        raise combined(errors)


def errors_of(error: XshmError) -> tuple[XshmError, ...]:
    """Return the errors that ``error`` speaks for: those it was made of, or just itself."""
    return error.parts or (error,)
