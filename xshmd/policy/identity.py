# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a holder is told from every other domain: a random UUID that carries our mark.

Domids are used again, names can be given to anything; the handle UUID of a domain is set when it is
made and only root in dom0 can change it.  The mark (RFC 9562 version 8, 48 bits of our choosing, 74
random) lets a holder be recognised for what it is even when every record of it is lost.
"""

from __future__ import annotations

import os
import uuid as uuid_module
from typing import Final

_MARK: Final = b"xshmd\x01"


def new_holder_uuid() -> str:
    """Return a fresh UUID that :func:`is_holder_uuid` recognises."""
    raw = bytearray(_MARK + os.urandom(10))
    raw[6] = 0x80 | (raw[6] & 0x0F)  # version 8: the layout is the application's own
    raw[8] = 0x80 | (raw[8] & 0x3F)  # the RFC's variant
    return str(uuid_module.UUID(bytes=bytes(raw)))


def is_holder_uuid(uuid: str) -> bool:
    """Return whether a domain with this handle was made by xshmd as a holder."""
    raw = uuid_module.UUID(uuid).bytes
    return raw[:6] == _MARK and raw[6] >> 4 == 8 and raw[8] >> 6 == 2


def new_generation() -> str:
    """Return a fresh mark for one domain's life, written both in our records and in its own."""
    return os.urandom(8).hex()
