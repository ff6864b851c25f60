# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds the compiled modules through which ``xshmd.xen`` reaches Xen (cffi, API mode).

Xen's libraries make two promises: those in ``_stable`` and ``_evtchn`` keep their ABI from release
to release, while libxenctrl is bound to one Xen version.  A Xen upgrade therefore breaks one module
and not the others.  All use Python's limited API, so one build serves every Python from
3.11 on.

The C of ``_stable`` is ``xshmd/xen/c/stable.c``, and what Python sees of it is ``stable.cdef.h``
beside it; likewise the others.

Run by setuptools (``cffi_modules`` in setup.py), or by hand to cross-compile::

    python3 cffi_build.py emit OUTDIR

which writes the C sources and prints, as JSON, what each is to be linked with.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from cffi import FFI

C_FOLDER = Path(__file__).parent / "xshmd" / "xen" / "c"
LIBRARIES = {
    "stable": ("xencall", "xenforeignmemory", "xengnttab", "xentoollog"),
    "xenctrl": ("xenctrl", "xentoollog"),
    "evtchn": ("xenevtchn", "xencall"),
}
# cffi's own C calls memset(), and Python.h of 3.13 no longer declares it under the limited API.
COMPILE_ARGS = ("-O2", "-include", "string.h")


def _builder(name: str) -> FFI:
    """What makes one module, of the two files of that name."""
    builder = FFI()
    builder.cdef((C_FOLDER / f"{name}.cdef.h").read_text())
    builder.set_source(
        f"xshmd.xen._{name}",
        (C_FOLDER / f"{name}.c").read_text(),
        libraries=list(LIBRARIES[name]),
        extra_compile_args=list(COMPILE_ARGS),
        py_limited_api=True,
        # Without Xen's headers the package still installs: every unit test runs, and xen/_ffi.py
        # says what is missing to whoever needs the module.
        optional=True,
    )
    return builder


STABLE = _builder("stable")
XENCTRL = _builder("xenctrl")
EVTCHN = _builder("evtchn")


def emit(directory: Path) -> list[dict[str, object]]:
    """Write each module's C source into ``directory``; return what to compile and link."""
    directory.mkdir(parents=True, exist_ok=True)
    recipes: list[dict[str, object]] = []
    for name, builder in (("stable", STABLE), ("xenctrl", XENCTRL), ("evtchn", EVTCHN)):
        c_file = directory / f"_{name}.c"
        with contextlib.redirect_stdout(sys.stderr):  # it chats; stdout is for our JSON
            builder.emit_c_code(str(c_file))
        recipes.append(
            {
                "module": f"xshmd.xen._{name}",
                "c_file": str(c_file),
                "libraries": list(LIBRARIES[name]),
            }
        )
    return recipes


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "emit":
        sys.exit("usage: cffi_build.py emit OUTDIR")
    print(json.dumps(emit(Path(sys.argv[2])), indent=1))
