# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the engine needs of the control domain it runs in, as Protocols: nothing of it is Xen's.

The daemon and ``xshmd.config`` implement them for real, and the tests do, which have a time, files
and processes of their own.
"""

from __future__ import annotations

from typing import Protocol

from xshmd.declarations import Declarations
from xshmd.errors import XshmError
from xshmd.host_policy import HostPolicy
from xshmd.model import GuestConfig, RegionConfig


class Clock(Protocol):
    """Time, injected so that a reboot's grace can be tested without waiting."""

    def now(self) -> float:
        """Return seconds since the epoch, for people: an admin or NTP may set it at any moment."""
        ...

    def uptime(self) -> float:
        """Return seconds since the machine started, which nobody sets."""
        ...


class ConfigFinder(Protocol):
    """Finds what a new domain's configuration says about shared memory."""

    def find(self, *, name: str, uuid: str) -> GuestConfig | None:
        """Return the configuration of the guest of this name, or None if nobody has one.

        Raises:
            ConfigError, ConfigUnreadable: it was found, and is wrong.
        """
        ...

    def complete(self, config: GuestConfig) -> GuestConfig:
        """Return a configuration from elsewhere with what files of ours add, and placed.

        Raises:
            ConfigError, Conflict: what they say together is wrong.
        """
        ...

    def known(self) -> tuple[GuestConfig, ...]:
        """Return every readable configuration with shared memory in the usual places."""
        ...

    def regions(self) -> tuple[RegionConfig, ...]:
        """Return every region that a readable file in the usual places defines for the system."""
        ...

    def policy(self) -> HostPolicy | XshmError:
        """Return what the administrator lets guests have, as the file says now.

        Returns:
            That, or a ConfigError or ConfigUnreadable: then nobody may have anything new.
        """
        ...

    def declarations(self) -> Declarations:
        """Read all files of ours anew, and return what they say.

        Raises:
            ConfigError, ConfigUnreadable: any of them is wrong; all that is wrong with all of them.
        """
        ...


class Processes(Protocol):
    """The processes of the control domain."""

    def started_at(self, pid: int) -> int | None:
        """Return when a process began, in ticks since the boot; None if there is no such."""
        ...
