# SPDX-License-Identifier: LGPL-2.1-or-later
"""Decisions from records alone: no I/O, no clock, no trio."""
