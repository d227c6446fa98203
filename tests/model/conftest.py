"""Fixtures that the tests of adapters share."""

from tests.model.small_adapters import adapted, models  # noqa: F401
