# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon: composes the engine with the real Xen, the real xenstore and its clients."""

from xshmd.daemon.deferred import defer_all

defer_all()
