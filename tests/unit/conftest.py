"""What several unit tests need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.origin import Origin


@pytest.fixture
def origin() -> Iterator[Origin]:
    """A server on the loopback that sends what it is told to."""
    origin = Origin()
    yield origin
    origin.close()
