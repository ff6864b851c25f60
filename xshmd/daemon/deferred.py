# SPDX-License-Identifier: LGPL-2.1-or-later
"""trio and structlog import whole libraries for what the daemon never does: those wait for a use.

Together they would take 8 MiB of a daemon of 35, and a tenth of its start.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
from types import ModuleType
from typing import Any, Final

MODULES: Final = (
    "asyncio",  # structlog, for loggers of asyncio programs
    "ssl",  # trio, for its TLS streams
    "hashlib",  # trio, for DTLS, as the next two; they bring libcrypto
    "hmac",
    "secrets",
    "idna",  # trio, for names of hosts
    "bz2",  # shutil, for archives
    "lzma",
    "difflib",  # for the hint of an error message
)


class _Deferred:
    """A module's ``__getattr__`` (PEP 562) until the module is run by its first use."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        # Without it, an import of a submodule is a use as well.
        self._path = module.__dict__.pop("__path__", None)
        self._lock = threading.RLock()
        self._begun = False

    def __call__(self, name: str) -> Any:
        module = self._module
        with self._lock:
            if not self._begun:
                self._begun = True
                if self._path is not None:
                    module.__path__ = self._path
                assert module.__spec__ is not None
                assert module.__spec__.loader is not None
                module.__spec__.loader.exec_module(module)
                if module.__dict__.get("__getattr__") is self:  # not one of its own
                    del module.__dict__["__getattr__"]
        if name in module.__dict__:
            return module.__dict__[name]
        if module.__dict__.get("__getattr__") is self:  # it is being run, and asks for itself
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        return getattr(module, name)


def defer(name: str) -> None:
    """Have a module run when the first of its attributes is asked for, unless it is there already.

    importlib's LazyLoader would not do: an ``import`` of a module that it made is a use of it.
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__getattr__"] = _Deferred(module)
    sys.modules[name] = module


def defer_all() -> None:
    """Defer all of them; to be called before trio and structlog are imported."""
    # structlog makes a log record to see what attributes one has, and logging would ask asyncio.
    if sys.version_info >= (3, 12):
        logging.logAsyncioTasks = False
    for name in MODULES:
        defer(name)
