# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an admin may choose about the engine, with the defaults in one place."""

from __future__ import annotations

import dataclasses
from typing import Final

REBOOT_GRACE_S: Final = 30.0
FREE_MEMORY_FLOOR_BYTES: Final = 16 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The engine's settings."""

    reboot_grace_s: float = REBOOT_GRACE_S
    """How long the regions of a guest that rebooted or crashed wait for it to come back."""
    free_memory_floor_bytes: int = FREE_MEMORY_FLOOR_BYTES
    """How much of the host's memory regions never take."""
    destroy_on_failure: bool = True
    """Destroy a guest whose regions cannot be given; otherwise it stays paused for an admin."""
