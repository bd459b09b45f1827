"""A start of several processes has its own hard end (`PATIENCE`); pytest's must come later."""

import pytest

from tests.support.patience import PATIENCE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave room for two starts in one test."""
    for item in items:
        if item.get_closest_marker("distributed"):
            item.add_marker(pytest.mark.timeout(2.5 * PATIENCE))
