# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is claimed about Xen, as cases that run unchanged on the model and on real Xen."""
