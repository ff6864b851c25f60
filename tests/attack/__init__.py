# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients gone wrong in every way, and what another client notices of it."""
