"""For all tests."""

from __future__ import annotations

import os

import structlog

import experimance_controlnet.engine  # noqa: F401 - before torch: it sets how threads wait

# after the line above
import torch  # isort: skip

if not torch.cuda.is_available():
    # Read when triton is imported: its kernels then run on the CPU, step by step.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Through the standard library's logging, whose records pytest keeps with the test that was running.
# structlog's own output goes to stdout, which pytest captures only within a test: threads of a
# server have something to say between two of them as well. `--log-file FILE` has every line.
structlog.configure(
    processors=[
        structlog.stdlib.filter_by_level,
        structlog.stdlib.add_log_level,
        # The default traceback prints every local variable: pages of tensors for each error.
        structlog.dev.ConsoleRenderer(
            colors=False, exception_formatter=structlog.dev.plain_traceback
        ),
    ],
    logger_factory=structlog.stdlib.LoggerFactory(),
    wrapper_class=structlog.stdlib.BoundLogger,
)
