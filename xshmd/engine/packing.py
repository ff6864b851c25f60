# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes records fit in a xenstore node: as they are if they are small, otherwise compressed.

A node holds 4096 bytes with its path (XENSTORE_PAYLOAD_MAX).  Small records are plain JSON, so that
an admin can read them with xenstore-ls; those of a guest with many regions repeat themselves so
much that they shrink to a fifth.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any, Final

PLAIN_MAX: Final = 2800
"""Up to how many bytes a record is left as it is."""
PACKED_MAX: Final = 3900
"""How long a record may be at the most; the rest is for its path."""
_MARK: Final = "z:"
_UNPACKED_MAX: Final = 1 << 20


def pack(document: dict[str, Any]) -> str:
    """Return the text of a record."""
    text = json.dumps(document, separators=(",", ":"))
    if len(text) <= PLAIN_MAX:
        return text
    return _MARK + base64.b64encode(zlib.compress(text.encode("ascii"), 9)).decode("ascii")


def unpack(text: str) -> Any:
    """Return what was packed; ValueError if nothing was."""
    if not text.startswith(_MARK):
        return json.loads(text)
    try:
        inflate = zlib.decompressobj()
        data = inflate.decompress(base64.b64decode(text.removeprefix(_MARK)), _UNPACKED_MAX)
    except zlib.error as broken:
        raise ValueError(str(broken)) from broken
    return json.loads(data)
