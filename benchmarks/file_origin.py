"""An HTTP origin for one large file: ranges, a strong ETag, and no copy of the file in Python.

``python -m benchmarks.file_origin FILE`` listens on the loopback and prints its port.
"""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

_RANGE = re.compile(rb"^range: *bytes=(\d+)-(\d*)\r$", re.IGNORECASE | re.MULTILINE)
_HEAD = re.compile(rb"^HEAD ")


class FileOrigin:
    """The same file for every path. The kernel sends it (sendfile)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        stat = path.stat()
        self._size_bytes = stat.st_size
        self._etag = f'"{stat.st_size:x}-{stat.st_mtime_ns:x}"'

    async def serve(self) -> None:
        """Until the process is ended."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await self._answer(await reader.readuntil(b"\r\n\r\n"), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()  # the client has gone

    async def _answer(self, request: bytes, writer: asyncio.StreamWriter) -> None:
        total = self._size_bytes
        match = _RANGE.search(request)
        start = int(match[1]) if match else 0
        end = min(int(match[2] or total - 1) + 1, total) if match else total
        status = "206 Partial Content" if match else "200 OK"
        lines = [
            f"HTTP/1.1 {status}",
            f"Content-Length: {end - start}",
            f"ETag: {self._etag}",
            "Accept-Ranges: bytes",
            "Content-Type: application/octet-stream",
        ]
        if match:
            lines.append(f"Content-Range: bytes {start}-{end - 1}/{total}")
        writer.write("\r\n".join([*lines, "", ""]).encode())
        await writer.drain()
        if _HEAD.match(request):
            return
        with self._path.open("rb") as file:
            loop = asyncio.get_running_loop()
            await loop.sendfile(writer.transport, file, start, end - start)


if __name__ == "__main__":
    asyncio.run(FileOrigin(Path(sys.argv[1])).serve())
