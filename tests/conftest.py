"""For all tests."""

from __future__ import annotations

import structlog

import experimance_controlnet.engine  # noqa: F401 - before torch: it sets how threads wait

# The default traceback prints every local variable: pages of tensors for each expected error.
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.dev.ConsoleRenderer(
            colors=False, exception_formatter=structlog.dev.plain_traceback
        ),
    ]
)
