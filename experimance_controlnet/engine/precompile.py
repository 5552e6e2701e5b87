"""Compile the kernels before anybody waits for them, in a process of their own.

Triton compiles a kernel when it is first called: ten seconds for SDXL on an empty cache. Much of
that is Python's, so on a thread it would hold up the imports that go on at the same time. Another
process does not, and leaves its results in Triton's cache on the disk, where this one finds them.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import structlog

log = structlog.get_logger()

_DEVICE_NODES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""NVIDIA's driver; the same below Windows."""


def compile_in_background(precision: str) -> None:
    """Begin to compile what SDXL needs in that precision: the setting's value. Nothing to do
    without an NVIDIA driver.

    Who needs a kernel meanwhile compiles it by himself.
    """
    if any(node.exists() for node in _DEVICE_NODES):
        threading.Thread(target=_compile, args=(precision,), name="compiler", daemon=True).start()


def _compile(precision: str) -> None:
    started_s = time.monotonic()
    command = [sys.executable, "-m", "experimance_controlnet.engine.kernels.compile", precision]
    # a session of its own: what the terminal sends to the server is not for it
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, start_new_session=True
    )
    seconds = round(time.monotonic() - started_s, 3)
    if done.returncode == 0:
        log.info("kernels_compiled", seconds=seconds)
    else:  # no harm but the time: what is missing is compiled when it is needed
        log.warning("kernels_not_compiled", exit_status=done.returncode, stderr=done.stderr[-2000:])
