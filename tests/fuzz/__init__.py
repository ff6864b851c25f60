# SPDX-License-Identifier: LGPL-2.1-or-later
"""What strangers write, thrown at everything that reads it."""
