# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xshmctl``, the administrator's command: standard library only, so that it starts fast."""
