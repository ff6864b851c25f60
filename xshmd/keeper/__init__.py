# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xshmd-keeper``: a process that does nothing but keep sealed pages mapped, and what dom0 lends.

It is another process than the daemon because a mapping ends with its process, and it is so small
that there is no reason to end it: standard library and Xen's binding, no configuration, one socket.
"""
