# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's regions where something is to be said of each: there are some, and all have places."""

from __future__ import annotations

from xshmd.config.findings import config_error, raise_all
from xshmd.model import UNPLACED, WHOLE_REGION, GuestConfig, RegionRequest


def own_regions(config: GuestConfig) -> tuple[RegionRequest, ...]:
    """Return the guest's requests in the configuration's order.

    Raises:
        ConfigError: there is none, or one says not where or how large it is.
    """
    errors = []
    if not config.requests:
        what = f"guest '{config.name}' has no shared memory"
        errors.append(
            config_error(config.place, what, hint="give it a region first", rule="no-regions")
        )
    for request in config.requests:
        whose = f"region '{request.region_id}' of guest '{config.name}'"
        if request.first_gfn == UNPLACED:
            what, hint = f"{whose} has no guest address yet", "say begin="
            errors.append(config_error(request.place, what, hint=hint, rule="unplaced"))
        if request.nr_frames == WHOLE_REGION:
            what, hint = f"the size of {whose} is not known", "say size=, or give its owner's file"
            errors.append(config_error(request.place, what, hint=hint, rule="unsized"))
    raise_all(errors)
    return config.requests
