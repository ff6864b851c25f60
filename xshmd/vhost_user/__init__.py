# SPDX-License-Identifier: LGPL-2.1-or-later
"""vhost-user: hands regions to back-ends in the protocol they speak, and is one; see its docs."""
