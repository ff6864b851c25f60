# SPDX-License-Identifier: LGPL-2.1-or-later
"""Static shared memory for Xen guests: a region of memory at frames a guest's configuration names.

The package is one trio daemon (``xshmd.daemon``), its command (``xshmd.ctl``) and the layers they
stand on.  Dependencies point one way only; ``tests/test_layers.py`` says which and enforces it.
"""

__version__ = "0.1.0"
