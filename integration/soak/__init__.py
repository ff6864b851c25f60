# SPDX-License-Identifier: LGPL-2.1-or-later
"""What leaks a little is seen after hours only: `make soak` plays them on real Xen.

Guests come and go as a seed says, and at rest the machine must be as it was at the start, to the
page and the node, and the daemon must hold what it held then.
"""
