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

# The default traceback prints every local variable: pages of tensors for each expected error.
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.dev.ConsoleRenderer(
            colors=False, exception_formatter=structlog.dev.plain_traceback
        ),
    ]
)
