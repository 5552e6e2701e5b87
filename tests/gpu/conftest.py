"""The same embedded model as the engine's tests."""

from tests.engine.conftest import catalog, runner, store

__all__ = ["catalog", "runner", "store"]
