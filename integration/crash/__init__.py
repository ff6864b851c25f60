# SPDX-License-Identifier: LGPL-2.1-or-later
"""Nobody believes a simulated power cut alone: `make crash-on-xen` does it on real Xen.

The daemon is killed before every effect of every single operation, is started again, and the
machine must come to be as if nothing had happened: to the page, the domain and the node.
"""
