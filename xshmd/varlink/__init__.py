# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Varlink interface: its contract (``*.varlink``), the wire, the server and the client."""
