# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watches a byte of a region for a program of dom0, which is woken when that is triggered."""

from __future__ import annotations

from xshmd.varlink.client import Client


class Watch:
    """A byte of a region that is watched from its making until it is closed.

    Whoever is woken looks at what it waits for: several triggers may wake once, and once may be
    once too often.

    Synchronization: none; use one per thread.
    """

    def __init__(
        self,
        region_id: str,
        offset_bytes: int,
        counter_offset_bytes: int | None,
        *,
        path: str,
        timeout_s: float,
    ) -> None:
        self.region_id, self.offset_bytes = region_id, offset_bytes
        self._client = Client(path, timeout_s)
        try:
            self._client.begin(
                "Watch", id=region_id, offsetBytes=offset_bytes,
                counterOffsetBytes=counter_offset_bytes,
            )  # fmt: skip
        except BaseException:
            self._client.close()
            raise

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Watch of byte {self.offset_bytes} of {self.region_id}>"

    def fileno(self) -> int:
        """Return a descriptor that is readable when :meth:`wait` need not wait."""
        return self._client.fileno()

    def wait(self, timeout_s: float) -> bool:
        """Wait until the byte was triggered, or may have been; False: not in this time.

        Args:
            timeout_s: How long to wait; 0 only looks.

        Raises:
            DaemonUnreachable: the daemon ended; watch again, and look, once it is back.
        """
        return self._client.next_reply(timeout_s) is not None

    def close(self) -> None:
        """Watch no more; may be called again without harm."""
        self._client.close()
