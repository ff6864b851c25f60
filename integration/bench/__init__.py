# SPDX-License-Identifier: LGPL-2.1-or-later
"""What xshmd costs, as ratios measured in one boot of real Xen: ``python3 -m integration.bench``.

``attach_loop.c`` is the other side of the attach ratios: the same hypercalls from C.
``in_dom0.py`` measures, ``counted_daemon.py`` counts, ``stats.py`` and ``__main__.py`` report.
"""
