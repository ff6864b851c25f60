# SPDX-License-Identifier: LGPL-2.1-or-later
"""The engine: makes what is match what is wanted, one step at a time, each written down first."""
