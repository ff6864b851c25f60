# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon: composes the engine with the real Xen, the real xenstore and its clients."""
