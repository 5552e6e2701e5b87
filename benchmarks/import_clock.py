"""Imports one module and prints who took how long, as JSON: a process of its own, so that nothing
is imported already. ``python -m benchmarks.import_clock MODULE [--collect-garbage]``.

``python -X importtime`` leaves out what ``importlib.import_module`` imports, and so all that
transformers and diffusers import lazily. This clock stops every module's own code.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class ImportClock:
    """A finder that finds what Python's own does, and times the execution of each module."""

    def __init__(self) -> None:
        self.self_s: dict[str, float] = {}
        """By module, without the imports in it."""
        self.importers: dict[str, str] = {}
        """By module, who imported it first."""
        self._stack: list[tuple[str, float]] = [("", 0.0)]  # module, seconds of the imports in it

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """For ``sys.meta_path``."""
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader  # an instance of its own for each module
            loader.exec_module = self._timed(name, loader.exec_module)
        return spec

    def _timed(self, name: str, execute: Any) -> Any:
        def run(module: ModuleType) -> None:
            self.importers[name] = self._stack[-1][0]
            self._stack.append((name, 0.0))
            started_s = time.perf_counter()
            try:
                execute(module)
            finally:
                seconds = time.perf_counter() - started_s
                _, inner_s = self._stack.pop()
                self.self_s[name] = seconds - inner_s
                importer, others_s = self._stack.pop()
                self._stack.append((importer, others_s + seconds))

        return run


def main() -> None:
    """One JSON line: ``seconds`` in all, ``self_s`` and ``importers`` by module."""
    module, *flags = sys.argv[1:]
    if "--collect-garbage" not in flags:
        gc.disable()
    clock = ImportClock()
    sys.meta_path.insert(0, clock)
    started_s = time.perf_counter()
    importlib.import_module(module)
    seconds = time.perf_counter() - started_s
    print(json.dumps({"seconds": seconds, "self_s": clock.self_s, "importers": clock.importers}))


if __name__ == "__main__":
    main()
