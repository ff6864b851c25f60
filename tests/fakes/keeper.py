# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keeper, in a process that the test's daemon is not: it outlives it, and may be ended."""

from __future__ import annotations

from typing import Any, Final

from fakes.hypervisor import SimulatedXen
from fakes.machine import SimulatedMap
from xshmd.errors import Conflict
from xshmd.keeper.shelf import Shelf

READ_ONLY: Final = frozenset({"kept", "read"})
"""Calls after which all is as it was."""


class FakeKeeper:
    """The production shelf on the model of Xen."""

    def __init__(self, xen: SimulatedXen) -> None:
        self._shelf = Shelf(xen)
        self.runs = True

    @property
    def maps(self) -> set[Any]:
        """The mappings that do not go with the daemon."""
        pieces = self._shelf._pieces.values()
        return {piece for each in pieces for _, piece in each if isinstance(piece, SimulatedMap)}

    @property
    def names(self) -> set[str]:
        """By which names it keeps something."""
        return set(self._shelf.kept())

    def end(self) -> None:
        """Kill it, and start another: what it kept is gone."""
        self._shelf.close()

    def __getattr__(self, call: str) -> Any:
        if not self.runs and call == "drop":
            return lambda name, *, wipe: None
        if not self.runs:
            raise Conflict("xshmd-keeper does not run", hint="systemctl start xshmd-keeper")
        return getattr(self._shelf, call)
