"""sha256 of a file while it arrives."""

from __future__ import annotations

import hashlib
import os
import threading

from experimance_controlnet.catalog.partial import Partial

_READ_BYTES = 16 << 20
"""Between two pieces the thread needs Python's interpreter lock, for which it waits while another
imports the model libraries: so they are large."""


class FollowingHash:
    """Hashes what is there without a gap from the file's start, on a thread of its own.

    The bytes come from the page cache, since they were written a moment ago: so the hash is known
    when the last byte has arrived, instead of after reading gigabytes once more.
    """

    def __init__(self, partial: Partial) -> None:
        self._partial = partial
        self._digest = hashlib.sha256()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._follow, name="hash", daemon=True)
        self._thread.start()

    def result(self) -> str:
        """Lower-case hex, once the partial file is closed. Raises OSError."""
        self.stop()
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()

    def stop(self) -> None:
        """Wait until the thread has ended; the partial file is closed."""
        self._thread.join()

    def _follow(self) -> None:
        generation, position = 0, 0
        buffer = memoryview(bytearray(_READ_BYTES))
        while True:
            now, there = self._partial.wait_for_more(generation, position)
            if now != generation:
                generation, position, self._digest = now, 0, hashlib.sha256()
            elif there == position:
                return
            try:
                # piecewise: after each one it is seen whether the file began anew
                wanted = min(there - position, _READ_BYTES)
                got = os.preadv(self._partial.descriptor, [buffer[:wanted]], position)
            except OSError as error:
                self._error = error
                return
            self._digest.update(buffer[:got])
            position += got
