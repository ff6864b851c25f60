# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one importer of the compiled modules, so that everything else works where they are absent.

``stable()``, ``xenctrl()`` and ``evtchn()`` return ``(ffi, lib)`` or raise :class:`XenUnavailable`
with what to do.
"""

from __future__ import annotations

import importlib
from typing import Any

from xshmd.errors import XenUnavailable


def _load(name: str, needs: str) -> tuple[Any, Any]:
    try:
        module = importlib.import_module(f"xshmd.xen.{name}")
    except ImportError as missing:
        raise XenUnavailable(
            f"the compiled module xshmd.xen.{name} cannot be loaded: {missing}",
            hint=f"it needs {needs}; install libxen-dev of the running Xen and reinstall xshmd",
        ) from missing
    return module.ffi, module.lib


def stable() -> tuple[Any, Any]:
    """Return the binding of Xen's libraries with a stable ABI."""
    return _load("_stable", "libxencall.so.1, libxenforeignmemory.so.1 and libxengnttab.so.1")


def xenctrl() -> tuple[Any, Any]:
    """Return the binding of libxenctrl, which is bound to one version of Xen."""
    return _load("_xenctrl", "the libxenctrl.so of the Xen it was built for")


def evtchn() -> tuple[Any, Any]:
    """Return the binding of event channels, whose libraries have a stable ABI too."""
    return _load("_evtchn", "libxenevtchn.so.1 and libxencall.so.1")
