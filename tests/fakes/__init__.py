# SPDX-License-Identifier: LGPL-2.1-or-later
"""Verified fakes: stand-ins for Xen and xenstored that contract tests hold to the real ones."""
