"""How fast a model file arrives: ours beside curl, and aria2c where it is installed.

``python -m benchmarks.downloads``: one large file from an origin on the loopback, a process of its
own that sends with sendfile. So nothing but the machine itself is the limit: its cores, and its
disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import structlog

from benchmarks.record import publish, table_of
from experimance_controlnet.catalog.disk import flush
from experimance_controlnet.catalog.hashes import hash_file
from experimance_controlnet.catalog.specs import Source
from experimance_controlnet.catalog.store import ModelStore

OURS = "ours"
PACKAGES = ("urllib3",)
POLL_S = 0.005
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of one downloader."""

    downloader: str
    received_s: float
    """Until the last byte is in the file."""
    slowest_s: float
    """The same, of the worst of the repeats."""
    mb_per_s: float
    """Up to then."""
    usable_s: float | None
    """Until it is hashed and flushed as well; None: that is not done."""
    cpu_s: float
    """Of the downloader itself, in user mode and in the kernel."""
    transfer_ratio: float
    """Speed up to ``received_s``, to the best peer's."""
    usable_ratio: float | None
    """The same up to ``usable_s``."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One file that came."""

    path: Path
    received_s: float
    usable_s: float | None = None


Fetch = Callable[[str, Path], Arrival]
"""From a URL into an empty folder."""


def ours(url: str, folder: Path) -> Arrival:
    """Transfer, sha256, header, flush, rename: as the server does it."""
    store = ModelStore(folder)
    started_s = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        transfer = pool.submit(store.fetch, Source(url))
        received_s = 0.0
        while not transfer.done():
            if not received_s and any(
                one.done_bytes == one.total_bytes for one in store.downloads()
            ):
                received_s = time.perf_counter() - started_s
            time.sleep(POLL_S)
    usable_s = time.perf_counter() - started_s
    return Arrival(transfer.result(), received_s or usable_s, usable_s)


def curl(url: str, folder: Path) -> Arrival:
    """One stream into a file; neither hashed nor flushed."""
    path = folder / "file"
    command = ["curl", "--silent", "--fail", "--output", str(path), url]
    return Arrival(path, _seconds(lambda: subprocess.run(command, check=True)))


def curl_and_checks(url: str, folder: Path) -> Arrival:
    """With the promises of ours, one after the other; the hash by the same library as ours."""
    arrival = curl(url, folder)
    checks_s = _seconds(lambda: hash_file(arrival.path)) + _seconds(lambda: flush(arrival.path))
    return Arrival(arrival.path, arrival.received_s, arrival.received_s + checks_s)


def aria2c(url: str, folder: Path) -> Arrival:
    """As many connections as ours; neither hashed nor flushed."""
    command = ["aria2c", "--quiet", "-x8", "-s8", "-k16M", "--file-allocation=none"]
    command += [f"--dir={folder}", "--out=file", url]
    return Arrival(folder / "file", _seconds(lambda: subprocess.run(command, check=True)))


def _seconds(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def downloaders() -> dict[str, Fetch]:
    """Ours, and what is installed here."""
    found: dict[str, Fetch] = {OURS: ours}
    if shutil.which("curl"):
        found["curl"] = curl
        found["curl, then sha256 and fsync"] = curl_and_checks
    if shutil.which("aria2c"):
        found["aria2c, 8 connections"] = aria2c
    return found


def write_file(path: Path, size_bytes: int) -> None:
    """Random safetensors of about that length."""
    header = {"w": {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for start in range(0, size_bytes, _BLOCK_BYTES):
            file.write(os.urandom(min(_BLOCK_BYTES, size_bytes - start)))


@contextmanager
def origin_of(path: Path) -> Iterator[str]:
    """The URL of a process that serves the file."""
    command = [sys.executable, "-m", "benchmarks.file_origin", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(re.fullmatch(r"(\d+)\n", process.stdout.readline())[1])  # type: ignore[index]
        yield f"http://127.0.0.1:{port}/weights"
    finally:
        process.kill()
        process.communicate()


def measure(file: Path, folder: Path, repeats: int) -> list[Row]:
    """All downloaders in turns; a file that arrives changed is an AssertionError."""
    found = downloaders()
    arrivals: dict[str, list[Arrival]] = {name: [] for name in found}
    cpu_s: dict[str, list[float]] = {name: [] for name in found}
    digest = hash_file(file)
    with origin_of(file) as url:
        for number in range(repeats):
            for name, fetch in found.items():
                with TemporaryDirectory(dir=folder) as target:
                    os.sync()  # nobody pays for what the one before left to write
                    before = os.times()
                    arrival = fetch(url, Path(target))
                    cpu_s[name].append(sum(os.times()[:4]) - sum(before[:4]))
                    arrivals[name].append(arrival)
                    line = f"{number + 1}. {name}: {arrival.received_s:.2f} s"
                    print(line, file=sys.stderr, flush=True)
                    assert hash_file(arrival.path) == digest, name
    return rows_of(arrivals, cpu_s, file.stat().st_size)


def rows_of(
    arrivals: Mapping[str, list[Arrival]], cpu_s: Mapping[str, list[float]], size_bytes: int
) -> list[Row]:
    """Medians, and how they compare."""
    received_s = {
        name: statistics.median(arrival.received_s for arrival in all_of)
        for name, all_of in arrivals.items()
    }
    usable_s = {
        name: statistics.median(arrival.usable_s or 0.0 for arrival in all_of)
        for name, all_of in arrivals.items()
        if all_of[0].usable_s is not None
    }

    def best(times_s: Mapping[str, float]) -> float:
        return min((s for name, s in times_s.items() if name != OURS), default=times_s[OURS])

    return [
        Row(
            downloader=name,
            received_s=round(seconds, 2),
            slowest_s=round(max(arrival.received_s for arrival in arrivals[name]), 2),
            mb_per_s=round(size_bytes / seconds / 1e6),
            usable_s=round(usable_s[name], 2) if name in usable_s else None,
            cpu_s=round(statistics.median(cpu_s[name]), 2),
            transfer_ratio=round(best(received_s) / seconds, 2),
            usable_ratio=round(best(usable_s) / usable_s[name], 2) if name in usable_s else None,
        )
        for name, seconds in received_s.items()
    ]


def seconds_to_hash(path: Path) -> float:
    """One core's time for the sha256, from the page cache."""
    started_s = time.process_time()
    hash_file(path)
    return round(time.process_time() - started_s, 2)


def main() -> None:
    """All downloaders on one file; everything written is removed again."""
    parser = argparse.ArgumentParser(description="Measure downloads over the loopback.")
    parser.add_argument("--megabytes", type=int, default=2000, help="(default 2000)")
    parser.add_argument("--repeats", type=int, default=3, help="(default 3)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the usual temporary)")
    parser.add_argument("--out", type=Path, help="also write the JSON into this file")
    options = parser.parse_args()
    # our own events are not what is measured
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    with TemporaryDirectory(dir=options.folder) as folder:
        file = Path(folder, "weights.safetensors")
        write_file(file, options.megabytes * 10**6)
        rows = measure(file, Path(folder), options.repeats)
        facts = {
            "megabytes": options.megabytes,
            "repeats": options.repeats,
            "sha256_s": seconds_to_hash(file),
        }
    table = table_of(f"One file of {options.megabytes} MB over the loopback", rows)
    publish("downloads", table, rows, facts, PACKAGES, options.out)


if __name__ == "__main__":
    main()
