# SPDX-License-Identifier: LGPL-2.1-or-later
"""What xshmd promises, tried on real Xen: `pytest integration/scenarios [--arch arm64]`.

One machine is booted for each architecture and all scenarios of it run there, one after the other.
Each leaves the machine as it found it, to the page: `conftest.py` sees to that.
"""
