# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xl shutdown -a`` and ``xl destroy`` take a holder for a guest: here it answers as one would."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

import trio

from xshmd.engine import identity
from xshmd.engine.ledger import Ledger
from xshmd.engine.loop import AGAIN_S
from xshmd.errors import XshmError
from xshmd.machine import SHUTDOWN_POWEROFF
from xshmd.model import Holder
from xshmd.ports import Hypervisor, Store

DEATH_S: Final = 20.0
"""How long a holder whose nodes are gone is expected to end."""


class HolderShutdown:
    """See the module.  Used by the reconciler alone."""

    def __init__(
        self, *, xen: Hypervisor, store: Store, ledger: Ledger, hint: Callable[[], None]
    ) -> None:
        self._xen, self._store, self._ledger, self._hint = xen, store, ledger, hint

    async def answer(self, holder: Holder) -> None:
        """Play the guest's part in ``xl shutdown``, so that ``xl shutdown -a`` does not wait."""
        path = f"/local/domain/{holder.domid}/control/shutdown"
        while self._ledger.holder(holder.uuid) is not None:
            with contextlib.suppress(XshmError):
                async with self._store.watch(path) as events:
                    async for _ in events:
                        asked = await self._store.read(path)
                        if asked is None:
                            await self._await_death(holder)
                            return
                        if asked:
                            await self._store.write(path, "")
                            # Shows as shut down and goes on holding: its frames are untouched.
                            if identity.is_still(self._xen, holder.domid, holder.uuid):
                                self._xen.shut_down(holder.domid, SHUTDOWN_POWEROFF)
            await trio.sleep(AGAIN_S)

    async def _await_death(self, holder: Holder) -> None:
        """Look out for the end of a holder whose nodes are gone.

        ``xl destroy`` removes a domain's nodes first and destroys it then (libxl_domain.c
        devices_destroy_cb); of one that was never introduced xenstored does not tell the end.
        """
        with trio.move_on_after(DEATH_S):
            while self._ledger.holder(holder.uuid) is not None:
                self._hint()
                await trio.sleep(AGAIN_S)
