# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a region needs around it to be useful: peers that know, wake and watch each other."""
