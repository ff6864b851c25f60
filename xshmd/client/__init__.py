# SPDX-License-Identifier: LGPL-2.1-or-later
"""Regions of shared memory for programs of the control domain: find one, lease it, use its bytes.

Here for ordinary programs; :mod:`xshmd.client.on_trio` has the same for trio.  The names in
``__all__`` are public and stay.
"""

from __future__ import annotations

from xshmd.client.lease import Lease
from xshmd.client.lists import PostedList
from xshmd.client.sync import Connection, Region, connect
from xshmd.client.watches import Watch
from xshmd.errors import XshmError

__all__ = ["Connection", "Lease", "PostedList", "Region", "Watch", "XshmError", "connect"]
